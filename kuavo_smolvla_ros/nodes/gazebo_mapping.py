"""Which topic of Gazebo is which of the robot: the list for ros_gz_bridge, from the robot description."""

from __future__ import annotations

from typing import NamedTuple

import yaml

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.description import RobotSpec, Stream

WORLD = "kuavo"
MODEL = "kuavo"
CLOCK = "/clock"

# The pairs of types that ros_gz_bridge translates, as far as a robot description may need them.
GAZEBO_TYPES = {
    "sensor_msgs/msg/JointState": "gz.msgs.Model",
    "sensor_msgs/msg/Image": "gz.msgs.Image",
    "std_msgs/msg/Float64": "gz.msgs.Double",
    "geometry_msgs/msg/Twist": "gz.msgs.Twist",
    "nav_msgs/msg/Odometry": "gz.msgs.Odometry",
    "rosgraph_msgs/msg/Clock": "gz.msgs.Clock",
}

HEADER = """\
# Which topic of Gazebo is which topic of the robot, for ros_gz_bridge. Written from the robot description
# '{robot}' by: python -m kuavo_smolvla_ros.nodes.gazebo_files
"""


class Bridged(NamedTuple):
    """One entry of ros_gz_bridge's configuration, under its own keys."""

    ros_topic_name: str
    gz_topic_name: str
    ros_type_name: str
    gz_type_name: str
    direction: str


def mapping(spec: RobotSpec) -> tuple[Bridged, ...]:
    """The clock, and every stream of the robot, in the description's order."""
    clock = Bridged(CLOCK, f"/world/{WORLD}/clock", "rosgraph_msgs/msg/Clock", "gz.msgs.Clock", "GZ_TO_ROS")
    return (clock, *(_bridged(stream) for stream in spec.streams.values()))


def gazebo_topic(stream: Stream) -> str:
    """Where Gazebo says or hears it; it chooses the name of the joint states itself."""
    if stream.type == "sensor_msgs/msg/JointState":
        return f"/world/{WORLD}/model/{MODEL}/joint_state"
    return stream.topic


def as_yaml(spec: RobotSpec) -> str:
    """The file that the bridge reads."""
    entries = [entry._asdict() for entry in mapping(spec)]
    return HEADER.format(robot=spec.name) + yaml.safe_dump(entries, sort_keys=False)


def _bridged(stream: Stream) -> Bridged:
    if stream.type not in GAZEBO_TYPES or (stream.type.endswith("JointState") and stream.direction == "out"):
        raise UserError(
            f"stream '{stream.name}': ros_gz_bridge cannot take {stream.type} {stream.direction} of Gazebo; "
            "use a robot description made for it, such as kuavo_gazebo"
        )
    direction = "GZ_TO_ROS" if stream.direction == "in" else "ROS_TO_GZ"
    return Bridged(stream.topic, gazebo_topic(stream), stream.type, GAZEBO_TYPES[stream.type], direction)
