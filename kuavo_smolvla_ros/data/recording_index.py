"""The first pass over a recording: when every message of the robot's streams was stamped, and where it lies.

Nothing is decoded here; stamps are read from the first bytes, and pictures are told apart by a checksum.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.bag_storage import Channel
from kuavo_smolvla_ros.data.bag_types import decode, starts_with_header
from kuavo_smolvla_ros.data.bags import Bag, FilePlace
from kuavo_smolvla_ros.robot.description import RobotSpec, Stream
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.serialized import peek_stamp_ns, serialized_digest

Int64s = NDArray[np.int64]
_COLUMNS = 7  # receive time, stamp, digest, and the four numbers of a place
_ROS1_HEADER = struct.Struct("<III")  # sequence number, seconds, nanoseconds
MARKER_TYPE = "std_msgs/msg/String"


class Fault(NamedTuple):
    """A message whose stamp could not be read."""

    receive_ns: int
    sentence: str


@dataclass
class StreamRecord:
    """All messages of one stream in the order in which they were received."""

    stream: Stream
    channel: Channel | None = None
    other_types: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    fault_count: int = 0
    _rows: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self._rows) // _COLUMNS

    @property
    def receive_ns(self) -> Int64s:
        return self._column(0)

    @property
    def stamps_ns(self) -> Int64s:
        return self._column(1)

    @property
    def digests(self) -> Int64s:
        return self._column(2)

    @property
    def places(self) -> Int64s:
        """[n, 4], each row a `FilePlace`."""
        return self._table()[:, 3:]

    def place(self, position: int) -> FilePlace:
        return FilePlace(*self._table()[position, 3:].tolist())

    def add(self, receive_ns: int, stamp_ns: int, digest: int, place: FilePlace) -> None:
        self._rows.extend((receive_ns, stamp_ns, digest, *place))

    def add_fault(self, receive_ns: int, sentence: str) -> None:
        self.fault_count += 1
        if all(fault.sentence != sentence for fault in self.faults):
            self.faults.append(Fault(receive_ns, sentence))

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Forget the messages that are not chosen."""
        self._rows = array("q", np.ascontiguousarray(self._table()[chosen]).tobytes())

    def _table(self) -> Int64s:
        return np.frombuffer(self._rows, dtype=np.int64).reshape(-1, _COLUMNS)

    def _column(self, number: int) -> Int64s:
        return np.ascontiguousarray(self._table()[:, number])


@dataclass
class Marker:
    """Somebody said on the marker topic that an episode starts, stops, or is to be discarded."""

    receive_ns: int
    text: str


@dataclass
class RecordingIndex:
    streams: dict[str, StreamRecord]
    markers: list[Marker]
    start_ns: int | None  # of the recording: the first receive time


def used_streams(spec: RobotSpec) -> dict[str, Stream]:
    """All inputs, as the live robot watches them, and the commands that make up the action."""
    commands = {block.stream for block in spec.action}
    if spec.gap_rule is not None:
        commands.add(spec.gap_rule.stream)
    return {n: s for n, s in spec.streams.items() if s.direction == "in" or n in commands}


def index_recording(
    bag: Bag, spec: RobotSpec, receive_stamped: Iterable[str] = (), marker_topic: str | None = None
) -> RecordingIndex:
    """Walk the whole recording once."""
    by_receipt = set(receive_stamped)
    pictures = {camera.stream for camera in spec.cameras.values()}
    records = {name: StreamRecord(stream) for name, stream in used_streams(spec).items()}
    by_topic = {record.stream.topic: record for record in records.values()}
    index = RecordingIndex(records, [], None)
    takers: dict[tuple[int, int], tuple[StreamRecord, Callable[[memoryview], int] | None, bool] | None] = {}
    for message in bag.messages({*by_topic, *([marker_topic] if marker_topic else [])}):
        receive_ns, channel = message.receive_ns, message.channel
        if index.start_ns is None or receive_ns < index.start_ns:
            index.start_ns = receive_ns
        key = (message.place.file, channel.id)
        if key not in takers:
            record = by_topic.get(channel.topic)
            if record is None:
                takers[key] = None
            else:
                takers[key] = _taker(record, channel, by_receipt, pictures)
        taker = takers[key]
        if taker is None:
            if channel.topic == marker_topic and channel.type == MARKER_TYPE:
                index.markers.append(Marker(receive_ns, decode(channel, bytes(message.data)).data.strip()))
            continue
        record, peek, is_picture = taker
        try:
            stamp_ns = receive_ns if peek is None else peek(message.data)
        except MessageError as error:
            record.add_fault(receive_ns, str(error))
            continue
        digest = serialized_digest(message.data) if is_picture else 0
        record.add(receive_ns, stamp_ns, digest, message.place)
    for record in records.values():
        if record.channel is None:
            types = {channel.type for channel in bag.channels if channel.topic == record.stream.topic}
            record.other_types |= types - {record.stream.type}
    return index


def _taker(
    record: StreamRecord, channel: Channel, by_receipt: set[str], pictures: set[str]
) -> tuple[StreamRecord, Callable[[memoryview], int] | None, bool] | None:
    if channel.type != record.stream.type:
        record.other_types.add(channel.type)
        return None
    record.channel = record.channel or channel
    is_picture = record.stream.name in pictures
    if record.stream.stamp == "receive" or record.stream.name in by_receipt:
        return record, None, is_picture
    try:
        has_header = starts_with_header(channel)
    except MessageError as error:
        return record, _refuse(str(error)), is_picture
    if not has_header:
        return record, _refuse(f"{channel.type} does not begin with a header; use stamp: receive"), is_picture
    return record, peek_stamp_ns if channel.serialization == "cdr" else _peek_ros1, is_picture


def _refuse(sentence: str) -> Callable[[memoryview], int]:
    def peek(_: memoryview) -> int:
        raise MessageError(sentence)

    return peek


def _peek_ros1(data: memoryview) -> int:
    if len(data) < _ROS1_HEADER.size:
        raise MessageError(f"a serialized message of {len(data)} bytes is too short to hold a header")
    _, seconds, nanoseconds = _ROS1_HEADER.unpack_from(data)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
