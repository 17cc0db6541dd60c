"""What the executor is told once: the joints it commands, and every bound with its unit and default."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.gates import GatedJoint, Gates
from kuavo_smolvla_ros.control.plan import BlendSettings
from kuavo_smolvla_ros.control.reasons import Transition
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.limits import Limits


@dataclass(frozen=True, eq=False)
class Settings:
    """Joints, in the order of commands, and the bounds of the executor."""

    limits: Limits
    chunk_names: tuple[str, ...]
    """Joints a chunk moves, in the chunk's order. The other commanded joints keep their pose."""
    measured_names: tuple[str, ...]
    """Joints of a joint sample, in its order. A commanded joint not among them starts at its first target."""
    pose_names: tuple[str, ...]
    """Arm joints: for these the distance between target and measurement decides about ramp and refusal."""
    groups: tuple[str, ...]
    """A label per commanded joint; what shares one brakes in proportion, and so stays on its line."""
    fingerprint: str
    gated: tuple[GatedJoint, ...] = ()
    """Joints that another one of the chunk allows to be commanded: a base that walks or arms that move."""
    period_s: float = 0.01
    transition: Transition = Transition.BLEND
    keep_direction: bool = False
    starvation_latches: bool = True
    """Off: after starving, the next good chunk moves on by itself (for inference slower than its chunk)."""
    ramp_above: float = 0.05
    ramp_speed: float = 0.25
    """Share of the velocity limits used until the command is within `ramp_above` of its target."""
    refuse_above: float = 0.5
    max_excess: float = 2.0
    start_outside: float = 0.1
    """How far outside its position limits a measured arm joint may be for motion to begin."""
    hold_error: float = 0.1
    """Arms that rest further than this from the held command are no longer pushed towards it."""
    settle_s: float = 0.5
    max_following_error: float = 0.5
    joint_state_max_age_s: float = 0.1
    joint_state_max_silence_s: float = 0.5
    """By the monotonic clock: notices a joint state that ends together with the robot's clock."""
    policy_max_silence_s: float = 0.2
    chunk_max_age_s: float = 3.0
    max_ahead_s: float = 0.05
    max_time_factor: float = 4.0
    clock_tolerance_s: float = 0.1
    max_step_s: float = 0.05
    """A longer step than this is taken from rest."""
    control_gap_s: float = 0.2
    blend: BlendSettings = field(default_factory=BlendSettings)

    def __post_init__(self) -> None:
        names = self.limits.names
        for what in ("chunk_names", "measured_names", "pose_names"):
            listed = getattr(self, what)
            unknown = sorted(set(listed) - set(names))
            if unknown or len(set(listed)) != len(listed):
                raise ValueError(f"{what}: not commanded or twice: {', '.join(unknown or listed)}")
        if len(self.groups) != len(names):
            raise ValueError(f"{len(self.groups)} groups for {len(names)} joints")
        unmeasured = set(self.pose_names) - set(self.measured_names)
        if unmeasured:
            raise ValueError(f"pose_names: nobody measures {', '.join(sorted(unmeasured))}")
        if not set(names) <= set(self.measured_names) | set(self.chunk_names):
            raise ValueError("a joint that is neither measured nor in the chunk has no pose to keep")
        foreign = {gate.by for gate in self.gated} - set(self.chunk_names)
        if foreign:
            raise ValueError(f"gated: no chunk holds {', '.join(sorted(foreign))}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not value > 0.0:
                raise ValueError(f"{entry.name} must be above zero, not {value}")

    @property
    def names(self) -> tuple[str, ...]:
        """Commanded joints, in the order of every command."""
        return self.limits.names

    def index(self, names: tuple[str, ...]) -> NDArray[np.intp]:
        """Places of these joints in a command."""
        return self.places(self.names, names)

    @staticmethod
    def places(among: tuple[str, ...], names: tuple[str, ...]) -> NDArray[np.intp]:
        """Places of `names` in `among`."""
        return np.array([among.index(name) for name in names], dtype=np.intp)

    @property
    def gates(self) -> Gates:
        """What decides whether a joint is commanded, in the order of every command."""
        return Gates(self.names, self.gated)

    @property
    def chunk_gates(self) -> Gates:
        """The same in the chunk's order."""
        return Gates(self.chunk_names, self.gated)

    @property
    def chunk_limits(self) -> Limits:
        """Limits in the chunk's order."""
        at = self.index(self.chunk_names)
        limits = self.limits
        return Limits(
            self.chunk_names, limits.lower[at], limits.upper[at], limits.velocity[at], limits.acceleration[at]
        )


def settings_for(spec: RobotSpec, **bounds: Any) -> Settings:
    """Settings for a robot: all joints of its action and all that it keeps still; both arms stop as one.

    A joint sample then holds `spec.state_names` followed by `spec.hold_names`. `bounds` replace any default.
    """
    names = (*spec.action_names, *spec.hold_names)
    joints = [spec.joints[name] for name in names]
    settings = Settings(
        limits=spec.limits(names),
        chunk_names=spec.action_names,
        measured_names=(*spec.state_names, *spec.hold_names),
        pose_names=tuple(joint.name for joint in joints if joint.of_an_arm),
        groups=tuple("arms" if joint.of_an_arm else joint.group for joint in joints),
        fingerprint=spec.fingerprint,
        gated=_gated(spec),
        period_s=1.0 / spec.command_rate_hz,
    )
    return replace(settings, **bounds)


def _gated(spec: RobotSpec) -> tuple[GatedJoint, ...]:
    """The joints of every stream that is only sent while another joint allows it."""
    return tuple(
        GatedJoint(
            joint,
            gate.joint,
            -np.inf if gate.above is None else gate.above,
            np.inf if gate.at_most is None else gate.at_most,
        )
        for block in (*spec.action, *spec.hold_action)
        if (gate := spec.streams[block.stream].gate) is not None
        for joint in block.joints
    )
