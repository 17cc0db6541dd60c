"""Inputs, decisions, settings and the executor's memory as plain dictionaries, for the flight recorder.

Everything goes through JSON and comes back equal: floats in their shortest exact form, and those that JSON
does not know (a refused chunk may hold them) as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.chunk import ActionChunk, FloatArray, Refusal
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.gates import BoolArray, GatedJoint
from kuavo_smolvla_ros.control.plan import BlendSettings, Plan
from kuavo_smolvla_ros.control.reasons import RefusalReason, Request, State, StopReason, Transition
from kuavo_smolvla_ros.control.records import Decision, Inputs, JointSample
from kuavo_smolvla_ros.control.settings import Settings
from kuavo_smolvla_ros.robot.limits import Limits

Plain = dict[str, Any]


def to_plain(value: Any) -> Any:
    """A record of this package as dictionaries, lists, strings, numbers and None."""
    if isinstance(value, ActionChunk):
        # A refused chunk may have any shape, and an array without rows does not tell its width.
        plain = {entry.name: to_plain(getattr(value, entry.name)) for entry in fields(value)}
        return {**plain, "values": _numbers(value.values.ravel()), "shape": list(value.values.shape)}
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.ndarray):
        return [to_plain(item) for item in value.tolist()] if value.ndim != 1 else _numbers(value)
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decision_to_plain(decision: Decision) -> Plain:
    """What was decided, for a log and for comparison with a replay."""
    plain: Plain = to_plain(decision)
    return plain


def inputs_to_plain(inputs: Inputs) -> Plain:
    """One period's inputs."""
    plain: Plain = to_plain(inputs)
    return plain


def inputs_from_plain(plain: Mapping[str, Any]) -> Inputs:
    """The reverse of `inputs_to_plain`."""
    joints = plain["joints"]
    if joints is not None:
        joints = JointSample(joints["stamp_ns"], joints["heard_ns"], _floats(joints["positions"]))
    return Inputs(
        ros_ns=plain["ros_ns"],
        mono_ns=plain["mono_ns"],
        joints=joints,
        chunks=tuple(_chunk(c) if "values" in c else _refusal(c) for c in plain["chunks"]),
        requests=tuple(Request(r) for r in plain["requests"]),
        policy_heard_ns=plain["policy_heard_ns"],
        foreign_publishers=tuple(plain["foreign_publishers"]),
        unmet=plain["unmet"],
    )


def settings_from_plain(plain: Mapping[str, Any]) -> Settings:
    """The reverse of `to_plain(settings)`."""
    limits = plain["limits"]
    arrays = {name: _floats(limits[name]) for name in ("lower", "upper", "velocity", "acceleration")}
    rest: dict[str, Any] = {name: _number(value) for name, value in plain.items()}
    rest |= {name: tuple(plain[name]) for name in ("chunk_names", "measured_names", "pose_names", "groups")}
    rest["limits"] = Limits(names=tuple(limits["names"]), **arrays)
    rest["gated"] = tuple(
        GatedJoint(gate["name"], gate["by"], float(gate["above"]), float(gate["at_most"]))
        for gate in plain["gated"]
    )
    rest["transition"] = Transition(plain["transition"])
    rest["blend"] = BlendSettings(**plain["blend"])
    return Settings(**rest)


@dataclass(frozen=True, eq=False)
class Memory:
    """All an executor remembers between two periods: a replay may begin here.

    Made of references to values that never change, so that taking one costs the control loop microseconds;
    turning it into text (milliseconds) can wait until there is a file to write.
    """

    settings: Settings
    state: State
    reason: StopReason | None
    detail: str
    plan: Plan | None
    pending: ActionChunk | None
    hold: FloatArray | None
    unplaced: BoolArray
    e_stopped: bool
    ending: bool
    relaxed: bool
    rest_since_ns: int | None
    policy_heard_ns: int | None
    newest: tuple[int, int] | None
    not_before_ns: int | None
    seen: tuple[int, int] | None
    stepped_ns: int | None
    position: FloatArray | None
    velocity: FloatArray
    interventions: NDArray[np.int64]


_OWN = (
    *("settings", "state", "reason", "detail", "plan", "pending", "hold", "unplaced"),
    *("e_stopped", "ending", "relaxed", "rest_since_ns", "policy_heard_ns"),
)


def capture(executor: Executor) -> Memory:
    """What the executor remembers now."""
    e = executor
    return Memory(
        **{name: getattr(e, name) for name in _OWN},
        newest=e.intake.newest,
        not_before_ns=e.intake.not_before_ns,
        seen=e.clock.seen,
        stepped_ns=e.clock.stepped_ns,
        position=e.guard.position if e.guard.started else None,
        velocity=e.guard.velocity,
        interventions=e.guard.interventions,
    )


def restore(plain: Mapping[str, Any]) -> Executor:
    """An executor that goes on as the one of the snapshot would have."""
    e = Executor(settings_from_plain(plain["settings"]))
    e.state = State(plain["state"])
    e.reason = None if plain["reason"] is None else StopReason(plain["reason"])
    e.detail = plain["detail"]
    e.plan = None if plain["plan"] is None else _plan(plain["plan"])
    e.pending = None if plain["pending"] is None else _chunk(plain["pending"])
    e.e_stopped, e.ending, e.relaxed = plain["e_stopped"], plain["ending"], plain["relaxed"]
    e.rest_since_ns, e.policy_heard_ns = plain["rest_since_ns"], plain["policy_heard_ns"]
    e.intake.newest = _pair(plain["newest"])
    e.intake.not_before_ns = plain["not_before_ns"]
    e.clock.seen = _pair(plain["seen"])
    e.clock.stepped_ns = plain["stepped_ns"]
    if plain["position"] is not None:
        e.guard.start(_floats(plain["position"]), _floats(plain["velocity"]))
    if plain["hold"] is not None:
        e.hold = _floats(plain["hold"])
    e.unplaced = np.array(plain["unplaced"], dtype=np.bool_)
    e.guard.interventions = np.array(plain["interventions"], dtype=np.int64)
    return e


def first_difference(recorded: Mapping[str, Any], replayed: Mapping[str, Any]) -> str | None:
    """Which part of two decisions differs first, in words, or None."""
    for key in recorded:
        if recorded[key] != replayed.get(key):
            return f"{key}: recorded {recorded[key]}, replayed {replayed.get(key)}"
    return None


def _numbers(array: np.ndarray[Any, Any]) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [to_plain(item) for item in array.tolist()]
    numbers: list[Any] = array.tolist()
    return numbers


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value


def _floats(values: Any) -> FloatArray:
    return np.array([float(v) for v in values], dtype=np.float64)


def _rows(rows: Any) -> FloatArray:
    return np.array([[float(v) for v in row] for row in rows], dtype=np.float64)


def _pair(values: Any) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def _chunk(plain: Mapping[str, Any]) -> ActionChunk:
    return ActionChunk(
        stamp_ns=plain["stamp_ns"],
        times_ns=np.array(plain["times_ns"], dtype=np.int64),
        names=tuple(plain["names"]),
        values=_floats(plain["values"]).reshape(plain["shape"]),
        task=plain["task"],
        sequence=plain["sequence"],
        fingerprint=plain["fingerprint"],
    )


def _refusal(plain: Mapping[str, Any]) -> Refusal:
    return Refusal(RefusalReason(plain["reason"]), plain["detail"], plain["sequence"])


def _plan(plain: Mapping[str, Any]) -> Plan:
    return Plan(
        times_ns=np.array(plain["times_ns"], dtype=np.int64),
        values=_rows(plain["values"]),
        slopes=_rows(plain["slopes"]),
        switches=np.array(plain["switches"], dtype=np.bool_),
        task=plain["task"],
        sequence=plain["sequence"],
    )
