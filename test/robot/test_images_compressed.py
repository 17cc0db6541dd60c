"""JPEG and PNG: whole files decode to true colours; broken, deep and misnamed ones are refused."""

from __future__ import annotations

import array
import struct
import sys
import zlib
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage

from kuavo_smolvla_ros.robot.images import ImageError, decode_image, encode_jpeg, image_digest

ROS2 = get_typestore(Stores.ROS2_JAZZY).types


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture a JPEG keeps well, with clearly different channels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.dstack([x * 255 // width, y * 255 // height, np.full_like(x, 40)]).astype(np.uint8)


RGB = smooth()
JPEG = encode_jpeg(RGB)
PNG = bytes(cv2.imencode(".png", RGB[..., ::-1])[1])


def compressed(data: bytes, text: str = "jpeg") -> CompressedImage:
    return CompressedImage(format=text, data=array.array("B", data))


def off_by(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(
    "text",
    [
        "jpeg",
        "JPEG",
        "jpg",
        "rgb8; jpeg compressed bgr8",
        "bgr8; jpeg compressed bgr8",
        "rgb8; jpg compressed",
        "rgb8;jpeg compressed",
        "rgb8; jpeg compressed ",
        "bayer_rggb8; jpeg compressed bgr8",
        "yuv422_yuy2; jpeg compressed bgr8",
    ],
)
def test_jpeg_has_true_colours_whatever_its_format_is_called(text: str) -> None:
    decoded = decode_image(compressed(JPEG, text), height=48, width=64)
    assert decoded.flags.c_contiguous
    assert off_by(decoded, RGB) <= 8
    assert off_by(decoded, RGB[..., ::-1]) > 100


@pytest.mark.parametrize("text", ["png", "rgb8; png compressed bgr8", "rgb8; png compressed"])
def test_png_comes_back_exactly(text: str) -> None:
    assert np.array_equal(decode_image(compressed(PNG, text)), RGB)


def test_rosbags_messages_decode_to_the_same_pixels() -> None:
    time = ROS2["builtin_interfaces/msg/Time"](sec=0, nanosec=0)
    header = ROS2["std_msgs/msg/Header"](stamp=time, frame_id="")
    message = ROS2["sensor_msgs/msg/CompressedImage"](
        header=header, format="jpeg", data=np.frombuffer(JPEG, np.uint8)
    )
    assert np.array_equal(decode_image(message), decode_image(compressed(JPEG)))
    assert image_digest(message) == image_digest(compressed(JPEG))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100), st.integers(0, 255))
def test_any_size_and_quality_round_trips(height: int, width: int, quality: int, level: int) -> None:
    rgb = np.full((height, width, 3), level, np.uint8)
    decoded = decode_image(compressed(encode_jpeg(rgb, quality)), height=height, width=width)
    assert off_by(decoded, rgb) <= 4 + (100 - quality)  # a flat picture: only its level can be rounded


def test_quality_is_passed_on() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert len(encode_jpeg(noise, 30)) < len(encode_jpeg(noise, 95)) / 2


def test_progressive_grey_and_restart_markers_are_whole_too() -> None:
    def encoded(pixels: np.ndarray, *flags: int) -> CompressedImage:
        return compressed(bytes(cv2.imencode(".jpg", pixels, list(flags))[1]))

    grey = decode_image(encoded(RGB[..., 0]))
    assert off_by(grey, np.repeat(RGB[..., :1], 3, axis=2)) <= 8
    for flags in ((cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)):
        assert off_by(decode_image(encoded(RGB[..., ::-1], *flags)), RGB) <= 8


def test_padding_after_the_end_does_no_harm() -> None:
    assert np.array_equal(decode_image(compressed(JPEG + bytes(512))), decode_image(compressed(JPEG)))


def test_orientation_tag_does_not_turn_the_picture(tmp_path: Any) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Pillow.fromarray(RGB).save(path, exif=exif, quality=95)
    assert cv2.imread(str(path)).shape == (64, 48, 3)  # what OpenCV does on its own
    assert decode_image(compressed(path.read_bytes())).shape == (48, 64, 3)


@pytest.mark.parametrize("progressive", [0, 1])
def test_jpeg_cut_anywhere_is_refused(progressive: int) -> None:
    whole = bytes(cv2.imencode(".jpg", RGB, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])[1])
    for length in range(len(whole)):
        with pytest.raises(ImageError, match=r"truncated JPEG|holds no jpeg file"):
            decode_image(SimpleNamespace(format="jpeg", data=whole[:length]))


def test_png_cut_anywhere_is_refused() -> None:
    for length in range(len(PNG)):
        with pytest.raises(ImageError, match=r"truncated PNG|holds no png file"):
            decode_image(SimpleNamespace(format="png", data=PNG[:length]))


@given(st.integers(0, len(PNG) - 1), st.integers(1, 255))
def test_png_with_any_byte_changed_is_refused(at: int, flip: int) -> None:
    broken = bytearray(PNG)
    broken[at] ^= flip
    with pytest.raises(ImageError):
        decode_image(compressed(bytes(broken), "png"))


@given(st.binary(max_size=200))
def test_nothing_behind_a_magic_number_does_more_than_raise(rest: bytes) -> None:
    for magic, name in ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png")):
        with pytest.raises(ImageError):
            decode_image(compressed(magic + rest, name))


@given(st.integers(3, len(JPEG) - 1), st.integers(1, 255))
def test_jpeg_with_a_byte_changed_is_refused_or_keeps_its_size(at: int, flip: int) -> None:
    """A JPEG has no checksums: damage inside its scan cannot be told from a picture."""
    broken = bytearray(JPEG)
    broken[at] ^= flip
    try:
        decoded = decode_image(compressed(bytes(broken)), height=48, width=64)
    except ImageError:
        return
    assert decoded.shape == (48, 64, 3)


def test_a_small_file_that_claims_a_huge_picture_is_refused_unopened() -> None:
    at = JPEG.index(b"\xff\xc0") + 5
    bomb = JPEG[:at] + struct.pack(">HH", 65535, 65535) + JPEG[at + 4 :]
    with pytest.raises(ImageError, match="65535 x 65535 is more than"):
        decode_image(compressed(bomb))


def test_a_jpeg_of_no_height_is_refused() -> None:
    at = JPEG.index(b"\xff\xc0") + 5
    with pytest.raises(ImageError, match="height is 0"):
        decode_image(compressed(JPEG[:at] + bytes(2) + JPEG[at + 2 :]))


def test_size_is_held_against_the_description() -> None:
    for message in (compressed(JPEG), compressed(PNG, "png")):
        with pytest.raises(ImageError, match="head_image: width is 64, the robot description says 848"):
            decode_image(message, stream="head_image", height=48, width=848)


def test_deep_png_is_refused_as_colour() -> None:
    deep = bytes(cv2.imencode(".png", np.full((4, 5), 1500, np.uint16))[1])
    with pytest.raises(ImageError, match="16-bit PNG holds depth"):
        decode_image(compressed(deep, "png"))


def test_compressed_depth_is_refused_as_colour() -> None:
    deep = bytes(12) + bytes(cv2.imencode(".png", np.full((4, 5), 1500, np.uint16))[1])
    for text in ("16UC1; compressedDepth", "16UC1; compressedDepth png", "32FC1; compressedDepth png"):
        with pytest.raises(ImageError, match="a depth picture, which cannot be read as colour"):
            decode_image(compressed(deep, text))
    with pytest.raises(ImageError, match="depth or raw sensor values"):
        decode_image(compressed(deep, "16UC1; png compressed; znear=0.02; zfar=50"))
    with pytest.raises(ImageError, match=r"holds no png file .it begins with 00 00"):
        decode_image(compressed(deep, "png"))


@pytest.mark.parametrize(
    ("data", "text", "says"),
    [
        (PNG, "jpeg", "format is 'jpeg', but data holds no jpeg file .it begins with 89 50 4e 47"),
        (JPEG, "png", "holds no png file"),
        (b"", "jpeg", "begins with nothing"),
        (JPEG, "", "format is ''; known are jpeg and png"),
        (JPEG, "webp", "format is 'webp'"),
        (JPEG, "rgb8; tiff compressed bgr8", "known are"),
        (JPEG, "rgb8; jpeg", "known are"),
        (JPEG, "rgb8; jpeg compressed bgr8; extra", "known are"),
        (JPEG, "rgb8; jpeg compressed bgr8 extra", "known are"),
        (JPEG, "jpeg compressed", "known are"),
        (JPEG, "rgb8; ", "known are"),
        (JPEG, "rgb8; jpeg compressed rgb8", "red and blue may be exchanged"),
        (JPEG, "bgr16; jpeg compressed bgr8", "encoding 'bgr16' holds depth or raw"),
    ],
)
def test_format_must_fit_the_data(data: bytes, text: str, says: str) -> None:
    with pytest.raises(ImageError, match=f"wrist: .*{says}"):
        decode_image(compressed(data, text), stream="wrist")


def test_png_damage_is_named_by_chunk() -> None:
    at = PNG.index(b"IDAT")
    with pytest.raises(ImageError, match="checksum of chunk b'IDAT'"):
        decode_image(compressed(PNG[: at + 9] + b"\x00\x00" + PNG[at + 11 :], "png"))


def test_png_with_right_checksums_and_wrong_pixels_is_refused() -> None:
    at = PNG.index(b"IDAT")
    (length,) = struct.unpack(">I", PNG[at - 4 : at])
    body = b"IDAT" + b"\x00" * length
    wrong = PNG[:at] + body + struct.pack(">I", zlib.crc32(body)) + PNG[at + 4 + length + 4 :]
    with pytest.raises(ImageError, match="OpenCV cannot decode"):
        decode_image(compressed(wrong, "png"))


def test_missing_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    for act in (lambda: decode_image(compressed(JPEG)), lambda: encode_jpeg(RGB)):
        with pytest.raises(ImageError, match=r"needs OpenCV: pip install 'kuavo_smolvla_ros\[images\]'"):
            act()


@pytest.mark.parametrize(
    ("rgb", "quality", "says"),
    [
        (RGB[..., 0], 95, "a picture is"),
        (RGB.astype(np.float32), 95, "not .48, 64, 3. float32"),
        (RGB[:0], 95, "a picture is"),
        (np.dstack([RGB, RGB]), 95, "a picture is"),
        (RGB, 0, "quality 0 lies outside"),
        (RGB, 101, "quality 101 lies outside"),
    ],
)
def test_only_pictures_are_encoded(rgb: np.ndarray, quality: int, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        encode_jpeg(rgb, quality)


def test_payload_kinds_are_alike() -> None:
    kinds = (JPEG, bytearray(JPEG), memoryview(JPEG), np.frombuffer(JPEG, np.uint8), array.array("B", JPEG))
    first, *others = (decode_image(SimpleNamespace(format="jpeg", data=data)) for data in kinds)
    assert all(np.array_equal(first, other) for other in others)
