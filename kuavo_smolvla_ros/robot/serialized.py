"""What can be read from a ROS 2 message without deserialising it: its header stamp, and whether it repeats.

A node that subscribes to raw bytes decodes only what it uses, yet must know the time of everything.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from kuavo_smolvla_ros.robot.fields import MessageError, field_names
from kuavo_smolvla_ros.robot.messages import NS_PER_S

_BYTE_ORDERS = {b"\x00\x00": ">", b"\x00\x01": "<"}
_AFTER_STAMP = 12  # four bytes of encapsulation, then header.stamp: int32 sec, uint32 nanosec


def starts_with_header(message: Any) -> bool:
    """Whether `peek_stamp_ns` may be used on messages of this one's type."""
    return field_names(message)[:1] == ["header"]


def peek_stamp_ns(serialized: bytes | memoryview) -> int:
    """The header stamp of a serialized message whose first field is its header."""
    if len(serialized) < _AFTER_STAMP:
        raise MessageError(f"a serialized message of {len(serialized)} bytes is too short to hold a header")
    order = _BYTE_ORDERS.get(bytes(serialized[:2]))
    if order is None:
        raise MessageError(f"the serialization {bytes(serialized[:2]).hex(' ')} is not plain CDR")
    sec, nanosec = struct.unpack_from(f"{order}iI", serialized, 4)
    if nanosec >= NS_PER_S:
        raise MessageError(f"the header stamp has {nanosec} nanoseconds, a second or more")
    return int(sec) * NS_PER_S + int(nanosec)


def serialized_digest(serialized: bytes | memoryview) -> int:
    """A checksum of all but the stamp, as `images.image_digest` is one of a message's picture."""
    return zlib.crc32(memoryview(serialized)[_AFTER_STAMP:])
