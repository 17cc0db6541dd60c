"""Setting message fields without surprises, and reading stamps, on messages of any library.

rclpy's generated setters do not check types unless told to: a Float64 given an int publishes garbage, a typo
in a keyword is ignored. Everything the package publishes goes through `set_fields`, which converts by the
field's declared type and refuses what does not fit.
"""

from __future__ import annotations

import array
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from kuavo_smolvla_ros.robot.fields import MessageError, field_names

MessageT = TypeVar("MessageT")
NS_PER_S = 1_000_000_000
_FLOAT32_MAX = float(np.finfo(np.float32).max)

_ARRAY = re.compile(
    r"(?:sequence<(?P<item>[\w/]+)(?:, *(?P<bound>\d+))?>|(?P<fixed_item>[\w/]+)\[(?P<size>\d+)\])"
)
_INTEGERS = {f"{sign}int{bits}": (bits, not sign) for sign in ("", "u") for bits in (8, 16, 32, 64)}
_TYPECODES = {
    "double": "d", "float": "f", "octet": "B", "char": "B",
    "int8": "b", "uint8": "B", "int16": "h", "uint16": "H",
    "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q",
}  # fmt: skip


def set_fields(message: MessageT, fields: Mapping[str, Any]) -> MessageT:
    """Set dotted fields, converting by declared type; returns the message. Works on rclpy messages."""
    for dotted, value in fields.items():
        *parents, last = dotted.split(".")
        target: Any = message
        for name in parents:
            _declared(target, name)
            target = getattr(target, name)
        setattr(target, last, _convert(value, _declared(target, last), dotted))
    return message


def build(message_type: type[MessageT], fields: Mapping[str, Any]) -> MessageT:
    """A new message of this type with these fields."""
    return set_fields(message_type(), fields)


def stamp_ns(message: Any) -> int:
    """The header stamp in nanoseconds; a message without a header is an error."""
    try:
        stamp = message.header.stamp
    except AttributeError:
        raise MessageError(f"{type(message).__name__} has no header, so its time is unknown") from None
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def stamp_fields(stamp: int, field: str = "header.stamp") -> dict[str, int]:
    """Fields for `set_fields` that carry this time."""
    if stamp < 0:
        raise MessageError(f"the time {stamp} ns lies before the epoch")
    return {f"{field}.sec": stamp // NS_PER_S, f"{field}.nanosec": stamp % NS_PER_S}


def _declared(message: Any, name: str) -> str:
    describe = getattr(type(message), "get_fields_and_field_types", None)
    if describe is None:
        raise MessageError(f"{type(message).__name__} is not a ROS message that can be filled")
    types: dict[str, str] = describe()
    if name not in types:
        raise MessageError(
            f"{type(message).__name__} has no field '{name}'; it has {', '.join(field_names(message))}"
        )
    return types[name]


def _convert(value: Any, declared: str, where: str) -> Any:
    match = _ARRAY.fullmatch(declared)
    if match is None:
        return _scalar(value, declared, where)
    item, size = match["item"] or match["fixed_item"], match["size"] or match["bound"]
    if size is not None:
        too_many = match["bound"] is not None and len(value) > int(size)
        wrong = match["size"] is not None and len(value) != int(size)
        if too_many or wrong:
            raise MessageError(f"{where}: {len(value)} values for {declared}")
    if item in ("uint8", "octet") and isinstance(value, (bytes, bytearray, memoryview)):
        return array.array("B", bytes(value))
    if isinstance(value, str) or not isinstance(value, (list, tuple, np.ndarray, array.array)):
        raise MessageError(f"{where}: {type(value).__name__} given for {declared}")
    if item not in _TYPECODES:
        return [_scalar(v, item, where) for v in value]
    items = [_scalar(v, item, where) for v in value]
    if match["size"] is not None:
        return np.array(items, dtype=np.dtype(_TYPECODES[item]))
    return array.array(_TYPECODES[item], items)


def _scalar(value: Any, declared: str, where: str) -> Any:
    if declared in ("double", "float"):
        if isinstance(value, (bool, np.bool_, str, bytes)) or not isinstance(value, (int, float, np.number)):
            raise MessageError(f"{where}: {value!r} is not a number")
        number = float(value)
        if declared == "float" and math.isfinite(number) and abs(number) > _FLOAT32_MAX:
            raise MessageError(f"{where}: {number} does not fit in 32 bits")
        return number
    if declared in _INTEGERS or declared in ("octet", "char"):
        return _integer(value, *_INTEGERS.get(declared, (8, False)), where)
    if declared == "boolean":
        if not isinstance(value, (bool, np.bool_)):
            raise MessageError(f"{where}: {value!r} is neither true nor false")
        return bool(value)
    if declared.startswith(("string", "wstring")):
        if not isinstance(value, str):
            raise MessageError(f"{where}: {value!r} is not text")
        return value
    return value  # a nested message, built by the caller


def _integer(value: Any, bits: int, signed: bool, where: str) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole and isinstance(value, (float, np.floating)):
        whole = float(value).is_integer()
    if not whole:
        raise MessageError(f"{where}: {value!r} is not a whole number")
    number = int(value)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if not low <= number <= high:
        raise MessageError(f"{where}: {number} lies outside {low}..{high}")
    return number
