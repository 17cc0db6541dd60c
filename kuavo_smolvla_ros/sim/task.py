"""What a task is: a scene, a start, and points earned.

To add a task, write one module with a class derived from `Task`. It may lie anywhere (`sim/own_tasks.py`;
docs/tutorial.md walks through it); the package's own stand in `sim/tasks/` and are named in its
`__init__.py`:

1. Set the class attributes (number, name, instruction, limits of time, head pitch, `mobile`). The pose an
   episode starts in is the robot description's `ready_pose`, by default `task<number>_ready`.
2. `build(spec)` adds tables, fixtures and loose bodies with the helpers of `sim/scene.py`. The robot, the
   floor and the lights are there already. The world frame is the robot's: origin below its base, +x ahead.
3. `place(sim, rng)` puts the loose bodies and fixtures where this episode starts. All chance comes from
   `rng`; `self.level` chooses between the narrow and the contest's ranges. Never keep state outside the
   simulation.
4. `points(sim)` returns, for the present state alone, what each part of the score earns now. The simulation
   asks ten times a second and keeps the best of each part.
5. `succeeded(sim, best)` says whether the whole task is done: the parts that must have been earned, and
   where things must be lying now.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.robot.spec import load_spec

if TYPE_CHECKING:
    from kuavo_smolvla_ros.sim.simulation import Simulation


class Level(str, Enum):
    """How far the start varies and how exact the placing must be."""

    EASY = "easy"
    CONTEST = "contest"


@dataclass(frozen=True)
class TimeBonus:
    """Points for finishing early: `full` up to `until_s`, then `loss_per_s` less for every second."""

    full: float
    until_s: float
    loss_per_s: float

    def at(self, time_s: float) -> float:
        return max(0.0, self.full - self.loss_per_s * max(0.0, time_s - self.until_s))


@dataclass(frozen=True)
class Score:
    """Points by part (best so far), points for time (only after success), and whether the task is done."""

    parts: Mapping[str, float]
    time_points: float
    success: bool

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.time_points


class Task(ABC):
    """One of the contest's tasks at one level; see the module for how to write another."""

    number: ClassVar[int]
    name: ClassVar[str]
    instruction: ClassVar[str]
    time_limit_s: float
    """When an episode is over; a task may give each level its own."""
    time_bonus: ClassVar[TimeBonus]
    head_pitch_rad: ClassVar[float] = 0.2094
    mobile: ClassVar[bool] = False
    """Whether the base moves; then an action has four entries more."""
    ready_pose: ClassVar[str] = ""
    """One of the robot description's poses; empty: `task<number>_ready`."""

    def __init__(self, level: Level = Level.EASY) -> None:
        self.level = Level(level)

    @property
    def robot(self) -> str:
        """The description of the simulated robot that can do it."""
        return "kuavo_mobile" if self.mobile else "kuavo_sim"

    def ready_state(self) -> NDArray[np.float64]:
        """The 16-wide state an episode starts in: the robot description's ready pose of this task,
        grippers open."""
        spec = load_spec(self.robot)
        name = self.ready_pose or f"task{self.number}_ready"
        if name not in spec.poses:
            raise UsageError(
                f"{spec.name} has no pose {name}; set ready_pose of {type(self).__name__} to one of "
                f"{', '.join(spec.poses)}"
            )
        pose = spec.poses[name]
        return np.array([pose.get(name, 0.0) for name in spec.state_names])

    @abstractmethod
    def build(self, spec: mujoco.MjSpec) -> None:
        """Add everything that is not the robot or the room."""

    @abstractmethod
    def place(self, sim: Simulation, rng: np.random.Generator) -> None:
        """Put things where the episode starts."""

    @abstractmethod
    def points(self, sim: Simulation) -> dict[str, float]:
        """What each part of the score would earn for the present state alone."""

    @abstractmethod
    def succeeded(self, sim: Simulation, best: Mapping[str, float]) -> bool:
        """Whether the task is done, given the best points so far."""


def draw(rng: np.random.Generator, low: float, high: float, level: Level) -> float:
    """A number from the contest's range, or from its middle third at the easy level."""
    if level is Level.EASY:
        third = (high - low) / 3
        low, high = low + third, high - third
    return float(rng.uniform(low, high))


def tilt_rad(rotation: NDArray[np.float64], axis: int = 2) -> float:
    """Angle between a body's axis and the world's vertical."""
    return float(np.arccos(np.clip(rotation[2, axis], -1.0, 1.0)))
