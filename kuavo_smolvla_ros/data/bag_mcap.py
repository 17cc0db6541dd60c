"""MCAP files (ROS 2, and ROS 1 converted to MCAP), walked record by record.

Records are parsed by the mcap library; walking them is done here, because a place in the file is wanted for
every message, and a file whose end is missing has to be read up to its last whole record.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import lz4.frame
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel as ChannelRecord
from mcap.records import Metadata, Schema

from kuavo_smolvla_ros.data.bag_storage import BagError, Channel, Contents, Entry, Place, Wanted, nothing
from kuavo_smolvla_ros.data.unpacked import Unpacked

_MAGIC = b"\x89MCAP0\r\n"
_OUTSIDE = -1
_RECORD = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_CHUNK = struct.Struct("<QQQI")
_FOOTER_BYTES = _RECORD.size + 20 + len(_MAGIC)
_FORMATS = {"ros2msg": "msg", "ros1msg": "msg", "ros2idl": "idl", "omgidl": "idl"}
_BROKEN = (struct.error, IndexError, ValueError, McapError)


class McapStorage:
    """See `bag_storage.Storage`. A place is (start of the compressed chunk or -1, offset, length)."""

    def __init__(self, path: Path, survey: bool, _: Unpacked) -> None:
        self.path = path
        self.contents = Contents()
        self._size = path.stat().st_size
        self._file = path.open("rb")
        self._schemas: dict[int, Schema] = {}
        self._chunk: tuple[int, bytes] | None = None
        try:
            self._open(survey)
        except BaseException:
            self._file.close()
            raise

    def _open(self, survey: bool) -> None:
        magic = self._file.read(len(_MAGIC))
        if magic != _MAGIC:
            what = "is empty" if not magic else "is no MCAP file (it does not begin with the MCAP mark)"
            raise BagError(f"{self.path}: {what}")
        if not survey:
            return
        try:
            self._read_summary()
        except _BROKEN:
            self.contents.channels.clear()  # the messages are read without it, and say what is damaged
        if not self.contents.channels:
            for _ in self.scan(nothing):  # channels and metadata also stand between the messages
                pass

    def _read_summary(self) -> None:
        if summary := self._summary_start():
            for opcode, start, length in self._records(summary):
                if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                    self._note(opcode, self._read(start, length))
                elif opcode == Opcode.METADATA_INDEX:
                    at, size = struct.unpack("<QQ", self._read(start, 16))
                    self._note(Opcode.METADATA, self._read(at + _RECORD.size, size - _RECORD.size))

    def _summary_start(self) -> int:
        """Where the summary begins; 0 where there is none."""
        footer = self._read(max(0, self._size - _FOOTER_BYTES), _FOOTER_BYTES)
        if len(footer) != _FOOTER_BYTES or not footer.endswith(_MAGIC) or footer[0] != Opcode.FOOTER:
            return 0
        (summary,) = struct.unpack_from("<Q", footer, _RECORD.size)
        return int(summary) if 0 < summary < self._size else 0

    def close(self) -> None:
        self._file.close()

    def scan(self, wanted: Wanted) -> Iterator[Entry]:
        last_ns: int | None = None
        for opcode, start, length in self._records(len(_MAGIC)):
            if opcode == Opcode.DATA_END:
                return  # the rest repeats what was read
            if start + length > self._size:
                missing = start + length - self._size
                self._cut_off(f"the last record lacks {missing} bytes", last_ns)
                return
            try:
                for entry in self._record(opcode, start, length, wanted, last_ns):
                    last_ns = entry.receive_ns
                    yield entry
            except _BROKEN:
                self.contents.damage(self.path, f"the record at byte {start} is damaged; left out", last_ns)
        self._cut_off("the end of the file is missing", last_ns)

    def read(self, place: Place) -> bytes:
        if place.container == _OUTSIDE:
            return self._read(place.offset, place.length)
        if self._chunk is None or self._chunk[0] != place.container:
            (length,) = struct.unpack("<Q", self._read(place.container - 8, 8))
            data, _, _ = self._unpack(self._read(place.container, length), place.container)
            self._chunk = (place.container, data)
        return self._chunk[1][place.offset : place.offset + place.length]

    def _cut_off(self, how: str, last_ns: int | None) -> None:
        self.contents.damage(self.path, f"cut off: {how}; its recorder did not finish", last_ns)

    def _records(self, position: int) -> Iterator[tuple[int, int, int]]:
        """Opcode, start and length of the content of each record; the last one may reach beyond the file."""
        while position + _RECORD.size <= self._size:
            opcode, length = _RECORD.unpack(self._read(position, _RECORD.size))
            if opcode == Opcode.FOOTER:
                return
            yield opcode, position + _RECORD.size, length
            position += _RECORD.size + length

    def _record(
        self, opcode: int, start: int, length: int, wanted: Wanted, last_ns: int | None
    ) -> Iterator[Entry]:
        if opcode == Opcode.CHUNK:
            data, container, base = self._unpack(self._read(start, length), start, last_ns)
            yield from self._chunk_entries(data, container, base, wanted)
        elif opcode == Opcode.MESSAGE:
            view = memoryview(self._read(start, length))
            if entry := self._entry(view, _OUTSIDE, start, wanted):
                yield entry
        elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.METADATA):
            self._note(opcode, self._read(start, length))

    def _chunk_entries(self, data: bytes, container: int, base: int, wanted: Wanted) -> Iterator[Entry]:
        view = memoryview(data)
        position = 0
        while position < len(view):
            opcode, length = _RECORD.unpack_from(view, position)
            start = position + _RECORD.size
            position = start + length
            if opcode == Opcode.MESSAGE:
                if entry := self._entry(view[start:position], container, base + start, wanted):
                    yield entry
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                self._note(opcode, bytes(view[start:position]))

    def _entry(self, view: memoryview, container: int, offset: int, wanted: Wanted) -> Entry | None:
        number, _, log_ns, _ = _MESSAGE.unpack_from(view)
        channel = self.contents.channels.get(number)
        if channel is None:
            raise ValueError(f"channel {number} is not described")
        if not wanted(channel):
            return None
        place = Place(container, offset + _MESSAGE.size, len(view) - _MESSAGE.size)
        return Entry(channel, log_ns, view[_MESSAGE.size :], place)

    def _unpack(self, record: bytes, start: int, last_ns: int | None = None) -> tuple[bytes, int, int]:
        """A chunk's records, the container that places in it name, and what to add to offsets in it."""
        _, _, size, crc = _CHUNK.unpack_from(record)
        (name_length,) = struct.unpack_from("<I", record, _CHUNK.size)
        at = _CHUNK.size + 4 + name_length
        compression = record[_CHUNK.size + 4 : at].decode()
        packed = memoryview(record)[at + 8 :]
        if compression in ("", "none"):
            data, container, base = bytes(packed), _OUTSIDE, start + at + 8
        elif compression in ("zstd", "lz4"):
            container, base = start, 0
            try:
                data = _decompress(packed, compression, size)
            except (zstandard.ZstdError, RuntimeError) as error:
                raise ValueError(str(error)) from error
        else:
            raise BagError(f"{self.path}: chunks compressed with '{compression}' are not supported")
        if crc and zlib.crc32(data) != crc:
            raise ValueError("the checksum does not match")
        return data, container, base

    def _note(self, opcode: int, record: bytes) -> None:
        stream = ReadDataStream(BytesIO(record))
        if opcode == Opcode.SCHEMA:
            schema = Schema.read(stream)
            self._schemas[schema.id] = schema
        elif opcode == Opcode.METADATA:
            metadata = Metadata.read(stream)
            for key, value in metadata.metadata.items():
                self.contents.metadata[f"{metadata.name}.{key}"] = value
        else:
            channel = ChannelRecord.read(stream)
            if channel.id not in self.contents.channels:
                self.contents.channels[channel.id] = self._channel(channel)

    def _channel(self, channel: ChannelRecord) -> Channel:
        schema = self._schemas.get(channel.schema_id)
        name = schema.name if schema else ""
        package, _, rest = name.partition("/")
        return Channel(
            id=channel.id,
            topic=channel.topic,
            type=name if rest.startswith("msg/") or not rest else f"{package}/msg/{rest}",
            definition=schema.data.decode(errors="replace") if schema else "",
            definition_format=_FORMATS.get(schema.encoding, "") if schema else "",
            serialization=channel.message_encoding,
        )

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        return self._file.read(length)


def _decompress(packed: memoryview, compression: str, size: int) -> bytes:
    if compression == "lz4":
        return bytes(lz4.frame.decompress(packed))
    return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
