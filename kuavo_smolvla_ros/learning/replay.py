"""What each stage may train on: held-out episodes apart, and of earlier tasks a buffer that is spread out.

Buffers are lists of frame numbers, never copies. All of them are beginnings of one row per task, in which
every beginning is spread over episodes and phases; a smaller buffer is therefore part of every larger one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.chance import key_of, permutation, words
from kuavo_smolvla_ros.learning.sampler import BatchPlan, MixedBatchSampler
from kuavo_smolvla_ros.learning.sources import DataError, Facts, TaskSource, require_agreement, widest
from kuavo_smolvla_ros.learning.stage import BatchLayout, Stage, TaskData

Indices = NDArray[np.int64]

# A sequence that fills a square evenly, point by point: powers of the inverse of 1.3247..., the root of
# x^3 = x + 1. One side is the order of episodes, the other the phase each begins with.
_ROOT = 1.32471795724474602596
_SIDES = (1 / _ROOT, 1 / _ROOT**2)


class ReplayError(UserError):
    """A stored buffer does not belong to the data at hand."""


@dataclass(frozen=True)
class Split:
    """A task's frames, by whether their episode is held out."""

    training: Indices
    held_out: Indices
    held_out_episodes: tuple[int, ...]


def split(episodes: Indices, share: float, seed: int, name: str) -> Split:
    """Hold out this share of the episodes, at least one, chosen by chance and independent of their order."""
    numbers = np.unique(episodes)
    count = max(math.ceil(share * len(numbers) - 1e-9), 1)
    if count >= len(numbers):
        raise DataError(
            f"{name} has {len(numbers)} episode{'s'[: len(numbers) != 1]}, of which {count} would be held "
            "out: nothing would be left to train on; record more, or lower data.held_out_share"
        )
    chosen = np.sort(numbers[np.argsort(words(key_of("split", seed, name), numbers), kind="stable")[:count]])
    held = np.isin(episodes, chosen)
    return Split(np.flatnonzero(~held), np.flatnonzero(held), tuple(chosen.tolist()))


def spread_order(frames: Indices, episodes: Indices, key: int) -> Indices:
    """The frames in an order whose every beginning is spread over episodes and phases.

    `episodes` is the episode of each frame. Episodes contribute in proportion to their length; the frames of
    one halve its largest gap again and again, beginning at a phase that differs from episode to episode.
    """
    numbers, place = np.unique(episodes, return_inverse=True)
    rank = np.empty(len(numbers), np.int64)
    rank[permutation(key, len(numbers))] = np.arange(len(numbers))
    turn, phase = ((0.5 + side * rank) % 1.0 for side in _SIDES)
    lengths = np.bincount(place)
    by_episode = np.argsort(place, kind="stable")
    within = np.empty(len(frames), np.int64)  # position inside the episode
    within[by_episode] = np.arange(len(frames)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    gaps = _reversed_bits((within / lengths[place] + phase[place]) % 1.0)
    order = np.lexsort((gaps, place))
    number = np.empty(len(frames), np.int64)  # how many frames of the episode come before this one
    number[order] = np.arange(len(frames)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    due = (number + turn[place]) / lengths[place]
    return frames[np.lexsort((rank[place], due))]


def _reversed_bits(phase: NDArray[np.float64]) -> NDArray[np.uint64]:
    """The first 32 binary digits of a number in 0..1, read backwards: small numbers lie far apart."""
    x = np.floor(phase * 2.0**32).astype(np.uint64)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        s, m = np.uint64(shift), np.uint64(mask)
        x = ((x >> s) & m) | ((x & m) << s)
    return x


def buffer_sizes(available: Sequence[int], limit: int | None) -> tuple[int, ...]:
    """What of each earlier task is kept: the same for all, and what small ones leave goes to the others."""
    if limit is None:
        return tuple(available)
    sizes, left = [0] * len(available), limit
    for position, task in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        sizes[task] = min(available[task], left // (len(available) - position))
        left -= sizes[task]
    return tuple(sizes)


@dataclass(frozen=True)
class Buffer:
    """The frames of an earlier task that replay draws from, by number."""

    task: str
    frames: Indices
    available: int  # training frames the task has
    source: str  # digest of the data the numbers refer to

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.frames.astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "available": self.available,
            "source": self.source,
            "sha256": self.sha256,
            "frames": self.frames.tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Buffer:
        frames = np.asarray(content["frames"], np.int64)
        buffer = cls(content["task"], frames, int(content["available"]), content["source"])
        if buffer.sha256 != content["sha256"]:
            raise ReplayError(f"the stored buffer of {buffer.task} was changed: its hash differs")
        return buffer


class ReplayDatasetManager:
    """The data of a stage: splits, buffers and the plan of its batches. All checks are made here."""

    def __init__(self, stage: Stage, sources: Mapping[str, TaskSource]) -> None:
        self.stage = stage
        absent = [name for name in stage.task_names if name not in sources]
        if absent:
            raise DataError(f"{stage.name} needs the data of {', '.join(absent)}, which is not given")
        self.sources = tuple(sources[name] for name in stage.task_names)
        checked: dict[str, Facts] = {}
        for source in self.sources:
            require_agreement(source.name, source.facts, checked)
            checked[source.name] = source.facts
        self.facts = widest(list(checked.values()))
        self.splits = tuple(
            split(source.episodes, task.held_out_share, task.split_seed, task.name)
            for task, source in zip(stage.tasks, self.sources, strict=True)
        )
        sizes = buffer_sizes([len(s.training) for s in self.splits[:-1]], stage.buffer_frames)
        self.buffers = tuple(self._buffer(i, size) for i, size in enumerate(sizes))
        self.training_frames = (*(buffer.frames for buffer in self.buffers), self.splits[-1].training)
        for task, frames, share in zip(stage.tasks, self.training_frames, stage.shares, strict=True):
            if share and not len(frames):
                raise DataError(
                    f"{task.name} has a share of {float(share):g} but no frame to replay: raise "
                    f"replay.buffer_frames ({stage.buffer_frames})"
                )
        self.plan = BatchPlan.of_stage(stage, self.training_frames)

    @property
    def own_samples(self) -> int:
        """Training samples of the stage's own task, by which its length is counted."""
        return len(self.training_frames[-1])

    @property
    def total_steps(self) -> int:
        return self.stage.total_steps(self.own_samples)

    @property
    def steps_per_epoch(self) -> int:
        return self.stage.steps_per_epoch(self.own_samples)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all data the stage trains on: which frames, of which data sets."""
        parts = [
            (source.digest, hashlib.sha256(frames.astype("<i8").tobytes()).hexdigest())
            for source, frames in zip(self.sources, self.training_frames, strict=True)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def sampler(self, layout: BatchLayout, rank: int, first_step: int = 0) -> MixedBatchSampler:
        """One device's batches from a step to the end of the stage."""
        return MixedBatchSampler(self.plan, layout, rank, self.total_steps, first_step)

    def validation_frames(self, task: TaskData) -> Indices:
        """Held-out frames of a task, spread over its held-out episodes; always the same ones, ascending."""
        index = self.stage.task_names.index(task.name)
        held, episodes = self.splits[index].held_out, self.sources[index].episodes
        order = spread_order(held, episodes[held], key_of("validation", task.split_seed, task.name))
        return np.sort(order[: self.stage.validation.max_frames_per_task])

    def buffers_json(self) -> dict[str, Any]:
        """What is replayed, for a checkpoint."""
        return {"stage": self.stage.name, "buffers": [buffer.to_json() for buffer in self.buffers]}

    def require_buffers(self, file: Path) -> None:
        """Fail unless a checkpoint's buffers are those of this stage, or what this stage makes smaller."""
        stored = {
            content["task"]: Buffer.from_json(content)
            for content in json.loads(file.read_text(encoding="utf-8"))["buffers"]
        }
        for buffer in self.buffers:
            if buffer.task not in stored:
                continue  # it was the own task of that stage, all of whose data was there
            old = stored[buffer.task]
            if old.source != buffer.source:
                raise ReplayError(
                    f"the data of {buffer.task} is not what {file} was made with ({old.source}, now "
                    f"{buffer.source}); give the same data, or train the stages again"
                )
            missing = len(np.setdiff1d(buffer.frames, old.frames))
            if missing:
                raise ReplayError(
                    f"the buffer of {buffer.task} would need {missing} frames that {file} no longer holds: "
                    f"replay.buffer_frames may fall from stage to stage, not rise"
                )

    def _buffer(self, index: int, size: int) -> Buffer:
        task, source, frames = self.stage.tasks[index], self.sources[index], self.splits[index].training
        if size < len(frames):
            key = key_of("buffer", task.split_seed, task.name)
            frames = np.sort(spread_order(frames, source.episodes[frames], key)[:size])
        return Buffer(task.name, frames, len(self.splits[index].training), source.digest)
