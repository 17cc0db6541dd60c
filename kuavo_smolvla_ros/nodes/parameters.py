"""Node parameters declared once: default, what it means with its unit, bounds, and whether it may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node


@dataclass(frozen=True)
class Param:
    """One parameter. `low` and `high` come together; `fixed` means only a start of the node may set it."""

    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    fixed: bool = False

    def descriptor(self) -> ParameterDescriptor:
        described = ParameterDescriptor(description=self.meaning, read_only=self.fixed)
        if self.choices:
            described.additional_constraints = f"one of {', '.join(self.choices)}"
        if self.low is None or self.high is None:
            return described
        if isinstance(self.default, int) and not isinstance(self.default, bool):
            described.integer_range = [
                IntegerRange(from_value=int(self.low), to_value=int(self.high), step=0)
            ]
        else:
            low, high = float(self.low), float(self.high)
            described.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
        return described


def declare(node: Node, parameters: Mapping[str, Param]) -> None:
    """Declare all of them; a value given at the start that is out of bounds is an error."""
    for name, parameter in parameters.items():
        try:
            node.declare_parameter(name, parameter.default, parameter.descriptor())
        except (InvalidParameterValueException, InvalidParameterTypeException) as error:
            raise ValueError(f"{name}: {error} ({parameter.meaning})") from None
        problem = refuse(parameters, name, node.get_parameter(name).value)
        if problem is not None:
            raise ValueError(problem)


def refuse(parameters: Mapping[str, Param], name: str, value: Any) -> str | None:
    """Why this value may not be set, beyond what rclpy checks by itself."""
    parameter = parameters.get(name)
    if parameter is not None and parameter.choices and value not in parameter.choices:
        return f"{name}: '{value}' is unknown; choose one of {', '.join(parameter.choices)}"
    return None
