"""Diagnostic messages from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from kuavo_smolvla_ros.robot.messages import build


class Level(Enum):
    OK = DiagnosticStatus.OK
    WARN = DiagnosticStatus.WARN
    ERROR = DiagnosticStatus.ERROR
    STALE = DiagnosticStatus.STALE


def status(name: str, level: Level, message: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    """One status; every value becomes text."""
    result = build(DiagnosticStatus, {"name": name, "message": message, "hardware_id": "kuavo"})
    result.level = level.value
    result.values = [build(KeyValue, {"key": key, "value": str(value)}) for key, value in values.items()]
    return result


def as_dict(message: DiagnosticStatus) -> dict[str, str]:
    """The values of a status by key."""
    return {pair.key: pair.value for pair in message.values}
