"""The definition of a message type as text, made from what its class says of itself.

A recording carries it, so that whoever reads it needs neither this robot's packages nor ROS. The class knows
its fields on every installation; where the files with the definitions lie differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from kuavo_smolvla_ros.nodes.message_types import message_class

_SECTION = "=" * 80
_BASIC = {"boolean": "bool", "octet": "byte", "float": "float32", "double": "float64"}
_ARRAY = re.compile(r"^(?P<item>.+)\[(?P<size>\d+)\]$")
_SEQUENCE = re.compile(r"^sequence<(?P<item>.+?)(?:, (?P<most>\d+))?>$")
_TEXT = re.compile(r"^(?P<kind>w?string)(?:<(?P<most>\d+)>)?$")

FieldsOf = Callable[[str], Mapping[str, str]]


def fields_of(name: str) -> Mapping[str, str]:
    """Names and types of a message's fields, types as the class calls them."""
    fields: Mapping[str, str] = message_class(name).get_fields_and_field_types()
    return fields


def definition(name: str, fields: FieldsOf = fields_of) -> str:
    """`sensor_msgs/msg/JointState` as text, with every type that it is made of."""
    sections: dict[str, str] = {}
    waiting = [name]
    while waiting:
        wanted = waiting.pop(0)
        if wanted in sections:
            continue
        lines = []
        for field, kind in fields(wanted).items():
            text, inner = _in_text(kind)
            lines.append(f"{text} {field}\n")
            if inner is not None:
                waiting.append(inner)
        sections[wanted] = "".join(lines)
    first, *others = sections
    parts = [sections[first]]
    parts += [f"{_SECTION}\nMSG: {_short(other)}\n{sections[other]}" for other in others]
    return "".join(parts)


def _in_text(kind: str) -> tuple[str, str | None]:
    """A field's type as definitions write it, and the message type in it, if any."""
    if found := _ARRAY.match(kind):
        item, inner = _in_text(found["item"])
        return f"{item}[{found['size']}]", inner
    if found := _SEQUENCE.match(kind):
        item, inner = _in_text(found["item"])
        return f"{item}[{'<=' + found['most'] if found['most'] else ''}]", inner
    if found := _TEXT.match(kind):
        return f"{found['kind']}{'<=' + found['most'] if found['most'] else ''}", None
    if "/" in kind:
        package, _, message = kind.rpartition("/")
        full = kind if package.endswith("/msg") else f"{package}/msg/{message}"
        return _short(full), full
    return _BASIC.get(kind, kind), None


def _short(name: str) -> str:
    return name.replace("/msg/", "/")
