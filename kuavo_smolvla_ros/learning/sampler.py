"""Which samples stand in which batch: a function of the seed, the step and the rank, and of nothing else.

Nothing is drawn and remembered. The n-th sample a task ever contributes is the n-th entry of that task's
endless row of shuffled passes over its samples; how many it has contributed before a step is known from the
quotas. So a run continues at any step, and any number of devices sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.chance import key_of, permutation, uniform
from kuavo_smolvla_ros.learning.quota import Quotas
from kuavo_smolvla_ros.learning.stage import BatchLayout, Stage, StageError

_PERMUTATIONS = 64  # kept in memory: two passes of each task at a time, with room


class Draw(NamedTuple):
    """One place in a batch: which task, which of its frames, which of its sentences (0: the instruction).

    Behind the task's own sentences are numbered those at which the robot holds.
    """

    task: int
    frame: int
    sentence: int


class Exposure(NamedTuple):
    """What a task contributed before a step."""

    samples: int
    share: float
    passes: float  # over its own samples
    unique_share: float  # of its samples, seen at least once


@dataclass(frozen=True)
class Pool:
    """The frames a task is trained on, and the sentences they may carry."""

    name: str
    frames: NDArray[np.int64]
    sentences: int = 1
    paraphrase_share: float = 0.0
    hold_sentences: int = 0
    hold_share: float = 0.0


class BatchPlan:
    """Every batch of a stage, by its step (from 0)."""

    def __init__(self, pools: Sequence[Pool], quotas: Quotas, seed: int) -> None:
        if quotas.counts(0).shape != (len(pools),):
            raise UsageError(f"{len(pools)} tasks, but quotas for {quotas.counts(0).size}")
        for pool, due in zip(pools, quotas.before(quotas.period), strict=True):
            if due and not len(pool.frames):
                raise StageError(f"{pool.name} has a share of the batches but no training sample")
        self.pools, self.quotas, self.seed = tuple(pools), quotas, seed
        self._order = lru_cache(maxsize=_PERMUTATIONS)(self._shuffled)

    @classmethod
    def of_stage(cls, stage: Stage, frames: Sequence[NDArray[np.int64]]) -> BatchPlan:
        """The plan for a stage, given each of its tasks' training frames."""
        pools = [
            Pool(
                task.name,
                own,
                len(task.sentences),
                task.paraphrase_share,
                len(task.hold_sentences),
                task.hold_share,
            )
            for task, own in zip(stage.tasks, frames, strict=True)
        ]
        return cls(pools, Quotas(stage.shares, stage.training.effective_batch_size), stage.training.seed)

    def batch(self, step: int) -> list[Draw]:
        """The whole batch of a step, task by task."""
        before, counts = self.quotas.before(step), self.quotas.counts(step)
        return [
            draw
            for task, (first, count) in enumerate(zip(before.tolist(), counts.tolist(), strict=True))
            for draw in self.draws(task, first, count)
        ]

    def part(self, step: int, layout: BatchLayout, rank: int, micro: int) -> list[Draw]:
        """What one device computes at one accumulation step: every task's share of it, give or take one."""
        if layout.total != self.quotas.batch_size or not 0 <= rank < layout.devices:
            raise UsageError(
                f"rank {rank} of a batch of {layout.total} asked for, the plan is for batches of "
                f"{self.quotas.batch_size} on {layout.devices} devices"
            )
        parts = layout.devices * layout.accumulation
        # Dealt like cards, and beginning elsewhere each time: else the same device would always get the odd
        # one.
        first = (micro * layout.devices + rank - step) % parts
        return self.batch(step)[first::parts]

    def draws(self, task: int, first: int, count: int) -> list[Draw]:
        """The task's samples number `first` to `first + count - 1` since the beginning of the stage."""
        if not count:
            return []
        pool = self.pools[task]
        numbers = np.arange(first, first + count)
        passes, places = np.divmod(numbers, len(pool.frames))
        frames = np.concatenate(
            [self._order(task, int(p))[places[passes == p]] for p in range(passes[0], passes[-1] + 1)]
        )
        sentences = np.zeros(count, np.int64)
        for kind, share, first_of_kind, many in (
            ("sentence", pool.paraphrase_share, 1, pool.sentences - 1),
            ("hold", pool.hold_share, pool.sentences, pool.hold_sentences),
        ):
            if share and many:
                chance = uniform(key_of(kind, self.seed, pool.name), numbers)
                which = np.minimum(np.floor(chance / share * many).astype(np.int64), many - 1)
                sentences = np.where(chance < share, first_of_kind + which, sentences)
        return [Draw(task, f, s) for f, s in zip(frames.tolist(), sentences.tolist(), strict=True)]

    def exposure(self, step: int) -> dict[str, Exposure]:
        """What each task contributed before this step."""
        drawn = self.quotas.before(step)
        total = max(int(drawn.sum()), 1)
        return {
            pool.name: Exposure(
                count,
                count / total,
                count / max(len(pool.frames), 1),
                min(count / max(len(pool.frames), 1), 1.0),
            )
            for pool, count in zip(self.pools, drawn.tolist(), strict=True)
        }

    def _shuffled(self, task: int, number: int) -> NDArray[np.int64]:
        pool = self.pools[task]
        return pool.frames[permutation(key_of("pass", self.seed, pool.name, number), len(pool.frames))]


class MixedBatchSampler(Sampler[list[Draw]]):
    """One device's batches from `first_step` to `last_step` (exclusive), `accumulation` per step.

    Goes to `DataLoader(batch_sampler=...)` as it is; it already divides batches among devices, so the
    loader must not be divided again (with Accelerate: do not prepare it).
    """

    def __init__(
        self, plan: BatchPlan, layout: BatchLayout, rank: int, last_step: int, first_step: int = 0
    ) -> None:
        self.plan, self.layout, self.rank = plan, layout, rank
        self.first_step, self.last_step = first_step, last_step
        plan.part(first_step, layout, rank, 0)  # says now what would be wrong later

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first_step, self.last_step):
            for micro in range(self.layout.accumulation):
                yield self.plan.part(step, self.layout, self.rank, micro)

    def __len__(self) -> int:
        return max(self.last_step - self.first_step, 0) * self.layout.accumulation
