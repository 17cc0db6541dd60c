"""Uncompressed pictures: every encoding, padding and message library, and what is refused."""

from __future__ import annotations

import array
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.images import ImageError, decode_image, image_digest

ROS2 = get_typestore(Stores.ROS2_JAZZY).types
ROS1 = get_typestore(Stores.ROS1_NOETIC).types

# How a picture is packed under each name, written out independently of the decoder.
PACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rgb8": lambda rgb: rgb,
    "bgr8": lambda rgb: rgb[..., ::-1],
    "8UC3": lambda rgb: rgb[..., ::-1],
    "rgba8": lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 9, np.uint8)]),
    "bgra8": lambda rgb: np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 9, np.uint8)]),
    "8UC4": lambda rgb: np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 9, np.uint8)]),
}
# The colour (0 red, 1 green, 2 blue) of the four corner pixels, as REP-118's names spell them.
MOSAICS = {"rggb": (0, 1, 1, 2), "bggr": (2, 1, 1, 0), "gbrg": (1, 2, 0, 1), "grbg": (1, 0, 2, 1)}

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def rows_of(pixels: np.ndarray, padding: int) -> bytes:
    flat = pixels.reshape(pixels.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, padding)), constant_values=0xAB).tobytes()


def fields(encoding: str, pixels: np.ndarray, padding: int = 0) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    step = pixels[0].size + padding
    return {
        "height": height,
        "width": width,
        "encoding": encoding,
        "step": step,
        "data": rows_of(pixels, padding),
    }


def from_rclpy(f: dict[str, Any]) -> Image:
    return Image(**{**f, "data": array.array("B", f["data"])})


def from_rosbags(types: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    def build(f: dict[str, Any]) -> Any:
        time = types["builtin_interfaces/msg/Time"](sec=0, nanosec=0)
        header = types["std_msgs/msg/Header"](
            **{"stamp": time, "frame_id": ""} | ({"seq": 0} if types is ROS1 else {})
        )
        data = np.frombuffer(f["data"], np.uint8)
        return types["sensor_msgs/msg/Image"](**{**f, "header": header, "is_bigendian": 0, "data": data})

    return build


LIBRARIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rclpy": from_rclpy,
    "rosbags ros2": from_rosbags(ROS2),
    "rosbags ros1": from_rosbags(ROS1),
    "bytes": lambda f: SimpleNamespace(**f),
    "memoryview": lambda f: SimpleNamespace(**{**f, "data": memoryview(f["data"])}),
}


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(sizes)
    data = draw(st.binary(min_size=height * width * 3, max_size=height * width * 3))
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("encoding", PACK)
@given(rgb=pictures(), padding=st.integers(0, 7))
def test_packed_colour_comes_back_exactly(encoding: str, library: str, rgb: np.ndarray, padding: int) -> None:
    decoded = decode_image(LIBRARIES[library](fields(encoding, PACK[encoding](rgb), padding)))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, rgb)


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
@given(rgb=pictures(), padding=st.integers(0, 7))
def test_grey_becomes_three_equal_channels(encoding: str, rgb: np.ndarray, padding: int) -> None:
    grey = rgb[..., 0]
    decoded = decode_image(from_rclpy(fields(encoding, grey, padding)))
    assert np.array_equal(decoded, np.dstack([grey, grey, grey]))


@pytest.mark.parametrize("encoding", [*PACK, "mono8"])
def test_result_is_the_callers_own(encoding: str) -> None:
    pixels = (
        np.zeros((4, 5), np.uint8) if encoding == "mono8" else PACK[encoding](np.zeros((4, 5, 3), np.uint8))
    )
    message = from_rclpy(fields(encoding, pixels, 2))
    decoded = decode_image(message)
    decoded[:] = 255
    assert decoded.flags.c_contiguous
    assert decoded.flags.owndata
    assert set(message.data) <= {0, 0xAB, 9}


@pytest.mark.parametrize("name", MOSAICS)
@pytest.mark.parametrize("colour", [(200, 0, 0), (0, 200, 0), (0, 0, 200), (10, 90, 170)])
@pytest.mark.parametrize("padding", [0, 3])
def test_bayer_names_mean_what_ros_means(name: str, colour: tuple[int, int, int], padding: int) -> None:
    """OpenCV's old constants are named from another pixel: a swap of red and blue is what would go wrong."""
    mosaic = np.empty((8, 10), np.uint8)
    for corner, channel in enumerate(MOSAICS[name]):
        mosaic[corner // 2 :: 2, corner % 2 :: 2] = colour[channel]
    decoded = decode_image(from_rclpy(fields(f"bayer_{name}8", mosaic, padding)))
    assert np.array_equal(decoded, np.broadcast_to(np.array(colour, np.uint8), (8, 10, 3)))
    assert decoded.flags.c_contiguous


def test_bayer_too_small_to_interpolate_is_refused() -> None:
    assert not cv2.cvtColor(np.full((2, 6), 77, np.uint8), cv2.COLOR_BayerRGGB2RGB).any()  # black, silently
    with pytest.raises(ImageError, match="too small to interpolate"):
        decode_image(from_rclpy(fields("bayer_rggb8", np.full((2, 6), 77, np.uint8))))


def test_byte_order_flag_changes_nothing_for_bytes() -> None:
    rgb = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    message = from_rclpy(fields("rgb8", rgb))
    message.is_bigendian = 1
    assert np.array_equal(decode_image(message), rgb)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 14}, "step is 14 bytes, but a row of 5 rgb8 pixels needs 15"),
        ({"step": 0}, "step is 0 bytes"),
        ({"step": 16}, "truncated: 60 bytes where step 16 x height 4 = 64"),
        ({"data": bytes(59)}, "truncated: 59 bytes where step 15 x height 4 = 60"),
        ({"data": b""}, "truncated: 0 bytes"),
        ({"data": bytes(61)}, "too long: 61 bytes"),
        ({"height": 5}, "truncated"),
        ({"height": 3}, "too long"),
        ({"width": 0}, "width is 0"),
        ({"height": 0, "data": b""}, "height is 0"),
        ({"width": 2**31, "height": 2**31, "step": 2**33}, "more than .* pixels"),
        ({"encoding": "rgb9"}, "encoding 'rgb9' is unknown; known are rgb8, bgr8"),
        ({"encoding": ""}, "encoding '' is unknown"),
        ({"encoding": "yuv422"}, "encoding 'yuv422' is unknown"),
        ({"encoding": "rgb16"}, "depth or raw sensor values, not 8-bit colour"),
        ({"encoding": "mono16"}, "not 8-bit colour"),
        ({"encoding": "16UC1"}, "not 8-bit colour"),
        ({"encoding": "32FC1"}, "not 8-bit colour"),
        ({"encoding": "bayer_rggb16"}, "not 8-bit colour"),
        ({"data": [0] * 60}, "data is a list, not bytes"),
        ({"data": None}, "data is a NoneType"),
        ({"data": array.array("H", [0] * 30)}, "items of kind 'H' where unsigned bytes belong"),
        ({"data": np.zeros(60, np.int8)}, "items of kind 'b'"),
        ({"data": np.zeros(120, np.uint8)[::2]}, "items of kind"),
    ],
)
def test_what_cannot_be_a_picture_is_refused(change: dict[str, Any], says: str) -> None:
    good = fields("rgb8", np.zeros((4, 5, 3), np.uint8))
    decode_image(SimpleNamespace(**good))
    with pytest.raises(ImageError, match=says) as caught:
        decode_image(SimpleNamespace(**{**good, **change}), stream="head_image")
    assert str(caught.value).startswith("head_image: ")
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, MessageError)


def test_size_is_held_against_the_description() -> None:
    message = from_rclpy(fields("rgb8", np.zeros((4, 5, 3), np.uint8)))
    assert decode_image(message, height=4, width=5).shape == (4, 5, 3)
    with pytest.raises(ImageError, match="height is 4, the robot description says 480"):
        decode_image(message, height=480, width=5)
    with pytest.raises(ImageError, match="width is 5, the robot description says 640"):
        decode_image(message, width=640)


def test_other_messages_are_named() -> None:
    with pytest.raises(ImageError, match="head_image: JointState is neither an Image nor a CompressedImage"):
        decode_image(JointState(), stream="head_image")


@pytest.mark.parametrize("encoding", [*PACK, "mono8"])
def test_packed_pictures_need_no_opencv(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    pixels = (
        np.zeros((4, 5), np.uint8) if encoding == "mono8" else PACK[encoding](np.zeros((4, 5, 3), np.uint8))
    )
    assert decode_image(from_rclpy(fields(encoding, pixels))).shape == (4, 5, 3)


def test_missing_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        ImageError, match=r"bayer_rggb8 needs OpenCV: pip install 'kuavo_smolvla_ros\[images\]'"
    ):
        decode_image(from_rclpy(fields("bayer_rggb8", np.zeros((4, 6), np.uint8))))


@given(rgb=pictures(), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_digest_sees_every_bit_and_no_stamp(rgb: np.ndarray, at: int, bit: int) -> None:
    before = fields("rgb8", rgb)
    data = bytearray(before["data"])
    data[at % len(data)] ^= 1 << bit
    same, other = from_rclpy(before), from_rclpy({**before, "data": bytes(data)})
    same.header = Header(frame_id="later")
    same.header.stamp.sec = 7
    assert image_digest(from_rclpy(before)) == image_digest(same) == image_digest(from_rosbags(ROS2)(before))
    assert image_digest(same) != image_digest(other)
