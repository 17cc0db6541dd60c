"""The robot as data: joints, streams, cameras, layout of state and action, and a fingerprint of it all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from kuavo_smolvla_ros.robot.fields import FieldPath
from kuavo_smolvla_ros.robot.limits import Limits
from kuavo_smolvla_ros.robot.units import Unit

VALUE = "value"  # the place of the joint's own value in a `spread`


@dataclass(frozen=True)
class Joint:
    """One number of a vector. Bounds are in the vector's unit, per second and per second squared."""

    name: str
    group: str
    unit: str
    lower: float
    upper: float
    velocity: float
    acceleration: float

    @property
    def of_an_arm(self) -> bool:
        return self.group.endswith("_arm")


@dataclass(frozen=True)
class Gate:
    """An output stream that is sent only while a joint is on one side of a threshold (a mode switch)."""

    joint: str
    above: float | None = None
    at_most: float | None = None

    def is_open(self, value: float) -> bool:
        return value > self.above if self.above is not None else value <= float(self.at_most or 0.0)


@dataclass(frozen=True)
class Stream:
    """A topic: what it carries, how often, how old it may be, and where its time stamp comes from."""

    name: str
    topic: str
    type: str
    direction: Literal["in", "out"]
    rate_hz: float
    max_age_s: float
    stamp: Literal["header", "receive"] = "header"
    constants: Mapping[str, Any] = field(default_factory=dict)
    gate: Gate | None = None


@dataclass(frozen=True)
class Camera:
    """A role (what the policy knows it as) and the stream that fills it."""

    name: str
    stream: str
    height: int
    width: int


@dataclass(frozen=True)
class Block:
    """A run of joints and where their values stand in a message.

    Values are found by position (`path` with a slice) or, where `names_path` is set, by `wire_names` in the
    message's own list of names. `spread` writes one joint's value into several places, constants between.
    """

    joints: tuple[str, ...]
    stream: str
    path: FieldPath
    unit: Unit
    names_path: FieldPath | None = None
    wire_names: tuple[str, ...] = ()
    spread: tuple[float | str, ...] = ()


@dataclass(frozen=True)
class Condition:
    """What must be seen on a topic before the first motion."""

    name: str
    topic: str
    type: str
    path: FieldPath
    equals: float | str
    hint: str


@dataclass(frozen=True)
class Signal:
    """A topic by which others command us (pause, stop)."""

    name: str
    topic: str
    type: str


@dataclass(frozen=True)
class GapRule:
    """A joint that no topic carries: it is 1 while a command stream is silent for longer than this."""

    joint: str
    stream: str
    longer_than_s: float


@dataclass(frozen=True)
class RobotSpec:
    """One description, read by recording, conversion, training, simulation and the nodes alike."""

    name: str
    fps: float
    command_rate_hz: float
    max_skew_s: float
    joints: Mapping[str, Joint]
    streams: Mapping[str, Stream]
    cameras: Mapping[str, Camera]
    state: tuple[Block, ...]
    action: tuple[Block, ...]
    hold_state: tuple[Block, ...] = ()
    hold_action: tuple[Block, ...] = ()
    gap_rule: GapRule | None = None
    poses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    preconditions: tuple[Condition, ...] = ()
    signals: Mapping[str, Signal] = field(default_factory=dict)
    limit_profiles: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    limit_profile: str = "hardware"

    def __post_init__(self) -> None:
        for name in ("joints", "streams", "cameras", "poses", "signals", "limit_profiles"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def state_names(self) -> tuple[str, ...]:
        return _names(self.state)

    @property
    def action_names(self) -> tuple[str, ...]:
        gap = (self.gap_rule.joint,) if self.gap_rule else ()
        return _names(self.action) + gap

    @property
    def hold_names(self) -> tuple[str, ...]:
        """Joints that are read and commanded to stay where they are, unseen by the policy."""
        return _names(self.hold_action)

    @property
    def inputs(self) -> dict[str, Stream]:
        return {name: s for name, s in self.streams.items() if s.direction == "in"}

    @property
    def outputs(self) -> dict[str, Stream]:
        return {name: s for name, s in self.streams.items() if s.direction == "out"}

    def group(self, name: str) -> tuple[str, ...]:
        return tuple(j.name for j in self.joints.values() if j.group == name)

    def limits(self, names: Iterable[str]) -> Limits:
        """Bounds in the order asked for, under the active profile (a profile only ever lowers them)."""
        chosen = [self.joints[name] for name in names]
        caps = self.limit_profiles.get(self.limit_profile, {})
        no_cap = (math.inf, math.inf)
        return Limits(
            names=tuple(j.name for j in chosen),
            lower=np.array([j.lower for j in chosen]),
            upper=np.array([j.upper for j in chosen]),
            velocity=np.array([min(j.velocity, caps.get(j.group, no_cap)[0]) for j in chosen]),
            acceleration=np.array([min(j.acceleration, caps.get(j.group, no_cap)[1]) for j in chosen]),
        )

    def with_limit_profile(self, profile: str) -> RobotSpec:
        if profile != "hardware" and profile not in self.limit_profiles:
            known = ", ".join(("hardware", *self.limit_profiles))
            raise KeyError(f"limit profile '{profile}' is unknown; choose one of {known}")
        return replace(self, limit_profile=profile)

    @property
    def identity(self) -> dict[str, Any]:
        """All that must agree between a recording, a dataset, a checkpoint and a chunk."""
        return {
            "state": [[n, self.joints[n].unit] for n in self.state_names],
            "action": [[n, self.joints[n].unit] for n in self.action_names],
            "cameras": sorted(self.cameras),
            "fps": self.fps,
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)


def _names(blocks: tuple[Block, ...]) -> tuple[str, ...]:
    return tuple(name for block in blocks for name in block.joints)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Sixteen hex digits: short enough for a frame_id, long enough not to meet by chance."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """One sentence that says what differs, or None where nothing does."""
    for part in ("state", "action"):
        a, b = [tuple(x) for x in ours[part]], [tuple(x) for x in theirs[part]]
        if len(a) != len(b):
            extra = sorted({n for n, _ in a} ^ {n for n, _ in b})
            odd = ", ".join(extra) or "repeats"
            return f"{part} is {len(a)} wide here and {len(b)} there (not in both: {odd})"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return f"{part}[{i}] is {x[0]} in {x[1]} here and {y[0]} in {y[1]} there"
    if list(ours["cameras"]) != list(theirs["cameras"]):
        return f"cameras are {', '.join(ours['cameras'])} here and {', '.join(theirs['cameras'])} there"
    if ours["fps"] != theirs["fps"]:
        return f"the rate is {ours['fps']:g} fps here and {theirs['fps']:g} fps there"
    return None
