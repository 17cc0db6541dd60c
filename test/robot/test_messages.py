"""Fields are set by declared type or not at all."""

from __future__ import annotations

import array
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float32, Float64, Int32, String, UInt8
from std_srvs.srv import SetBool
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from kuavo_smolvla_ros.robot.fields import FieldPath, MessageError
from kuavo_smolvla_ros.robot.messages import build, set_fields, stamp_fields, stamp_ns


@given(
    st.one_of(st.integers(-(2**50), 2**50), st.floats(allow_nan=False), st.floats(width=32).map(np.float32))
)
def test_any_number_becomes_a_float64_that_survives_the_wire(value: float) -> None:
    """The fault this guards against: Float64(data=1) arrives as 5e-324."""
    message = build(Float64, {"data": value})
    back = deserialize_message(serialize_message(message), Float64)
    assert back.data == float(value) or (math.isnan(back.data) and math.isnan(value))


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (Float64, "1.0", "not a number"),
        (Float64, True, "not a number"),
        (Float64, [1.0], "not a number"),
        (Float64, None, "not a number"),
        (Float32, 1e39, "does not fit in 32 bits"),
        (UInt8, 300, r"300 lies outside 0\.\.255"),
        (UInt8, -1, r"-1 lies outside 0\.\.255"),
        (Int32, 1.7, "not a whole number"),
        (Int32, 2**31, "lies outside"),
        (Int32, True, "not a whole number"),
        (Bool, 1, "neither true nor false"),
        (String, 5, "not text"),
        (String, b"x", "not text"),
    ],
)
def test_value_of_another_kind_is_refused(kind: type, value: object, says: str) -> None:
    with pytest.raises(MessageError, match=f"data: .*{says}"):
        build(kind, {"data": value})


def test_misspelt_field_lists_the_real_ones() -> None:
    with pytest.raises(
        MessageError, match=r"JointState has no field 'positions'; it has header, name, position"
    ):
        build(JointState, {"positions": [1.0]})


def test_nested_field_that_is_not_there_is_named() -> None:
    with pytest.raises(MessageError, match=r"Header has no field 'stamps'"):
        build(JointState, {"header.stamps.sec": 1})


def test_something_that_is_no_message_is_refused() -> None:
    with pytest.raises(MessageError, match="not a ROS message"):
        set_fields(object(), {"data": 1})


@pytest.mark.parametrize(
    "values", [[1, 2], (1.0, 2.0), np.array([1, 2]), np.array([1, 2], np.float32), array.array("d", [1, 2])]
)
def test_sequences_of_any_kind_become_float64(values: object) -> None:
    message = build(JointState, {"position": values})
    assert deserialize_message(serialize_message(message), JointState).position.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("values", [["a"], "ab", {1: 2}, 3.0, [True]])
def test_sequences_of_something_else_are_refused(values: object) -> None:
    with pytest.raises(MessageError, match="position"):
        build(JointState, {"position": values})


@pytest.mark.parametrize(
    "data", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff"), np.array([0, 255], np.uint8)]
)
def test_bytes_of_any_kind_become_image_data(data: object) -> None:
    for kind in (Image, CompressedImage):
        assert bytes(build(kind, {"data": data}).data) == b"\x00\xff"


def test_fixed_array_of_wrong_length_is_refused() -> None:
    assert build(CameraInfo, {"k": list(range(9))}).k.tolist() == list(range(9))
    with pytest.raises(MessageError, match=r"k: 8 values for double\[9\]"):
        build(CameraInfo, {"k": list(range(8))})


def test_services_and_nested_messages_are_filled_too() -> None:
    assert build(SetBool.Request, {"data": np.True_}).data is True
    point = build(JointTrajectoryPoint, {"positions": [1], "time_from_start.nanosec": 5})
    trajectory = build(JointTrajectory, {"joint_names": ["a"], "points": [point]})
    back = deserialize_message(serialize_message(trajectory), JointTrajectory)
    assert back.points[0].positions.tolist() == [1.0]


@given(st.integers(0, 2**31 * 1_000_000_000 - 1))
def test_stamps_round_trip_to_the_nanosecond(stamp: int) -> None:
    assert stamp_ns(build(JointState, stamp_fields(stamp))) == stamp


def test_time_before_the_epoch_is_refused() -> None:
    with pytest.raises(MessageError, match="before the epoch"):
        stamp_fields(-1)


def test_message_without_header_has_no_time() -> None:
    with pytest.raises(MessageError, match="Bool has no header"):
        stamp_ns(Bool())


@pytest.mark.parametrize(
    "text",
    ["", "1a", "a.", ".a", "a[", "a[1:]", "a[:1]", "a[2:2]", "a[3:1]", "a[-1]", "a[0][1]", "a b", "a[0].b"],
)
def test_text_that_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        FieldPath.parse(text)


@given(
    st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=4),
    st.integers(0, 50),
    st.integers(1, 20),
)
def test_paths_say_themselves(names: list[str], start: int, width: int) -> None:
    path = FieldPath.parse(f"{'.'.join(names)}[{start}:{start + width}]")
    assert FieldPath.parse(str(path)) == path
    assert path.width == width


def test_text_where_numbers_should_be_is_refused() -> None:
    with pytest.raises(MessageError, match="does not hold numbers"):
        FieldPath.parse("name").numbers(build(JointState, {"name": ["a"]}))
