"""Recordings of known signals in every format, for tests, measurements and the demonstration.

Each joint follows a sine of its own, and each picture carries its number, so what comes out of a conversion
can be compared with what went in. A recording is a list of events that may be changed before it is written:
that is how tests make every defect a real recording has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Nodetype
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from kuavo_smolvla_ros.data.kuavo_messages import register_kuavo_messages
from kuavo_smolvla_ros.data.recording_index import used_streams
from kuavo_smolvla_ros.data.synthetic import TexturedFrames
from kuavo_smolvla_ros.robot.description import Block, Camera, RobotSpec, Stream
from kuavo_smolvla_ros.robot.images import encode_jpeg

NS_PER_S = 1_000_000_000
START_NS = 1_700_000_000 * NS_PER_S
TRANSPORT_NS = 4_000_000  # between stamp and arrival
WHOLE_BODY = 28  # joints in the robot's own state message
FORMATS = ("bag", "bag-lz4", "bag-bz2", "mcap", "mcap-zstd", "mcap-file", "sqlite3", "sqlite3-message")
_PATTERN = 30  # pictures made per camera; longer recordings repeat them, with numbers of their own

Signal = Callable[[tuple[str, ...], float], NDArray[np.float64]]


@dataclass
class Event:
    """A message on its way into a recording."""

    stream: str
    stamp_ns: int
    receive_ns: int
    message: Any


def light(spec: RobotSpec, height: int = 48, width: int = 64, state_hz: float = 100.0) -> RobotSpec:
    """The same robot with small cameras and states no faster than this: recordings of it are quickly made."""
    cameras = {role: replace(c, height=height, width=width) for role, c in spec.cameras.items()}
    streams = {n: replace(s, rate_hz=min(s.rate_hz, state_hz)) for n, s in spec.streams.items()}
    return replace(spec, cameras=cameras, streams=streams)


def type_store(is_ros1: bool) -> Typestore:
    return register_kuavo_messages(get_typestore(Stores.ROS1_NOETIC if is_ros1 else Stores.ROS2_JAZZY))


def sines(spec: RobotSpec) -> Signal:
    """Every joint swings around the middle of its range, with a frequency and phase of its own."""
    order = {name: number for number, name in enumerate(spec.joints)}

    def signal(names: tuple[str, ...], time_s: float) -> NDArray[np.float64]:
        limits = spec.limits(names)
        middle, reach = (limits.lower + limits.upper) / 2, (limits.upper - limits.lower) / 2
        at = np.array([order[name] for name in names])
        phase = 2 * np.pi * (0.15 + 0.02 * at) * time_s + at
        return np.asarray(middle + 0.3 * reach * np.sin(phase))

    return signal


def events(
    spec: RobotSpec,
    seconds: float,
    *,
    is_ros1: bool = False,
    start_ns: int = START_NS,
    signal: Signal | None = None,
    action_delay_s: float = 0.0,
    rates_hz: Mapping[str, float] | None = None,
) -> list[Event]:
    """All messages of a recording, ordered by stamp. The action is the state `action_delay_s` ahead."""
    store = type_store(is_ros1)
    signal = signal or sines(spec)
    pictures = {camera.stream: _pictures(camera) for camera in spec.cameras.values()}
    found: list[Event] = []
    for name, stream in used_streams(spec).items():
        rate = (rates_hz or {}).get(name, stream.rate_hz)
        for tick in range(round(seconds * rate)):
            time_s = tick / rate
            stamp_ns = start_ns + round(time_s * NS_PER_S)
            message = blank(store, stream.type)
            if name in pictures:
                message.format = "jpeg"
                message.data = pictures[name](tick)
            else:
                ahead = action_delay_s if stream.direction == "out" else 0.0
                blocks = spec.state if stream.direction == "in" else spec.action
                for block in blocks:
                    if block.stream == name:
                        set_block(message, block, signal(block.joints, time_s + ahead))
            set_stamp(message, stamp_ns)
            found.append(Event(name, stamp_ns, stamp_ns + TRANSPORT_NS, message))
    return sorted(found, key=lambda event: event.stamp_ns)


def _pictures(camera: Camera) -> Callable[[int], NDArray[np.uint8]]:
    """Picture number n of a camera as JPEG; made in runs, for a long recording needs thousands."""
    made: dict[int, NDArray[np.uint8]] = {}
    seed = sum(camera.name.encode())

    def picture(number: int) -> NDArray[np.uint8]:
        if number not in made:
            made.clear()
            run = TexturedFrames(_PATTERN, camera.height, camera.width, seed=seed, first_number=number)
            for offset, frame in enumerate(run):
                made[number + offset] = np.frombuffer(encode_jpeg(frame, 90), np.uint8)
        return made[number]

    return picture


def blank(store: Typestore, type_name: str) -> Any:
    """A message of zeros and empty sequences."""
    values = {}
    for name, (kind, detail) in store.fielddefs[type_name][1]:
        if kind == Nodetype.BASE:
            values[name] = {"string": "", "bool": False}.get(detail[0], 0)
        elif kind == Nodetype.NAME:
            values[name] = blank(store, detail)
        else:
            (item_kind, item), length = detail
            numeric = item_kind == Nodetype.BASE and item[0] not in ("string", "bool")
            values[name] = np.zeros(length or 0, dtype=item[0]) if numeric else []
    return store.types[type_name](**values)


def set_stamp(message: Any, stamp_ns: int) -> None:
    """Set the header's stamp, where the type has a header."""
    header = getattr(message, "header", None)
    if header is not None:
        header.stamp.sec, header.stamp.nanosec = divmod(stamp_ns, NS_PER_S)


def set_block(message: Any, block: Block, values: NDArray[np.float64]) -> None:
    """Write a block's joint values where `robot/vectors` reads them."""
    target = message
    for name in block.path.names[:-1]:
        target = getattr(target, name)
    last = block.path.names[-1]
    wire = block.unit.to_wire(values)
    if block.names_path is not None:
        names = message
        for name in block.names_path.names:
            names = getattr(names, name)
        names.extend(block.wire_names)
        setattr(target, last, np.concatenate([getattr(target, last), wire]))
    elif block.path.start is None or block.path.stop is None:
        setattr(target, last, float(wire[0]))
    else:
        there = getattr(target, last)
        size = max(len(there), WHOLE_BODY if last == "joint_q" else block.path.stop)
        array = np.zeros(size)
        array[: len(there)] = there
        array[block.path.start : block.path.stop] = wire
        setattr(target, last, array)


def write(
    path: Path,
    spec: RobotSpec,
    happened: Iterable[Event],
    layout: str = "mcap",
    *,
    custom_data: Mapping[str, str] | None = None,
    extra: Iterable[tuple[str, str, int, Any]] = (),
) -> Path:
    """Write events in the order of their receipt, in one of `FORMATS`; `extra` are (topic, type, time,
    message).
    """
    is_ros1 = layout.startswith("bag")
    store = type_store(is_ros1)
    streams: dict[str, Stream] = used_streams(spec)
    items = [(e.receive_ns, streams[e.stream].topic, streams[e.stream].type, e.message) for e in happened]
    items += [(time_ns, topic, type_name, message) for topic, type_name, time_ns, message in extra]
    items.sort(key=lambda item: item[0])
    serialize = store.serialize_ros1 if is_ros1 else store.serialize_cdr
    with _writer(path, layout, custom_data) as writer:
        connections: dict[tuple[str, str], Any] = {}
        for receive_ns, topic, type_name, message in items:
            key = topic, type_name
            if key not in connections:
                connections[key] = writer.add_connection(topic, type_name, typestore=store)
            data = message if isinstance(message, bytes) else serialize(message, type_name)
            writer.write(connections[key], receive_ns, data)
    return path


def _writer(path: Path, layout: str, custom_data: Mapping[str, str] | None) -> Any:
    kind, _, compression = layout.partition("-")
    if kind == "bag":
        writer1 = Writer1(path)
        if compression:
            writer1.set_compression(Writer1.CompressionFormat[compression.upper()])
        return writer1
    plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
    writer2 = Writer2(path, version=9, storage_plugin=plugin)
    modes = {
        "zstd": CompressionMode.STORAGE,
        "file": CompressionMode.FILE,
        "message": CompressionMode.MESSAGE,
    }
    if compression:
        writer2.set_compression(modes[compression], CompressionFormat.ZSTD)
    for key, value in (custom_data or {}).items():
        writer2.set_custom_data(key, value)
    return writer2


__all__ = ["FORMATS", "Event", "blank", "events", "light", "set_stamp", "sines", "type_store", "write"]
