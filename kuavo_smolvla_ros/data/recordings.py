"""Which recordings there are, by what name, and what is in them by content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kuavo_smolvla_ros.errors import UserError

SUFFIXES = (".bag", ".mcap", ".db3", ".mcap.zstd", ".db3.zstd")
ROSBAG2_METADATA = "metadata.yaml"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Recording:
    """A bag: a file, or a folder of rosbag2. The name is what reports and the dataset call it."""

    name: str
    path: Path
    bytes: int


def find_recordings(places: Iterable[Path]) -> list[Recording]:
    """All recordings at and below the given files and folders, ordered by name."""
    found: dict[str, Recording] = {}
    for place in places:
        place = Path(place)
        if not place.exists():
            raise UserError(f"{place}: there is no such recording or folder")
        below = list(_walk(place))
        if not below:
            raise UserError(f"{place}: holds no recording ({', '.join(SUFFIXES)} or a rosbag2 folder)")
        for path in below:
            name = path.relative_to(place).as_posix() if path != place else path.name
            if name in found and found[name].path.resolve() != path.resolve():
                raise UserError(
                    f"two recordings are called '{name}' ({found[name].path} and {path}); "
                    "give the folder above both, so that their names differ"
                )
            found[name] = Recording(name, path, sum(f.stat().st_size for f in files_of(path)))
    return [found[name] for name in sorted(found)]


def _walk(place: Path) -> Iterator[Path]:
    if place.is_file():
        if place.name.endswith(SUFFIXES):
            yield place
        return
    if _is_rosbag2(place):
        yield place
        return
    for child in sorted(place.iterdir()):
        if not child.name.startswith("."):
            yield from _walk(child)


def _is_rosbag2(folder: Path) -> bool:
    """A recorder that was killed leaves no metadata.yaml, but its files are named after the folder."""
    if (folder / ROSBAG2_METADATA).is_file():
        return True
    parts = [p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES)]
    numbered = re.compile(re.escape(folder.name) + r"_\d+\.(mcap|db3)(\.zstd)?")
    return bool(parts) and all(numbered.fullmatch(part) for part in parts)


def files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def content_hash(path: Path) -> str:
    """SHA-256 over a recording's files: their names within it, their lengths, their bytes."""
    digest = hashlib.sha256()
    for file in files_of(path):
        inner = file.relative_to(path).as_posix() if file != path else ""
        digest.update(f"{inner}\0{file.stat().st_size}\0".encode())
        _feed(digest, file)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    _feed(digest, path)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
