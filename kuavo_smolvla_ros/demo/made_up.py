"""A short made-up recording of the simulated robot's streams; needs no robot, no simulator and no ROS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kuavo_smolvla_ros.robot.description import RobotSpec

SECONDS = 3.0
TRANSPORT_S = 0.004  # between stamp and arrival
NS = 1_000_000_000
START_NS = 1_700_000_000 * NS


def write_bag(path: Path, spec: RobotSpec, seconds: float) -> None:
    """A rosbag2 (mcap) with every stream of the description at its own rate."""
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {
            s.name: writer.add_connection(s.topic, s.type, typestore=store) for s in spec.streams.values()
        }
        for stamp_ns, stream, message in sorted(_messages(spec, store, seconds), key=lambda item: item[0]):
            data = store.serialize_cdr(message, spec.streams[stream].type)
            writer.write(connections[stream], stamp_ns + round(TRANSPORT_S * NS), data)


def _messages(spec: RobotSpec, store: Any, seconds: float) -> Iterator[tuple[int, str, Any]]:
    from kuavo_smolvla_ros.robot.vectors import encode_action, encode_state

    types = store.types
    for stream in spec.streams.values():
        for tick in range(round(seconds * stream.rate_hz)):
            time_s = tick / stream.rate_hz
            stamp_ns = START_NS + round(time_s * NS)
            stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // NS, nanosec=stamp_ns % NS)
            header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="")
            if stream.type == "sensor_msgs/msg/CompressedImage":
                message = types[stream.type](header=header, format="jpeg", data=_picture(time_s))
            else:
                names = spec.state_names if stream.direction == "in" else spec.action_names
                encode = encode_state if stream.direction == "in" else encode_action
                fields = encode(spec, _swing(spec, names, time_s))[stream.name]
                message = _joint_state(types[stream.type], header, fields)
            yield stamp_ns, stream.name, message


def _swing(spec: RobotSpec, names: tuple[str, ...], time_s: float) -> Any:
    """Every joint swings gently around the middle of its range."""
    import numpy as np

    limits = spec.limits(names)
    middle, reach = (limits.lower + limits.upper) / 2, (limits.upper - limits.lower) / 2
    return middle + 0.2 * reach * np.sin(2 * np.pi * 0.25 * time_s)


def _joint_state(message_type: Any, header: Any, fields: dict[str, Any]) -> Any:
    import numpy as np

    empty = np.empty(0)
    position = np.array(fields["position"], dtype=np.float64)
    return message_type(
        header=header, name=list(fields["name"]), position=position, velocity=empty, effort=empty
    )


def _picture(time_s: float) -> Any:
    """A bright square that moves over a grey ground, as jpeg."""
    import numpy as np

    from kuavo_smolvla_ros.robot.images import encode_jpeg

    image = np.full((480, 640, 3), 90, np.uint8)
    left = round(80 + 120 * time_s)
    image[200:280, left : left + 80] = 230
    return np.frombuffer(encode_jpeg(image, 90), np.uint8)
