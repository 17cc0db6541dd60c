"""Dotted paths into messages: `joint_data.joint_q[12:19]`, `position[0]`, `angular.z`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.units import FloatArray

_PATH = re.compile(r"(?P<names>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\[(?P<start>\d+)(?::(?P<stop>\d+))?\])?")


class MessageError(UserError):
    """A message that does not hold what the robot description says; names stream and field."""


@dataclass(frozen=True)
class FieldPath:
    """Attribute names, then optionally one index or one slice of the array found there."""

    names: tuple[str, ...]
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> FieldPath:
        match = _PATH.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}' is not a field path such as position[0:7], data or pose.position.x")
        names = tuple(match["names"].split("."))
        if match["start"] is None:
            return cls(names)
        start = int(match["start"])
        stop = start + 1 if match["stop"] is None else int(match["stop"])
        if stop <= start:
            raise ValueError(f"'{text}': the slice is empty")
        return cls(names, start, stop)

    @property
    def width(self) -> int | None:
        """How many values the path names; None for a whole field, whose width the message decides."""
        return None if self.start is None or self.stop is None else self.stop - self.start

    @property
    def dotted(self) -> str:
        return ".".join(self.names)

    def __str__(self) -> str:
        if self.start is None or self.stop is None:
            return self.dotted
        return f"{self.dotted}[{self.start}:{self.stop}]"

    def value(self, message: Any) -> Any:
        """The field itself, whatever it is; a name that is not there is an error that lists what is."""
        found = message
        for depth, name in enumerate(self.names):
            try:
                found = getattr(found, name)
            except AttributeError:
                there = ", ".join(field_names(found)) or "no fields"
                at = ".".join(self.names[:depth]) or "the message"
                raise MessageError(f"there is no field '{name}' in {at}; it holds {there}") from None
        return found

    def numbers(self, message: Any) -> FloatArray:
        """The named values as float64, one-dimensional; too short an array is an error."""
        try:
            values = np.atleast_1d(np.asarray(self.value(message), dtype=np.float64))
        except (TypeError, ValueError):
            raise MessageError(f"the field '{self.dotted}' does not hold numbers") from None
        if self.start is None or self.stop is None:
            return values
        if values.size < self.stop:
            raise MessageError(f"{self} reaches to value {self.stop} but '{self.dotted}' holds {values.size}")
        return values[self.start : self.stop]


def field_names(message: Any) -> list[str]:
    """Names of a message's fields, for rclpy messages and for dataclass messages alike."""
    describe = getattr(type(message), "get_fields_and_field_types", None)
    if describe is not None:
        return list(describe())
    fields = getattr(type(message), "__dataclass_fields__", {})
    return [name for name in fields if not name.startswith("__")]
