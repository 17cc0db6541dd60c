"""Stamps and digests read from serialized bytes agree with the deserialised message."""

from __future__ import annotations

import array
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64
from trajectory_msgs.msg import JointTrajectory

from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.messages import set_fields, stamp_fields, stamp_ns
from kuavo_smolvla_ros.robot.serialized import peek_stamp_ns, serialized_digest, starts_with_header

STAMPS = st.integers(0, (2**31 - 1) * 10**9 + 999_999_999)


@pytest.mark.parametrize("kind", [Image, CompressedImage, JointState, JointTrajectory])
@given(stamp=STAMPS, frame=st.text("abc/_", max_size=9))
def test_stamp_of_rclpys_bytes(kind: type, stamp: int, frame: str) -> None:
    message = set_fields(kind(), {**stamp_fields(stamp), "header.frame_id": frame})
    assert starts_with_header(message)
    assert peek_stamp_ns(serialize_message(message)) == stamp_ns(message) == stamp


@given(STAMPS, st.booleans())
def test_stamp_of_rosbags_bytes_in_both_byte_orders(stamp: int, little: bool) -> None:
    store = get_typestore(Stores.ROS2_JAZZY)
    time = store.types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
    header = store.types["std_msgs/msg/Header"](stamp=time, frame_id="x")
    range_type = store.types["sensor_msgs/msg/FluidPressure"]
    message = range_type(header=header, fluid_pressure=1.0, variance=0.0)
    raw = store.serialize_cdr(message, range_type.__msgtype__, little_endian=little)
    assert peek_stamp_ns(raw) == stamp


@given(st.binary(max_size=50), STAMPS, STAMPS)
def test_digest_leaves_the_stamp_out(data: bytes, first: int, second: int) -> None:
    message = CompressedImage(format="jpeg", data=array.array("B", data))
    one = serialize_message(set_fields(message, stamp_fields(first)))
    two = serialize_message(set_fields(message, stamp_fields(second)))
    assert serialized_digest(one) == serialized_digest(two)
    other = CompressedImage(format="jpeg", data=array.array("B", [*data, 1]))
    assert serialized_digest(serialize_message(other)) != serialized_digest(one)


def test_a_message_without_header_is_known_as_such() -> None:
    assert not starts_with_header(Float64())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "0 bytes is too short"),
        (bytes(11), "11 bytes is too short"),
        (b"\x00\x03" + bytes(30), "serialization 00 03 is not plain CDR"),
        (struct.pack("<4sII", b"\x00\x01\x00\x00", 5, 10**9), "1000000000 nanoseconds, a second or more"),
    ],
)
def test_bytes_that_are_no_header_are_refused(raw: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        peek_stamp_ns(raw)
