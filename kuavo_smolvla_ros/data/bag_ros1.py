"""ROS 1 bags (format 2.0), walked record by record; the index is not needed and not trusted.

A bag whose recorder was killed has no index and an unfinished last chunk whose header still says it is empty.
The records that belong into it then follow as if they stood outside of any chunk, and are read as such.
"""

from __future__ import annotations

import bz2
import struct
from collections.abc import Iterator
from pathlib import Path

import lz4.frame

from kuavo_smolvla_ros.data.bag_storage import BagError, Channel, Contents, Entry, Place, Wanted, nothing
from kuavo_smolvla_ros.data.unpacked import Unpacked

_MAGIC = b"#ROSBAG V2.0\n"
_MESSAGE, _BAG, _CHUNK, _CONNECTION = 2, 3, 5, 7
_OUTSIDE = -1  # container of a message that lies in no chunk, or in one that is not compressed
_NS = 1_000_000_000
_LARGEST_HEADER = 1 << 24  # a message definition is some kilobytes; more is no header
_UINT32 = struct.Struct("<I")
_TIME = struct.Struct("<II")


class _CutError(Exception):
    """The file ends, or makes no sense, within a record."""


class Ros1Storage:
    """See `bag_storage.Storage`. A place is (start of the compressed chunk or -1, offset, length)."""

    def __init__(self, path: Path, survey: bool, unpacked: Unpacked) -> None:
        self.path = path
        self._unpacked = unpacked
        self.contents = Contents()
        self._size = path.stat().st_size
        self._file = path.open("rb")
        self._chunk: tuple[int, bytes] | None = None
        try:
            self._open(survey)
        except BaseException:
            self._file.close()
            raise

    def _open(self, survey: bool) -> None:
        magic = self._file.read(len(_MAGIC))
        if magic != _MAGIC:
            if magic.startswith(b"#ROSBAG"):
                raise BagError(
                    f"{self.path}: bags of {magic[1:12].decode(errors='replace')} are not supported"
                )
            what = "is empty" if not magic else "is no ROS 1 bag (it does not begin with #ROSBAG V2.0)"
            raise BagError(f"{self.path}: {what}")
        self._first = self._file.tell()
        if not survey:
            return
        try:
            header, length = self._read_head()
            index, connections = struct.unpack("<Q", header[b"index_pos"])[0], header[b"conn_count"]
            if header.get(b"encryptor"):
                raise BagError(f"{self.path}: is encrypted, which is not supported")
            self._first = self._file.tell() + length
            if 0 < index < self._size:
                self._file.seek(index)
                for _ in range(_UINT32.unpack(connections)[0]):
                    header, length = self._read_head()
                    self._connection(header, self._read(length))
                return
            self.contents.damage(self.path, "the bag has no index: its recorder did not finish; read without")
        except (_CutError, KeyError, struct.error, UnicodeDecodeError):
            self.contents.damage(self.path, "the bag's index is damaged or missing; read without it")
        for _ in self.scan(nothing):  # the connections stand between the messages
            pass

    def close(self) -> None:
        self._file.close()

    def scan(self, wanted: Wanted) -> Iterator[Entry]:
        position = self._first
        last_ns: int | None = None
        while position < self._size:
            self._file.seek(position)
            try:
                header, length = self._read_head()
                start = self._file.tell()
                operation = header[b"op"][0]
                if operation == _CHUNK:
                    for entry in self._chunk_entries(header, start, length, wanted, last_ns):
                        last_ns = entry.receive_ns
                        yield entry
                elif operation in (_MESSAGE, _CONNECTION):
                    data = self._read(length)
                    if operation == _CONNECTION:
                        self._connection(header, data)
                    elif entry := self._entry(
                        header, memoryview(data), Place(_OUTSIDE, start, length), wanted
                    ):
                        last_ns = entry.receive_ns
                        yield entry
                if start + length > self._size:
                    raise _CutError
                position = start + length
            except (_CutError, KeyError, IndexError, struct.error, UnicodeDecodeError):
                share = f"{self._size - position} of {self._size} bytes at the end"
                self.contents.damage(self.path, f"cut off or damaged: {share} could not be read", last_ns)
                return

    def read(self, place: Place) -> bytes:
        if place.container == _OUTSIDE:
            self._file.seek(place.offset)
            return self._read(place.length)
        if self._chunk is None or self._chunk[0] != place.container:
            self._file.seek(place.container)
            header, length = self._read_head()
            self._chunk = (place.container, self._unpack(header, self._read(length), place.container))
        return self._chunk[1][place.offset : place.offset + place.length]

    def _chunk_entries(
        self, header: dict[bytes, bytes], start: int, length: int, wanted: Wanted, last_ns: int | None
    ) -> Iterator[Entry]:
        plain = header[b"compression"] == b"none"
        packed = self._file.read(min(length, self._size - start))
        if plain:
            data, container, base = packed, _OUTSIDE, start
        else:
            if len(packed) < length:
                raise _CutError
            container, base = start - self._head_length, 0
            try:
                data = self._unpack(header, packed, container)
            except (ValueError, EOFError, RuntimeError):
                self.contents.damage(self.path, f"the compressed chunk at byte {start} is damaged", last_ns)
                return
        view = memoryview(data)
        position = 0
        while position < len(view):
            inner, at, size = _parse_head(view, position)
            if at + size > len(view):
                raise _CutError
            operation = inner[b"op"][0]
            if operation == _CONNECTION:
                self._connection(inner, bytes(view[at : at + size]))
            elif operation == _MESSAGE:
                place = Place(container, base + at, size)
                if entry := self._entry(inner, view[at : at + size], place, wanted):
                    yield entry
            position = at + size

    def _entry(
        self, header: dict[bytes, bytes], data: memoryview, place: Place, wanted: Wanted
    ) -> Entry | None:
        channel = self.contents.channels[_UINT32.unpack(header[b"conn"])[0]]
        if not wanted(channel):
            return None
        seconds, nanoseconds = _TIME.unpack(header[b"time"])
        return Entry(channel, seconds * _NS + nanoseconds, data, place)

    def _connection(self, header: dict[bytes, bytes], data: bytes) -> None:
        number = _UINT32.unpack(header[b"conn"])[0]
        if number in self.contents.channels:
            return
        described = _fields(memoryview(data))
        package, _, name = described[b"type"].decode().partition("/")
        self.contents.channels[number] = Channel(
            id=number,
            topic=header[b"topic"].decode(),
            type=f"{package}/msg/{name}",
            definition=described[b"message_definition"].decode(errors="replace"),
            definition_format="msg",
            serialization="ros1",
        )

    def _unpack(self, header: dict[bytes, bytes], packed: bytes, container: int) -> bytes:
        compression = header[b"compression"].decode()
        if compression == "bz2":
            data = self._unpacked.chunk(self.path, container)
            if data is None:
                try:
                    data = bz2.decompress(packed)
                except OSError as error:  # its word for damaged; those of the disk mean the disk
                    raise ValueError(str(error)) from error
                self._unpacked.keep(self.path, container, data)
            return data
        if compression == "lz4":
            return bytes(lz4.frame.decompress(packed))
        raise BagError(f"{self.path}: chunks compressed with '{compression}' are not supported")

    def _read_head(self) -> tuple[dict[bytes, bytes], int]:
        length = _UINT32.unpack(self._read(4))[0]
        if length > _LARGEST_HEADER:
            raise _CutError
        header = _fields(memoryview(self._read(length)))
        self._head_length = 4 + length + 4
        return header, _UINT32.unpack(self._read(4))[0]

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise _CutError
        return data


def _parse_head(view: memoryview, position: int) -> tuple[dict[bytes, bytes], int, int]:
    """The header at a position, where its data begin, and how long they are."""
    (length,) = _UINT32.unpack_from(view, position)
    end = position + 4 + length
    header = _fields(view[position + 4 : end])
    return header, end + 4, _UINT32.unpack_from(view, end)[0]


def _fields(view: memoryview) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes] = {}
    data = bytes(view)
    position = 0
    while position < len(data):
        (length,) = _UINT32.unpack_from(data, position)
        end = position + 4 + length
        if end > len(data):
            raise _CutError
        name, _, value = data[position + 4 : end].partition(b"=")
        fields[name] = value
        position = end
    return fields
