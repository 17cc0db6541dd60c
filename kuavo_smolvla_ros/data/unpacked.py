"""What had to be decompressed of a recording, kept until nobody reads the recording any more.

A recording is gone through for its stamps, for what the grid uses, and once for each camera. bz2 takes longer
than all else together, and so does unpacking a file that was compressed as a whole: each is done once.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class Unpacked:
    """Decompressed parts of one recording, for all who open it; gone with the last of them.

    Filled by who opens the recording first, and read by several threads after that. They lie where Python
    puts temporary files (`TMPDIR`), the chunks in a file without a name: nothing of it outlives a process
    that is killed.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[Path, Path] = {}
        self._chunks: IO[bytes] | None = None
        self._places: dict[tuple[Path, int], tuple[int, int]] = {}
        self._end = 0

    def file(self, path: Path, unpack: Callable[[Path, Path], Any]) -> Path:
        """The plain copy of a compressed file; `unpack(path, copy)` makes it where there is none."""
        if path not in self._files:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="kuavo_bag_")
            copy = Path(self._folder.name, path.stem)
            with _told_of_temporary_disk(path):
                unpack(path, copy)
            self._files[path] = copy
        return self._files[path]

    def chunk(self, path: Path, start: int) -> bytes | None:
        """The chunk at this byte of a file, where it was kept."""
        place = self._places.get((path, start))
        if place is None:
            return None
        assert self._chunks is not None
        return os.pread(self._chunks.fileno(), place[1], place[0])

    def keep(self, path: Path, start: int, data: bytes) -> None:
        """Keep a chunk that was decompressed."""
        if (path, start) in self._places:
            return
        if self._chunks is None:
            self._chunks = tempfile.TemporaryFile(prefix="kuavo_bag_", buffering=0)  # noqa: SIM115
        with _told_of_temporary_disk(path):
            self._chunks.write(data)
        self._places[path, start] = self._end, len(data)
        self._end += len(data)


@contextmanager
def _told_of_temporary_disk(path: Path) -> Iterator[None]:
    """A full disk is said to be that of temporary files, not the one the dataset is on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = tempfile.gettempdir()
        text = f"no space is left in {folder} to decompress {path.name} (set TMPDIR to a larger disk)"
        raise OSError(error.errno, text, folder) from error
