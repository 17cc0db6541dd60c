"""Diagnostic messages from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from kuavo_smolvla_ros.robot.messages import NS_PER_S, build


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


def quantiles(name: str, ordered_s: Sequence[float]) -> dict[str, float]:
    """Median, 95 of a hundred and the largest of some durations, in order; nothing of none."""
    return {
        f"{name}_{short}_s": round(ordered_s[min(int(share * len(ordered_s)), len(ordered_s) - 1)], 4)
        for short, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
        if ordered_s
    }


def seconds(duration_ns: int | None) -> float | str:
    """A duration for people; of what has not happened, `never`."""
    return "never" if duration_ns is None else round(duration_ns / NS_PER_S, 4)


def as_dict(message: DiagnosticStatus) -> dict[str, str]:
    """The values of a status by key."""
    return {pair.key: pair.value for pair in message.values}
