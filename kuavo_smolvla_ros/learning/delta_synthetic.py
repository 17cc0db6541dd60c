"""Made-up tasks in which a newer state says something: arms that are pushed about while a pose is held.

Each arm joint is off by a slowly wandering amount, which the state shows, and the demonstrator leans against
it. What the wandering will be in some steps is not known when a chunk is made, and partly known later; so how
much a chunk loses with age, and how much of that a newer state gives back, can be measured and worked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kuavo_smolvla_ros.learning.chance import key_of
from kuavo_smolvla_ros.learning.sources import ACTION, IMAGES, STATE, Facts, TaskSource, pooled_stats
from kuavo_smolvla_ros.learning.synthetic import CHUNK, JOINTS, SIDE, statistics_of
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING

KEPT = 0.9  # of the offset from step to step
PUSH = 0.1  # rad: the part of it that is new
LEAN = 0.8  # of the offset the demonstrator works against
SENSOR = 0.01  # rad
ARMS = tuple("gripper" not in name for name in JOINTS)


@dataclass(frozen=True)
class DriftFrames:
    """Frames of one task, which is a pose to hold; the picture shows nothing."""

    goal: tuple[float, ...]
    episodes: int
    length: int
    seed: int = 0

    def __len__(self) -> int:
        return self.episodes * self.length

    def offsets(self, episode: int) -> np.ndarray:
        """How far the joints are off at each step, (length, joints)."""
        random = np.random.default_rng(key_of("drift", self.seed, episode, self.goal))
        pushes = random.normal(0, PUSH, (self.length, len(JOINTS)))
        found = np.empty_like(pushes)
        found[0] = pushes[0] / np.sqrt(1 - KEPT**2)
        for step in range(1, self.length):
            found[step] = KEPT * found[step - 1] + pushes[step]
        return found * np.array(ARMS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        episode, now = divmod(index, self.length)
        offsets = self.offsets(episode)
        random = np.random.default_rng(key_of("sensor", self.seed, index, self.goal))
        steps = now + np.arange(CHUNK)
        past = torch.from_numpy(steps >= self.length)
        action = np.asarray(self.goal) - LEAN * offsets[np.minimum(steps, self.length - 1)]
        state = offsets[now] + random.normal(0, SENSOR, len(JOINTS))
        return {
            STATE: torch.from_numpy(state).float(),
            ACTION: torch.where(past[:, None], 0.0, torch.from_numpy(action).float()),
            ACTION_STEP_PADDING: past,
            IMAGES + "head_cam_h": torch.from_numpy(
                random.integers(0, 255, (3, SIDE, SIDE), np.uint8).astype(np.float32) / 255
            ),
        }


def drifting_tasks(
    names: Sequence[str], *, episodes: int = 24, length: int = 20, seed: int = 0
) -> dict[str, TaskSource]:
    """A source for each name: poses at the corners of a square."""
    every = []
    for number in range(len(names)):
        left, right = [(1, 1), (-1, -1), (1, -1), (-1, 1)][number % 4]
        goal = (left, right, float(left > 0), right, left, float(right > 0))
        every.append(DriftFrames(tuple(float(g) for g in goal), episodes, length, seed))
    # Of all tasks together: each alone holds one pose, and would call every other one far off.
    stats = pooled_stats([(statistics_of(frames), len(frames)) for frames in every])
    facts = Facts(10.0, JOINTS, JOINTS, {"head_cam_h": (SIDE, SIDE)}, "synthetic-drift")
    numbers = np.repeat(np.arange(episodes, dtype=np.int64), length)
    return {
        name: TaskSource(name, frames, numbers, facts, stats)
        for name, frames in zip(names, every, strict=True)
    }
