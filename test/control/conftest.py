"""A robot of data: time, measured pose and chunks as plain values, and a judge that knows only commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.gates import Gates
from kuavo_smolvla_ros.control.reasons import Request
from kuavo_smolvla_ros.control.records import Decision, Inputs, JointSample
from kuavo_smolvla_ros.control.settings import Settings, settings_for
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.limits import Limits
from kuavo_smolvla_ros.robot.spec import load_spec

FloatArray = NDArray[np.float64]
S = 1_000_000_000
MS = 1_000_000
START_NS = 1_760_000_000 * S
TOLERANCE = 1e-6  # relative; what is left is rounding of second differences


@dataclass
class Judge:
    """Checks a stream of commands against limits by finite differences, trusting nothing of the guard.

    It knows three rules of the documentation: silence ends a run and the next starts at rest; a step longer
    than 50 ms counts as one of 50 ms from rest; across a clock jump one control period has passed. What a
    gate keeps from being commanded is no command: the next is compared with the last that was, from rest.
    """

    limits: Limits
    time_ns: int | None = None
    mono_ns: int = 0
    command: FloatArray | None = None
    velocity: FloatArray | None = None
    gates: Gates | None = None
    known: NDArray[np.bool_] | None = None  # of joints that nobody measures: whether one was commanded
    worst_velocity: float = 0.0
    worst_acceleration: float = 0.0

    def see(self, ros_ns: int, mono_ns: int, command: FloatArray | None) -> None:
        if command is None:
            self.command = self.velocity = None
            self.time_ns, self.mono_ns = ros_ns, mono_ns
            return
        lower, upper = self.limits.lower, self.limits.upper
        assert np.isfinite(command).all()
        executed = np.ones(len(command), dtype=np.bool_) if self.gates is None else self.gates.open(command)
        if self.command is not None and self.velocity is not None:
            assert self.known is not None
            command = np.where(executed | ~self.known, command, self.command)
            self.command = np.where(self.known, self.command, command)
            self.velocity = np.where(executed & self.known, self.velocity, 0.0)
            self.known = self.known | executed
        if self.command is None or self.time_ns is None or self.velocity is None:
            self.time_ns, self.mono_ns = ros_ns, mono_ns
            self.command, self.velocity = command, np.zeros(len(command))
            self.known = executed | np.array([name.startswith("zarm") for name in self.limits.names])
            return
        h = (ros_ns - self.time_ns) / S
        if h < 0 or h > 4.0 * (mono_ns - self.mono_ns) / S + 0.1:
            h = 0.01
        if abs(h) < 0.001:
            assert np.array_equal(command, self.command), "moved without time passing"
            return
        if h > 0.05:
            h, self.velocity = 0.05, np.zeros(len(command))
        velocity = (command - self.command) / h
        with np.errstate(invalid="ignore"):
            v = np.abs(velocity) / self.limits.velocity
            a = np.abs(velocity - self.velocity) / (self.limits.acceleration * h)
        self.worst_velocity = max(self.worst_velocity, float(v.max()))
        self.worst_acceleration = max(self.worst_acceleration, float(a.max()))
        outside = np.maximum(lower - command, command - upper)
        before = np.maximum(np.maximum(lower - self.command, self.command - upper), 0.0)
        assert np.all(outside <= before), "further outside a position limit than before"
        assert v.max() <= 1 + TOLERANCE, f"velocity: {self.limits.names[int(v.argmax())]} {v.max()}"
        assert a.max() <= 1 + TOLERANCE, f"acceleration: {self.limits.names[int(a.argmax())]} {a.max()}"
        self.time_ns, self.mono_ns, self.command, self.velocity = ros_ns, mono_ns, command, velocity


@dataclass
class World:
    """An executor, a robot that goes where it is told (or not), and two clocks."""

    settings: Settings
    pose: FloatArray
    ros_ns: int = START_NS
    mono_ns: int = 5 * S
    time_factor: float = 1.0
    follows: bool = True
    state_alive: bool = True
    policy_alive: bool = True
    decisions: list[Decision] = field(default_factory=list)
    sequence: int = 0

    def __post_init__(self) -> None:
        self.executor = Executor(self.settings)
        self.judge = Judge(self.settings.limits, gates=self.settings.gates)
        self.measured_at = self.settings.index(self.settings.measured_names)
        self.sample = self._sample()
        self.heard_ns = self.mono_ns

    @property
    def last(self) -> Decision:
        return self.decisions[-1]

    @property
    def command(self) -> FloatArray:
        assert self.last.command is not None
        return self.last.command

    def _sample(self) -> JointSample:
        return JointSample(self.ros_ns, self.mono_ns, self.pose[self.measured_at].copy())

    def inputs(self, *chunks: ActionChunk | Refusal, **changes: Any) -> Inputs:
        if self.state_alive:
            self.sample = self._sample()
        if self.policy_alive:
            self.heard_ns = self.mono_ns
        given: dict[str, Any] = {"joints": self.sample, "policy_heard_ns": self.heard_ns, **changes}
        return Inputs(self.ros_ns, self.mono_ns, chunks=chunks, **given)

    def step(self, *chunks: ActionChunk | Refusal, **changes: Any) -> Decision:
        """One period with the clocks as they are."""
        decision = self.executor.step(self.inputs(*chunks, **changes))
        self.judge.see(self.ros_ns, self.mono_ns, decision.command)
        if decision.command is not None and self.follows:
            self.pose = decision.command.copy()
        self.decisions.append(decision)
        return decision

    def tick(self, *chunks: ActionChunk | Refusal, dt_s: float | None = None, **changes: Any) -> Decision:
        """Time moves on by one period (or `dt_s`), then one step."""
        dt_ns = round((self.settings.period_s if dt_s is None else dt_s) * S)
        self.ros_ns += dt_ns
        self.mono_ns += round(dt_ns / self.time_factor)
        return self.step(*chunks, **changes)

    def run(self, seconds: float, **changes: Any) -> Decision:
        for _ in range(round(seconds / self.settings.period_s)):
            self.tick(**changes)
        return self.last

    def ask(self, *requests: Request, **changes: Any) -> Decision:
        return self.tick(requests=requests, **changes)

    def chunk(
        self,
        target: FloatArray | float | None = None,
        *,
        steps: int = 50,
        fps: float = 10.0,
        age_s: float = 0.05,
        reach_s: float = 1.0,
        **changes: Any,
    ) -> ActionChunk:
        """A good chunk from the present pose: `target` is an offset that is reached after `reach_s`."""
        s = self.settings
        at = s.index(s.chunk_names)
        offset = np.zeros(len(at)) if target is None else np.broadcast_to(target, (len(at),))
        times = np.arange(steps, dtype=np.int64) * round(S / fps)
        share = np.clip(times / S / reach_s, 0.0, 1.0)[:, None]
        values = np.clip(self.pose[at] + share * offset, s.limits.lower[at], s.limits.upper[at])
        self.sequence += 1
        given: dict[str, Any] = {
            "stamp_ns": self.ros_ns + round(s.period_s * S) - round(age_s * S),
            "times_ns": times,
            "names": s.chunk_names,
            "values": values,
            "task": "task1",
            "sequence": self.sequence,
            "fingerprint": s.fingerprint,
            **changes,
        }
        return ActionChunk(**given)

    def follow(self, target: FloatArray | float = 0.1, **changes: Any) -> Decision:
        """Settle in, then begin a chunk."""
        self.step()
        return self.tick(self.chunk(target, **changes))


def ready_pose(spec: RobotSpec, settings: Settings) -> FloatArray:
    limits = settings.limits
    ready = spec.poses["task1_ready"]
    pose = np.array([ready.get(name, 0.0) for name in settings.names])
    margin = 0.2 * np.minimum(1.0, limits.upper - limits.lower)
    return np.clip(pose, limits.lower + margin, limits.upper - margin)


@pytest.fixture(scope="session")
def spec() -> RobotSpec:
    return load_spec("kuavo_sim")


@pytest.fixture(scope="session")
def settings(spec: RobotSpec) -> Settings:
    return settings_for(spec)


@pytest.fixture
def make_world() -> Callable[..., World]:
    """Build a world: `make_world("kuavo_sim", ramp_above=0.1)`."""

    def build(robot: str = "kuavo_sim", **bounds: Any) -> World:
        spec = load_spec(robot)
        settings = settings_for(spec, **bounds)
        return World(settings, ready_pose(spec, settings))

    return build


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture(scope="session")
def judge_of() -> Callable[[Limits], Judge]:
    return Judge


@pytest.fixture(scope="session")
def small_limits() -> Limits:
    """An arm joint, a slow joint, a gripper and a switch."""
    return Limits(
        names=("arm", "slow", "gripper", "switch"),
        lower=np.array([-1.0, -2.0, 0.0, 0.0]),
        upper=np.array([1.5, 2.0, 1.0, 1.0]),
        velocity=np.array([1.0, 0.2, 4.0, np.inf]),
        acceleration=np.array([5.0, 1.0, 40.0, np.inf]),
    )
