"""What is done is written down, durably and before it is relied upon; what is half done leaves no trace."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UserError


class Journal:
    """A file of one JSON record per line, each on the disk before `append` returns.

    A last line that was cut short by a crash never happened: it is removed when the journal is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path.exists():
            self._load()

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"{self.path}, line {number}, is damaged ({error}); remove the folder {self.path.parent} "
                    "to convert from the beginning"
                ) from None
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())

    def append(self, record: Mapping[str, Any]) -> None:
        new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(to_line(record))
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)
        self.records.append(dict(record))

    def keep(self, count: int) -> None:
        """Forget all but the first `count` records."""
        self.records = self.records[:count]
        write_durably(self.path, b"".join(map(to_line, self.records)))


def to_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def write_durably(path: Path, content: bytes) -> None:
    """The old content or the new one, whatever happens; on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with this process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another conversion is writing {folder}; wait for it or stop it") from None
        yield
    finally:
        os.close(descriptor)
