"""Image and CompressedImage messages, of rclpy or of rosbags, become (H, W, 3) uint8 RGB.

The result is always the caller's own memory: contiguous, writable, independent of the message. What is not
8-bit colour or grey (depth, 16-bit, infrared) is refused rather than squeezed into a picture.
"""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kuavo_smolvla_ros.robot.image_files import JPEG_MAGIC, PNG_MAGIC, ImageError, jpeg_size, png_size

__all__ = [
    "ImageError",
    "cv_bridge_obstacle",
    "decode_image",
    "encode_jpeg",
    "image_digest",
]

Picture = npt.NDArray[np.uint8]

# Bytes per pixel, and which of them are red, green and blue. 8UCn name no colours: they are OpenCV's own
# names, so OpenCV's order (blue first) is meant, and one channel is grey.
_PACKED = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC1": (1, (0, 0, 0)),
    "8UC3": (3, (2, 1, 0)),
    "8UC4": (4, (2, 1, 0)),
}
# ROS names a mosaic by its first two rows read from the corner. OpenCV's older constants name it from the
# second row and column (its BayerBG is rggb), so its newer ones, which read as ROS does, are used.
_MOSAICS = {
    "bayer_rggb8": "COLOR_BayerRGGB2RGB",
    "bayer_bggr8": "COLOR_BayerBGGR2RGB",
    "bayer_gbrg8": "COLOR_BayerGBRG2RGB",
    "bayer_grbg8": "COLOR_BayerGRBG2RGB",
}
_SMALLEST_MOSAIC = 3  # OpenCV returns black, without a word, where there are fewer rows or columns

_CODECS: dict[str, tuple[bytes, Callable[[memoryview], tuple[int, int]]]] = {
    "jpeg": (JPEG_MAGIC, jpeg_size),
    "png": (PNG_MAGIC, png_size),
}
_CODEC_NAMES = {"jpeg": "jpeg", "jpg": "jpeg", "png": "png"}
# A header may claim 65535 x 65535 in a few bytes; four times a 4K picture is more than any camera here.
_MOST_PIXELS = 4 * 3840 * 2160


def decode_image(
    message: Any,
    *,
    stream: str = "image",
    height: int | None = None,
    width: int | None = None,
    via_cv_bridge: bool = False,
) -> Picture:
    """The picture in an Image or CompressedImage message; `stream` is how errors call it.

    Where `height` and `width` are given, another size is an error. `via_cv_bridge` lets the robot's cv_bridge
    convert (the same pixels; for comparing), and is refused where it would crash.
    """
    try:
        decode = _decode_raw if _is_raw(message) else _decode_compressed
        return decode(message, (height, width), via_cv_bridge)
    except ImageError as error:
        raise ImageError(f"{stream}: {error}") from None


def encode_jpeg(rgb: Picture, quality: int = 95) -> bytes:
    """An (H, W, 3) RGB picture as a JPEG file."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise ImageError(f"a picture is (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
    if not 1 <= quality <= 100:
        raise ImageError(f"jpeg quality {quality} lies outside 1..100")
    cv2 = _opencv("encoding jpeg")
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ImageError(f"OpenCV could not encode a picture of shape {rgb.shape} as jpeg")
    return bytes(data)


def image_digest(message: Any) -> int:
    """A checksum of the picture's bytes, stamp left out: two of a kind in a row are one frame sent twice."""
    return zlib.crc32(_payload(message))


def cv_bridge_obstacle(numpy_version: str = np.__version__) -> str | None:
    """Why cv_bridge must not be imported here, or None.

    Asked before the import: a cv_bridge built against NumPy 1 imports under NumPy 2, and its first conversion
    kills the process.
    """
    if int(numpy_version.split(".")[0]) >= 2:
        return f"cv_bridge crashes under NumPy {numpy_version}; it needs NumPy below 2"
    if importlib.util.find_spec("cv_bridge") is None:
        return "cv_bridge is not installed"
    return None


def _is_raw(message: Any) -> bool:
    if hasattr(message, "encoding"):
        return True
    if hasattr(message, "format"):
        return False
    raise ImageError(f"{type(message).__name__} is neither an Image nor a CompressedImage")


def _decode_raw(message: Any, expected: tuple[int | None, int | None], via_cv_bridge: bool) -> Picture:
    encoding: str = message.encoding
    height, width, step = int(message.height), int(message.width), int(message.step)
    _check_size((height, width), expected)
    if encoding not in _PACKED and encoding not in _MOSAICS:
        raise ImageError(_why_not(encoding))
    channels = _PACKED[encoding][0] if encoding in _PACKED else 1
    if step < width * channels:
        raise ImageError(
            f"step is {step} bytes, but a row of {width} {encoding} pixels needs {width * channels}"
        )
    data = _payload(message)
    if len(data) != step * height:
        state = "truncated" if len(data) < step * height else "too long"
        raise ImageError(
            f"data is {state}: {len(data)} bytes where step {step} x height {height} = {step * height}"
        )
    if via_cv_bridge:
        return _ask_cv_bridge(message, "imgmsg_to_cv2")
    rows = np.frombuffer(data, np.uint8).reshape(height, step)[:, : width * channels]
    if encoding in _MOSAICS:
        return _demosaic(rows, encoding)
    return _pick(rows.reshape(height, width, channels), _PACKED[encoding][1])


def _decode_compressed(message: Any, expected: tuple[int | None, int | None], via_cv_bridge: bool) -> Picture:
    codec = _codec(message.format)
    data = _payload(message)
    magic, measure = _CODECS[codec]
    if data[: len(magic)] != magic:
        begins = bytes(data[:8]).hex(" ") or "nothing"
        raise ImageError(
            f"format is '{message.format}', but data holds no {codec} file (it begins with {begins})"
        )
    size = measure(data)
    _check_size(size, expected)
    if via_cv_bridge:
        return _ask_cv_bridge(message, "compressed_imgmsg_to_cv2")
    cv2 = _opencv(f"decoding {codec}")
    # Without IGNORE_ORIENTATION an EXIF tag would silently turn the picture.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"corrupt {codec}: OpenCV says {error}") from None
    if bgr is None:
        raise ImageError(f"corrupt {codec}: OpenCV cannot decode its {len(data)} bytes")
    if bgr.shape[:2] != size:
        raise ImageError(f"corrupt {codec}: its header says {size}, the picture is {bgr.shape[:2]}")
    rgb: Picture = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return rgb


def _codec(text: str) -> str:
    """'jpeg', 'png', 'rgb8; jpeg compressed bgr8' or 'rgb8; jpg compressed' -> the codec.

    The first word of the long form is the picture's encoding before compression, the last one its channel
    order as the encoder was given it. Only blue-first gives a file with true colours.
    """
    if "compresseddepth" in text.lower():
        raise ImageError(f"format is '{text}': a depth picture, which cannot be read as colour")
    source, *described = (part.strip() for part in text.split(";"))
    if described and _is_deep(source):
        raise ImageError(f"format is '{text}': {_why_not(source)}")
    words = (described[0] if described else source).split()
    well_formed = words[1:2] == ["compressed"] and len(words) <= 3 if described else len(words) == 1
    if not well_formed or len(described) > 1 or words[0].lower() not in _CODEC_NAMES:
        raise ImageError(
            f"format is '{text}'; known are jpeg and png, alone or as 'rgb8; jpeg compressed bgr8'"
        )
    if words[2:] and words[2] not in ("bgr8", "mono8", "8UC1", "8UC3"):
        raise ImageError(f"format is '{text}': red and blue may be exchanged; it should end in bgr8 or mono8")
    return _CODEC_NAMES[words[0].lower()]


def _is_deep(encoding: str) -> bool:
    return encoding.endswith("16") or encoding[:2] in ("16", "32", "64")


def _why_not(encoding: str) -> str:
    known = ", ".join((*_PACKED, *_MOSAICS))
    if _is_deep(encoding):
        return f"encoding '{encoding}' holds depth or raw sensor values, not 8-bit colour; known are {known}"
    return f"encoding '{encoding}' is unknown; known are {known}"


def _check_size(found: tuple[int, int], expected: tuple[int | None, int | None]) -> None:
    for name, size, wanted in zip(("height", "width"), found, expected, strict=True):
        if size < 1:
            raise ImageError(f"{name} is {size}")
        if wanted is not None and size != wanted:
            raise ImageError(f"{name} is {size}, the robot description says {wanted}")
    if found[0] * found[1] > _MOST_PIXELS:
        raise ImageError(f"{found[1]} x {found[0]} is more than {_MOST_PIXELS} pixels")


def _payload(message: Any) -> memoryview:
    data = message.data
    try:
        view = memoryview(data)
    except TypeError:
        raise ImageError(f"data is a {type(data).__name__}, not bytes") from None
    if view.format != "B" or not view.c_contiguous:
        raise ImageError(f"data holds items of kind '{view.format}' where unsigned bytes belong")
    return view.cast("B")


def _pick(pixels: Picture, order: tuple[int, int, int]) -> Picture:
    if pixels.shape[2] == 3 and order == (0, 1, 2):
        return np.array(pixels)
    # Plane by plane: four times faster than a reversed view made contiguous.
    rgb = np.empty((*pixels.shape[:2], 3), np.uint8)
    for target, source in enumerate(order):
        rgb[..., target] = pixels[..., source]
    return rgb


def _demosaic(mosaic: Picture, encoding: str) -> Picture:
    if min(mosaic.shape) < _SMALLEST_MOSAIC:
        raise ImageError(f"a {encoding} picture of {mosaic.shape} is too small to interpolate")
    cv2 = _opencv(f"decoding {encoding}")
    rgb: Picture = cv2.cvtColor(np.ascontiguousarray(mosaic), getattr(cv2, _MOSAICS[encoding]))
    return rgb


def _ask_cv_bridge(message: Any, method: str) -> Picture:
    obstacle = cv_bridge_obstacle()
    if obstacle is not None:
        raise ImageError(obstacle)
    bridge = importlib.import_module("cv_bridge").CvBridge()
    rgb: Picture = np.array(getattr(bridge, method)(message, "rgb8"))
    return rgb


def _opencv(purpose: str) -> Any:
    """OpenCV is the room's only optional dependency; uncompressed packed pictures do without it."""
    try:
        import cv2
    except ImportError:
        raise ImageError(f"{purpose} needs OpenCV: pip install 'kuavo_smolvla_ros[images]'") from None
    return cv2
