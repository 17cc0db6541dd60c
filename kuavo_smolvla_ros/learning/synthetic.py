"""Tasks that provably conflict: the same pictures and states, and for every instruction another movement.

Only the instruction tells what to do, so a policy that forgets one cannot hide it. Small enough to be
learnt from nothing on two cores within minutes; for tests, and to try out a curriculum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kuavo_smolvla_ros.learning.chance import key_of
from kuavo_smolvla_ros.learning.schedule import Schedule
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.sources import ACTION, IMAGES, STATE, Facts, Frames, TaskSource
from kuavo_smolvla_ros.learning.stage import (
    Curriculum,
    Initialisation,
    Optimizer,
    Stage,
    TaskData,
    Thresholds,
    Training,
    Validation,
)
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING

JOINTS = ("left_1_joint", "left_2_joint", "left_gripper", "right_1_joint", "right_2_joint", "right_gripper")
SIDE = 32  # pixels of the picture
CHUNK = 8


@dataclass(frozen=True)
class ConflictFrames:
    """Frames whose observations are those of every other task, and whose actions are this task's own.

    Arm joints move from the state towards the task's goal, grippers open or close; `extra` further actions
    behind the joints stand for a base.
    """

    goal: tuple[float, ...]
    episodes: int
    length: int
    chunk_size: int
    extra: int = 0
    seed: int = 0
    noise: float = 0.02  # rad; what no policy can learn
    made: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.episodes * self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self.made:  # drawing a sample takes a tenth of what training on it does
            self.made[index] = self._make(index)
        return dict(self.made[index])

    def _make(self, index: int) -> dict[str, Any]:
        episode, now = divmod(index, self.length)
        steps = now + np.arange(self.chunk_size)
        observed = np.random.default_rng(key_of("observation", self.seed, index))
        own = np.random.default_rng(key_of("action", self.seed, index, self.goal))
        start = np.random.default_rng(key_of("start", self.seed, episode)).uniform(-0.3, 0.3, len(JOINTS))
        state = start + observed.normal(0, self.noise, len(JOINTS))
        part = np.clip((np.arange(self.chunk_size) + 1) / self.chunk_size, 0, 1)[:, None]
        wide = np.concatenate([start, np.zeros(self.extra)])
        action = (
            wide + (np.asarray(self.goal) - wide) * part + own.normal(0, self.noise, (len(part), len(wide)))
        )
        past = torch.from_numpy(steps >= self.length)
        return {
            STATE: torch.from_numpy(state).float(),
            ACTION: torch.where(past[:, None], 0.0, torch.from_numpy(action).float()),
            ACTION_STEP_PADDING: past,
            IMAGES + "head_cam_h": torch.from_numpy(
                observed.integers(0, 255, (3, SIDE, SIDE), np.uint8).astype(np.float32) / 255
            ),
        }


def conflicting_tasks(
    names: Sequence[str],
    *,
    episodes: int = 24,
    length: int = 20,
    chunk_size: int = CHUNK,
    extra_of_last: int = 2,
    seed: int = 0,
) -> dict[str, TaskSource]:
    """A source for each name; with `extra_of_last`, the last one has so many actions more."""
    sources = {}
    for number, name in enumerate(names):
        extra = extra_of_last if number == len(names) - 1 else 0
        frames = ConflictFrames(_goal(number, extra), episodes, length, chunk_size, extra, seed)
        facts = Facts(
            10.0,
            JOINTS,
            JOINTS + tuple(f"base_{i}" for i in range(extra)),
            {"head_cam_h": (SIDE, SIDE)},
            f"synthetic-{len(JOINTS) + extra}",
        )
        numbers = np.repeat(np.arange(episodes, dtype=np.int64), length)
        sources[name] = TaskSource(name, frames, numbers, facts, statistics_of(frames))
    return sources


def _goal(number: int, extra: int) -> tuple[float, ...]:
    """Opposite corners for neighbouring tasks, and no two tasks alike."""
    signs = [(1, 1), (-1, -1), (1, -1), (-1, 1)][number % 4]
    size = 1.0 / (1 + number // 4)
    left, right = (sign * size for sign in signs)
    return (left, right, float(left > 0), right, left, float(right > 0), *(left,) * extra)


def statistics_of(frames: Frames) -> Mapping[str, Mapping[str, Any]]:
    """Mean, deviation and extremes of states, and of actions over whole chunks."""
    samples = [frames[index] for index in range(len(frames))]
    result = {}
    for key in (STATE, ACTION):
        values = torch.stack([s[key] if key == STATE else s[key][0] for s in samples]).numpy()
        if key == ACTION:
            # Over whole chunks: the first action alone stays near the state.
            values = np.concatenate([s[key].numpy()[~s[ACTION_STEP_PADDING].numpy()] for s in samples])
        result[key] = {
            "mean": values.mean(0),
            "std": values.std(0),
            "min": values.min(0),
            "max": values.max(0),
        }
    return result


SENTENCES = ("raise both arms", "lower both arms", "left up and right down", "left down and right up")
# The curriculum's own shares and course of rates.
SHARES = (("1",), ("0.2", "0.8"), ("0.1", "0.2", "0.7"), ("0.1", "0.1", "0.2", "0.6"))
RATES = (1.0, 0.7, 0.5, 0.4)
LENGTHS = (1.0, 1.25, 1.5, 1.75)  # in epochs
UNFROZEN = ((-1, -2, -3), (-1, -2, -3), (-1, -2), (-1,))  # of the tiny network's four vision layers


def synthetic_curriculum(
    epochs: int = 16,
    *,
    lr: float = 3e-3,
    batch_size: int = 32,
    freq_epochs: int = 4,
    noise_samples: int = 4,
    extra_of_last: int = 2,
    **training: Any,
) -> Curriculum:
    """The four stages in small, the tiny network from nothing: same shares, course of rates and lengths.

    Less and less of vision trains. `epochs` and `lr` are the first stage's.
    """
    tasks: list[TaskData] = []
    stages: list[Stage] = []
    for number, sentence in enumerate(SENTENCES):
        name = f"task{number + 1}"
        tasks.append(TaskData(number + 1, name, f"moves the arms: {sentence}", sentence, ("synthetic",), 0.2))
        rate = lr * RATES[number]
        stages.append(
            Stage(
                name=name,
                tasks=tuple(tasks),
                shares=tuple(Fraction(share) for share in SHARES[number]),
                init=Initialisation("scratch") if number == 0 else Initialisation("task", stages[-1].name),
                optimizer=Optimizer(rate, rate / 10, (0.9, 0.999), 1e-8, 5e-7, 1.0),
                schedule=Schedule(20, 100_000, 1e-5),
                training=Training(round(epochs * LENGTHS[number]), batch_size, 0, "no", **training),
                validation=Validation(freq_epochs, 64, noise_samples, 1234),
                thresholds=Thresholds(0.5, 0.7, 0.8, 1.4, 1.6),
                policy=(
                    ("backbone", "tiny"),
                    ("chunk_size", CHUNK),
                    ("max_action_dim", len(JOINTS) + extra_of_last),
                    ("max_state_dim", len(JOINTS)),
                    ("n_action_steps", CHUNK // 2),
                    ("num_steps", 5),
                    ("tokenizer_max_length", 16),
                    ("train_expert_only", False),
                    ("unfreeze_vision_layers", UNFROZEN[number]),
                ),
            )
        )
    return tuple(stages)


def synthetic_run(root: Path, **settings: Any) -> RunSettings:
    """Settings for a run of seconds, on the processor and in one process."""
    return RunSettings(
        **{
            "output_root": str(root),
            "batch_size": 32,
            "num_workers": 0,
            "prefetch_factor": 2,
            "device": "cpu",
            "robot": None,
            "compile": False,
            "feature_cache": "auto",
            "shard": False,
            "log_freq_steps": 10,
            "save_freq_epochs": 1000,
            "save_freq_steps": 1000,
            "keep_last": 0,
            "min_free_gib": 0.1,
            "tensorboard": False,
            "wandb": False,
            "push_to_hub": None,
            **settings,
        }
    )
