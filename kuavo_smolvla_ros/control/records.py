"""What goes into the executor each period and what comes out: all of it data, so that it can be replayed."""

from __future__ import annotations

from dataclasses import dataclass, field

from kuavo_smolvla_ros.control.chunk import ActionChunk, FloatArray, Refusal
from kuavo_smolvla_ros.control.reasons import Request, State, StopReason


@dataclass(frozen=True, eq=False)
class JointSample:
    """The newest measured pose, in the order of `Settings.measured_names`."""

    stamp_ns: int
    """Stamp of the (oldest) message it came from, on the robot's clock."""
    heard_ns: int
    """When it arrived, on the monotonic clock."""
    positions: FloatArray


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything one control period may depend on."""

    ros_ns: int
    mono_ns: int
    joints: JointSample | None = None
    chunks: tuple[ActionChunk | Refusal, ...] = ()
    """Chunks that arrived since the last period, oldest first; a refusal stands for one that is no array."""
    requests: tuple[Request, ...] = ()
    policy_heard_ns: int | None = None
    """When the policy process gave its last sign of life, on the monotonic clock."""
    foreign_publishers: tuple[str, ...] = ()
    """Others that publish the robot's command topics."""
    unmet: str | None = None
    """A precondition of the robot that does not hold, as a sentence."""


@dataclass(frozen=True)
class Answer:
    """Reply to a request to resume or to release the emergency stop."""

    accepted: bool
    detail: str


@dataclass(frozen=True, eq=False)
class Decision:
    """What to do this period, and why."""

    ros_ns: int
    state: State
    reason: StopReason | None
    detail: str
    command: FloatArray | None
    """Values for all commanded joints in order, or None: publish nothing."""
    at_rest: bool
    task: str | None
    sequence: int | None
    """Task and number of the chunk that is being followed."""
    limited: tuple[str, ...] = ()
    """Joints whose command was kept away from what the plan asked for in this period."""
    interventions: dict[str, int] = field(default_factory=dict)
    """How often that happened so far, by joint; joints that never were are left out."""
    accepted: tuple[int, ...] = ()
    refused: tuple[Refusal, ...] = ()
    answer: Answer | None = None
