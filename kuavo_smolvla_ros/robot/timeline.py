"""What did the robot see at time t? The one rule, for the live node and for recordings.

An observation at t holds, per stream, the newest sample whose own stamp is <= t: never one from the future,
never one older than the stream's `max_age_ns`, and all of them within `max_skew_ns` of each other (newest
minus oldest). Where that cannot be had there is no observation but a reason; nothing is filled in.

Live and recorded agree because of *when* is asked. A sample stamped before t may still be on its way at t, so
the live node does not ask about now: it asks about the newest time every stream has already reached
(`Timeline.latest`). What arrives afterwards is stamped later and cannot change that answer, and
`grid.sample_grid`, which has all of the recording in hand, picks the same samples for the same t. (It takes a
stream that arrives in the order of its stamps, as one publisher's does; a sample that overtakes another
within a stream is sorted in and counted as `LATE`.) The live node asks for one thing more, which a recording
cannot know: that the newest sample of each stream is within its age limit of now, so a stalled link is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Generic, TypeVar

from kuavo_smolvla_ros.robot.description import RobotSpec, Stream
from kuavo_smolvla_ros.robot.stream_buffer import (
    FUTURE_TOLERANCE_NS,
    MAX_REORDER_NS,
    Arrival,
    Sample,
    StreamBuffer,
)

__all__ = [
    "Arrival",
    "Budget",
    "NoObservation",
    "Observation",
    "Problem",
    "Reason",
    "Sample",
    "StreamBuffer",
    "Timeline",
    "judge",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Budget:
    """How old a stream's sample may be, and for how long its picture may stay the same (None: not watched).

    `max_age_ns` None means a held value, such as a command that stands until the next: it never grows too
    old, counts for no skew, and nobody waits for it.
    """

    max_age_ns: int | None
    max_frozen_ns: int | None = None

    def __post_init__(self) -> None:
        for limit in (self.max_age_ns, self.max_frozen_ns):
            if limit is not None and limit <= 0:
                raise ValueError(f"a limit of {limit} ns admits nothing")

    @classmethod
    def of(cls, stream: Stream, max_frozen_s: float | None = None) -> Budget:
        return cls(
            max_age_ns=nanoseconds(stream.max_age_s) if isfinite(stream.max_age_s) else None,
            max_frozen_ns=None if max_frozen_s is None else nanoseconds(max_frozen_s),
        )


class Reason(Enum):
    MISSING = "missing"
    FORGOTTEN = "forgotten"
    STALE = "stale"
    DEAD = "dead"
    SKEWED = "skewed"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that stands in the way of an observation; `str` of it is the sentence for the operator."""

    reason: Reason
    stream: str
    measured_ns: int | None = None
    limit_ns: int | None = None
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.stream}: {self._sentence()}{self.note}"

    def _sentence(self) -> str:
        if self.measured_ns is None or self.limit_ns is None:
            if self.reason is Reason.MISSING:
                return "no sample with a stamp at or before this time"
            return "only later samples are kept (the clock was set, or this time is too long ago)"
        measured, limit = _ms(self.measured_ns), _ms(self.limit_ns)
        return {
            Reason.STALE: f"its sample is {measured} old, allowed are {limit}",
            Reason.DEAD: f"its picture has not changed for {measured}, allowed are {limit}",
            Reason.SKEWED: f"its sample lies {measured} before the newest of the others, allowed are {limit}",
        }[self.reason]


@dataclass(frozen=True, slots=True)
class Observation(Generic[T]):
    """One sample per stream, as of `t_ns`."""

    t_ns: int
    samples: Mapping[str, Sample[T]]
    skew_ns: int

    def age_ns(self, stream: str) -> int:
        return self.t_ns - self.samples[stream].stamp_ns


@dataclass(frozen=True, slots=True)
class NoObservation:
    """Why there is none at `t_ns`: everything that stands in the way, in the streams' order."""

    t_ns: int
    problems: tuple[Problem, ...]

    @property
    def reason(self) -> Reason:
        return self.problems[0].reason

    @property
    def stream(self) -> str:
        return self.problems[0].stream

    def __str__(self) -> str:
        return "; ".join(map(str, self.problems))


class Timeline(Generic[T]):
    """The streams an observation is made of, live. Not locked: one thread pushes and asks."""

    def __init__(
        self,
        budgets: Mapping[str, Budget],
        max_skew_ns: int | None,
        *,
        max_reorder_ns: int = MAX_REORDER_NS,
        future_tolerance_ns: int = FUTURE_TOLERANCE_NS,
    ) -> None:
        ages = [budget.max_age_ns for budget in budgets.values() if budget.max_age_ns is not None]
        if not ages:
            raise ValueError(
                "at least one stream needs an age limit: nothing else says how far time has come"
            )
        # A stream may run ahead of the slowest one by that one's age limit before there is no observation
        # anyway.
        memory_ns = max(max(ages) + future_tolerance_ns, max_reorder_ns)
        self.budgets = dict(budgets)
        self.max_skew_ns = max_skew_ns
        self.buffers: dict[str, StreamBuffer[T]] = {
            name: StreamBuffer(
                name, memory_ns, max_reorder_ns=max_reorder_ns, future_tolerance_ns=future_tolerance_ns
            )
            for name in budgets
        }

    @classmethod
    def for_inputs(cls, spec: RobotSpec, max_frozen_s: float | None = None) -> Timeline[T]:
        """All inputs of a robot; pictures may stay the same for `max_frozen_s` (None: not watched)."""
        pictures = {camera.stream for camera in spec.cameras.values()}
        budgets = {
            name: Budget.of(stream, max_frozen_s if name in pictures else None)
            for name, stream in spec.inputs.items()
        }
        return cls(budgets, nanoseconds(spec.max_skew_s))

    def push(
        self, name: str, stamp_ns: int, item: T, digest: int | None = None, now_ns: int | None = None
    ) -> Arrival:
        """Take in a sample of stream `name`; a stream whose picture is watched needs its `digest`."""
        if digest is None and self.budgets[name].max_frozen_ns is not None:
            raise ValueError(f"{name}: its picture is watched for change, so each sample needs its digest")
        return self.buffers[name].push(stamp_ns, item, digest, now_ns)

    def settled_ns(self) -> int | None:
        """The newest time that all streams (but held values) have reached; None while one has no sample."""
        newest = list(self._newest().values())
        return None if None in newest else min(stamp for stamp in newest if stamp is not None)

    def observe(self, t_ns: int) -> Observation[T] | NoObservation:
        """The observation as of t, from what has arrived so far; `latest` chooses the t that will stand."""
        found = {name: buffer.asof(t_ns) for name, buffer in self.buffers.items()}
        outcome = judge(t_ns, found, self.budgets, self.max_skew_ns)
        if isinstance(outcome, Observation):
            return outcome
        return NoObservation(t_ns, tuple(map(self._explain, outcome.problems)))

    def latest(self, now_ns: int) -> Observation[T] | NoObservation:
        """The newest observation that no later arrival can change; none while a stream's newest is too old.

        A stream that pauses within its limit holds the time back: the same observation is given again.
        """
        stalled = [
            self._stale(name, now_ns - newest, limit)
            for name, newest in self._newest().items()
            if newest is not None
            and (limit := self.budgets[name].max_age_ns) is not None
            and now_ns - newest > limit
        ]
        if stalled:
            return NoObservation(now_ns, tuple(stalled))
        settled = self.settled_ns()
        return self.observe(now_ns if settled is None else min(now_ns, settled))

    def clear(self) -> None:
        """Forget all samples, as after the clock was set."""
        for buffer in self.buffers.values():
            buffer.clear()

    def _newest(self) -> dict[str, int | None]:
        return {
            name: buffer.newest_ns
            for name, buffer in self.buffers.items()
            if self.budgets[name].max_age_ns is not None
        }

    def _explain(self, problem: Problem) -> Problem:
        """Add what only the buffer knows."""
        if problem.reason is Reason.MISSING and self.buffers[problem.stream].has_forgotten:
            return Problem(Reason.FORGOTTEN, problem.stream)
        if (
            problem.reason is Reason.STALE
            and problem.measured_ns is not None
            and problem.limit_ns is not None
        ):
            return self._stale(problem.stream, problem.measured_ns, problem.limit_ns)
        return problem

    def _stale(self, name: str, age_ns: int, limit_ns: int) -> Problem:
        repeats = self.buffers[name].repeats_of_newest
        note = f" ({repeats} messages since then repeat its stamp: the driver is stuck)" if repeats else ""
        return Problem(Reason.STALE, name, age_ns, limit_ns, note)


def judge(
    t_ns: int,
    found: Mapping[str, Sample[T] | None],
    budgets: Mapping[str, Budget],
    max_skew_ns: int | None,
) -> Observation[T] | NoObservation:
    """The rule itself: do these samples, the newest at t, make an observation?"""
    samples = {name: sample for name, sample in found.items() if sample is not None}
    problems = tuple(_shortcomings(found, budgets, t_ns))
    if problems:
        return NoObservation(t_ns, problems)
    stamps = {n: s.stamp_ns for n, s in samples.items() if budgets[n].max_age_ns is not None}
    skew_ns = max(stamps.values()) - min(stamps.values()) if stamps else 0
    if max_skew_ns is not None and skew_ns > max_skew_ns:
        oldest = min(stamps, key=stamps.__getitem__)
        return NoObservation(t_ns, (Problem(Reason.SKEWED, oldest, skew_ns, max_skew_ns),))
    return Observation(t_ns, samples, skew_ns)


def _shortcomings(
    found: Mapping[str, Sample[T] | None], budgets: Mapping[str, Budget], t_ns: int
) -> Iterator[Problem]:
    for name, sample in found.items():
        budget = budgets[name]
        if sample is None:
            yield Problem(Reason.MISSING, name)
            continue
        age_ns, frozen_ns = t_ns - sample.stamp_ns, sample.stamp_ns - sample.unchanged_since_ns
        if budget.max_age_ns is not None and age_ns > budget.max_age_ns:
            yield Problem(Reason.STALE, name, age_ns, budget.max_age_ns)
        elif budget.max_frozen_ns is not None and frozen_ns > budget.max_frozen_ns:
            yield Problem(Reason.DEAD, name, frozen_ns, budget.max_frozen_ns)


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _ms(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.0f} ms"
