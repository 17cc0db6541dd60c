"""Is a JPEG or PNG file whole? Read from its structure alone, before any decoder sees it.

Decoders forgive: depending on its version OpenCV turns a truncated JPEG into grey rows and says so on stderr
only. A policy cannot tell grey rows from a grey table, so a file that does not run to its end marker is
refused here. Damage *inside* the compressed data of a JPEG is beyond this check (a PNG carries checksums, a
JPEG does not).
"""

from __future__ import annotations

import re
import struct
import zlib

from kuavo_smolvla_ros.robot.fields import MessageError

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Frame headers; C4, C8 and CC in that range are tables, not frames.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Inside a scan FF is followed by 00 (a literal FF), by a restart marker or by fill; anything else ends the
# scan.
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class ImageError(MessageError):
    """A picture that is not what it says it is, or that cannot be shown as 8-bit colour."""


def jpeg_size(data: memoryview) -> tuple[int, int]:
    """(height, width) of a JPEG that is whole; a truncated or malformed one is an `ImageError`."""
    size: tuple[int, int] | None = None
    scans = 0
    position = 2
    while True:
        while bytes(data[position : position + 2]) == b"\xff\xff":
            position += 1
        if position + 2 > len(data):
            raise _truncated("JPEG", len(data), "no end-of-image marker")
        if data[position] != 0xFF:
            raise ImageError(f"corrupt JPEG: byte {position} is {data[position]:#04x} where a marker belongs")
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            break
        end = _segment_end(data, position)
        if marker in _FRAMES:
            size = _frame_size(data, position + 4, end)
        if marker == _START_OF_SCAN:
            scans += 1
            following = _AFTER_SCAN.search(data, end)
            if following is None:
                raise _truncated("JPEG", len(data), "no end-of-image marker")
            end = following.start()
        position = end
    if size is None or not scans:
        raise ImageError("corrupt JPEG: it ends before any picture data")
    return size


def png_size(data: memoryview) -> tuple[int, int]:
    """(height, width) of a PNG whose chunks are all there with matching checksums."""
    size: tuple[int, int] | None = None
    position = len(PNG_MAGIC)
    while True:
        if position + 12 > len(data):
            raise _truncated("PNG", len(data), "no IEND chunk")
        (length,) = struct.unpack_from(">I", data, position)
        kind = bytes(data[position + 4 : position + 8])
        end = position + 12 + length
        if end > len(data):
            raise _truncated("PNG", len(data), f"chunk {kind!r} reaches to byte {end}")
        if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ImageError(f"corrupt PNG: the checksum of chunk {kind!r} at byte {position} does not match")
        if kind == b"IHDR" and length >= 10:
            width, height, depth = struct.unpack_from(">IIB", data, position + 8)
            if depth == 16:
                raise ImageError("a 16-bit PNG holds depth or raw sensor values, not 8-bit colour")
            size = (height, width)
        if kind == b"IEND":
            break
        position = end
    if size is None:
        raise ImageError("corrupt PNG: it has no IHDR chunk")
    return size


def _segment_end(data: memoryview, position: int) -> int:
    if position + 4 > len(data):
        raise _truncated("JPEG", len(data), f"a segment begins at byte {position}")
    length = (data[position + 2] << 8) | data[position + 3]
    if length < 2:
        raise ImageError(f"corrupt JPEG: the segment at byte {position} gives its length as {length}")
    end = position + 2 + length
    if end > len(data):
        raise _truncated("JPEG", len(data), f"a segment reaches to byte {end}")
    return end


def _frame_size(data: memoryview, start: int, end: int) -> tuple[int, int]:
    if end - start < 6:
        raise ImageError("corrupt JPEG: its frame header is too short")
    precision, height, width = struct.unpack_from(">BHH", data, start)
    if precision != 8:
        raise ImageError(f"a JPEG of {precision} bits per sample is not 8-bit colour")
    return height, width


def _truncated(kind: str, length: int, why: str) -> ImageError:
    return ImageError(f"truncated {kind}: {why} within its {length} bytes")
