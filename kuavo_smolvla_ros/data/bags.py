"""Recordings of ROS 1 and ROS 2, read without a ROS installation; only what is asked for is decoded.

A recording is one file, or a folder of rosbag2 whose files follow one another. What cannot be read (a missing
end, a damaged chunk, a missing file) is listed in `Bag.damages`; the rest is read all the same.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
import zstandard

from kuavo_smolvla_ros.data import bag_types
from kuavo_smolvla_ros.data.bag_mcap import McapStorage
from kuavo_smolvla_ros.data.bag_ros1 import Ros1Storage
from kuavo_smolvla_ros.data.bag_sqlite import SqliteStorage
from kuavo_smolvla_ros.data.bag_storage import BagError, Channel, Damage, Place, Storage, everything
from kuavo_smolvla_ros.data.unpacked import Unpacked

__all__ = ["Bag", "BagError", "BagMessage", "FilePlace", "open_bag"]

_STORAGES: dict[str, Callable[[Path, bool, Unpacked], Storage]] = {
    ".bag": Ros1Storage,
    ".mcap": McapStorage,
    ".db3": SqliteStorage,
}
_METADATA = "metadata.yaml"
_PACKED = ".zstd"


class FilePlace(NamedTuple):
    """Where a message lies: which file of the recording, and where in it."""

    file: int
    container: int
    offset: int
    length: int


@dataclass(frozen=True)
class BagMessage:
    """One message as recorded; `decode` builds the message object when it is wanted."""

    topic: str
    type: str
    receive_ns: int
    data: memoryview  # valid until the next message is asked for
    place: FilePlace
    channel: Channel

    def decode(self) -> Any:
        return bag_types.decode(self.channel, bytes(self.data))


@dataclass(frozen=True)
class Bag:
    """An open recording. Not locked: every thread opens its own."""

    path: Path
    files: tuple[Storage | None, ...]  # None: one that cannot be read; places count it all the same
    packs_messages: bool  # every message is compressed by itself
    unpacked: Unpacked  # for who opens the same recording again
    _metadata: dict[str, str] = field(default_factory=dict)
    _damages: list[Damage] = field(default_factory=list)

    @property
    def channels(self) -> list[Channel]:
        return [channel for file in self._open_files() for channel in file.contents.channels.values()]

    @property
    def types(self) -> dict[str, str]:
        """Topics with their types, as far as known; walking the messages may add some of a damaged file."""
        return {channel.topic: channel.type for channel in self.channels}

    @property
    def metadata(self) -> dict[str, str]:
        """What the recorder wrote besides the messages."""
        merged = dict(self._metadata)
        for file in self._open_files():
            merged |= file.contents.metadata
        return merged

    @property
    def damages(self) -> list[Damage]:
        """What could not be read, so far."""
        return [*self._damages, *(damage for file in self._open_files() for damage in file.contents.damages)]

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Messages of the topics (None: of all) in the order in which they were recorded."""
        wanted = everything if topics is None else lambda channel: channel.topic in topics
        for number, file in enumerate(self.files):
            if file is None:
                continue
            for channel, receive_ns, data, place in file.scan(wanted):
                raw = memoryview(_unpack(data)) if self.packs_messages else data
                yield BagMessage(
                    channel.topic, channel.type, receive_ns, raw, FilePlace(number, *place), channel
                )

    def read(self, place: FilePlace) -> bytes:
        """A message's bytes, by a place that `messages` gave."""
        file = self.files[place.file]
        if file is None:
            raise BagError(f"{self.path}: its file number {place.file} cannot be read")
        data = file.read(Place(*place[1:]))
        return _unpack(data) if self.packs_messages else data

    def _open_files(self) -> list[Storage]:
        return [file for file in self.files if file is not None]


@contextmanager
def open_bag(path: Path | str, survey: bool = True, unpacked: Unpacked | None = None) -> Iterator[Bag]:
    """Open a ROS 1 `.bag`, or a folder or single file of rosbag2 (mcap, sqlite3).

    Without `survey` nothing is known of it; enough for `Bag.read`. `unpacked` is that of an earlier opening.
    """
    path = Path(path)
    with ExitStack() as stack:
        opening = _Opening(stack, survey, unpacked or Unpacked())
        try:
            bag = _open_folder(path, opening) if path.is_dir() else _open_file(path, opening)
        except PermissionError as error:
            raise BagError(f"{error.filename or path}: no permission to read it") from error
        yield bag


class _Opening(NamedTuple):
    stack: ExitStack
    survey: bool
    unpacked: Unpacked


def _open_file(path: Path, opening: _Opening) -> Bag:
    if not path.exists():
        raise BagError(f"{path}: there is no such recording")
    return Bag(path, (_open_storage(path, opening),), False, opening.unpacked)


def _open_folder(path: Path, opening: _Opening) -> Bag:
    metadata, damages = _read_metadata(path)
    there = sorted((p for p in path.iterdir() if _suffix(p) in _STORAGES), key=_natural)
    listed = [path / PurePath(name).name for name in metadata.get("relative_file_paths", ())]
    for file in listed:
        if file not in there:
            damages.append(Damage(file.name, f"{_METADATA} lists it, but it is not there"))
    files = [file for file in listed if file in there]
    for file in there:
        if file not in files and file.with_name(file.name + _PACKED) not in files:
            files.append(file)
            if metadata:
                damages.append(Damage(file.name, f"{_METADATA} does not list it; read all the same"))
    if not files:
        raise BagError(f"{path}: holds no recording ({', '.join(_STORAGES)})")
    storages: list[Storage | None] = []
    for file in files:
        try:
            storages.append(_open_storage(file, opening))
        except BagError as error:
            if len(files) == 1:
                raise
            damages.append(Damage(file.name, str(error).removeprefix(f"{file}: ")))
            storages.append(None)
    if not any(storages):
        raise BagError(f"{path}: none of its {len(files)} files can be read; {damages[-1].sentence}")
    custom = {str(key): str(value) for key, value in (metadata.get("custom_data") or {}).items()}
    by_message = str(metadata.get("compression_mode") or "").lower() == "message"
    return Bag(path, tuple(storages), by_message, opening.unpacked, custom, damages)


def _read_metadata(path: Path) -> tuple[dict[str, Any], list[Damage]]:
    file = path / _METADATA
    if not file.exists():
        return {}, [
            Damage(_METADATA, "is missing: the recorder did not finish; the files are read without it")
        ]
    try:
        # The C parser: a recording of many topics lists every one's quality of service.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(file.read_text(), Loader=loader)["rosbag2_bagfile_information"]
        if not isinstance(content, dict):
            raise TypeError
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return {}, [Damage(_METADATA, "is damaged; the files are read without it")]
    compression = content.get("compression_format") or "zstd"
    if content.get("compression_mode") and compression != "zstd":
        raise BagError(f"{path}: compressed with '{compression}', which is not supported (zstd is)")
    return content, []


def _open_storage(path: Path, opening: _Opening) -> Storage:
    suffix = _suffix(path)
    if suffix not in _STORAGES:
        raise BagError(f"{path}: is no recording ({', '.join(_STORAGES)} or a rosbag2 folder)")
    # A file that was compressed as a whole can only be read by place once it is unpacked on the disk.
    plain = opening.unpacked.file(path, _decompress) if path.suffix == _PACKED else path
    storage = _STORAGES[suffix](plain, opening.survey, opening.unpacked)
    opening.stack.callback(storage.close)
    return storage


def _decompress(path: Path, target: Path) -> None:
    with path.open("rb") as source, target.open("wb") as sink:
        try:
            with zstandard.ZstdDecompressor().stream_reader(source) as reader:
                shutil.copyfileobj(reader, sink, 1 << 20)
        except zstandard.ZstdError as error:
            if not sink.tell():
                raise BagError(f"{path}: cannot be decompressed: {error}") from error


def _unpack(data: bytes | memoryview) -> bytes:
    size = zstandard.frame_content_size(data)
    decompressor = zstandard.ZstdDecompressor()
    return decompressor.decompress(data) if size > 0 else decompressor.decompressobj().decompress(data)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == _PACKED else path.suffix


def _natural(path: Path) -> list[tuple[int, str]]:
    """bag_2 before bag_10."""
    return [(int(part or -1), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
