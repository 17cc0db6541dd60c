"""The recent samples of one stream, in the order of their stamps, whatever order they arrived in."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_REORDER_NS = (
    100_000_000  # time daemons slew a clock that is off by less than 128 ms and set back one that is more
)
FUTURE_TOLERANCE_NS = 20_000_000  # between machines that keep time by NTP; more would eat up the skew budget
RESTART_AFTER = 3  # one odd stamp must not wipe a stream; three in a row are a clock that was set back


class Arrival(Enum):
    """What became of a sample that arrived."""

    NEWEST = "newest"
    LATE = "late"  # behind the newest by no more than the reordering allowed: sorted in
    REPEATED = "repeated"  # a stamp that is already held: the first sample stays
    UNSTAMPED = "unstamped"  # stamp of zero or below: the driver does not fill it in
    FUTURE = "future"  # later than the clock here: the clocks disagree
    BEHIND = "behind"  # further back than any reordering: dropped, unless it goes on
    RESTARTED = "restarted"  # it went on: the clock was set back, all older samples are forgotten

    @property
    def kept(self) -> bool:
        return self in (Arrival.NEWEST, Arrival.LATE, Arrival.RESTARTED)


@dataclass(frozen=True, slots=True)
class Sample(Generic[T]):
    """One message, decoded or not.

    A driver that repeats one frame with fresh stamps passes every age check, so a picture can be watched:
    `digest` stands for its pixels, and a picture that equals the one before it has not changed since that
    one.
    """

    stamp_ns: int
    item: T
    digest: int | None = None
    unchanged_since_ns: int = 0


class StreamBuffer(Generic[T]):
    """Answers "which sample was the newest at t" for every t from `memory_ns` before the newest stamp on.

    Not locked: one thread pushes and asks. Samples returned are immutable and may be handed on.
    """

    def __init__(
        self,
        name: str,
        memory_ns: int,
        *,
        max_reorder_ns: int = MAX_REORDER_NS,
        future_tolerance_ns: int = FUTURE_TOLERANCE_NS,
    ) -> None:
        if not 0 <= max_reorder_ns <= memory_ns:
            raise ValueError(
                f"{name}: reordering of {max_reorder_ns} ns needs a memory of at least that, not {memory_ns}"
            )
        self.name = name
        self.counts: Counter[Arrival] = Counter()
        self.repeats_of_newest = 0
        self.has_forgotten = False
        self._memory_ns = memory_ns
        self._max_reorder_ns = max_reorder_ns
        self._future_tolerance_ns = future_tolerance_ns
        self._behind_in_a_row = 0
        self._stamps: list[int] = []
        self._samples: list[Sample[T]] = []

    @property
    def newest_ns(self) -> int | None:
        return self._stamps[-1] if self._stamps else None

    @property
    def stamps(self) -> Sequence[int]:
        """Stamps of what is held, oldest first; read it and let it go, it changes with the next sample."""
        return self._stamps

    def push(self, stamp_ns: int, item: T, digest: int | None = None, now_ns: int | None = None) -> Arrival:
        """Take in a sample; `now_ns` is the clock to hold its stamp against (live, always)."""
        arrival = self._classify(stamp_ns, now_ns)
        self.counts[arrival] += 1
        if arrival is Arrival.REPEATED and stamp_ns == self._stamps[-1]:
            self.repeats_of_newest += 1
        if arrival is Arrival.RESTARTED:
            self.clear()
        if arrival.kept:
            self._insert(stamp_ns, item, digest)
            self._forget()
        return arrival

    def asof(self, t_ns: int) -> Sample[T] | None:
        """The newest sample with stamp <= t, or None where no such sample is held."""
        position = bisect_right(self._stamps, t_ns)
        return self._samples[position - 1] if position else None

    def clear(self) -> None:
        """Forget all samples (the clock was set, or the robot starts anew); the counts stay."""
        self.has_forgotten = self.has_forgotten or bool(self._stamps)
        self.repeats_of_newest = self._behind_in_a_row = 0
        self._stamps.clear()
        self._samples.clear()

    def _classify(self, stamp_ns: int, now_ns: int | None) -> Arrival:
        if stamp_ns <= 0:
            return Arrival.UNSTAMPED
        if now_ns is not None and stamp_ns > now_ns + self._future_tolerance_ns:
            return Arrival.FUTURE
        if self._stamps and self._stamps[-1] - stamp_ns > self._max_reorder_ns:
            self._behind_in_a_row += 1
            return Arrival.RESTARTED if self._behind_in_a_row >= RESTART_AFTER else Arrival.BEHIND
        self._behind_in_a_row = 0
        if not self._stamps or stamp_ns > self._stamps[-1]:
            return Arrival.NEWEST
        held = self._stamps[bisect_left(self._stamps, stamp_ns)] == stamp_ns
        return Arrival.REPEATED if held else Arrival.LATE

    def _insert(self, stamp_ns: int, item: T, digest: int | None) -> None:
        position = bisect_left(self._stamps, stamp_ns)
        if position == len(self._stamps):
            self.repeats_of_newest = 0
        self._stamps.insert(position, stamp_ns)
        self._samples.insert(
            position, Sample(stamp_ns, item, digest, self._since(position, stamp_ns, digest))
        )
        # A picture sorted in may split or join a run of equal ones, so those after it are looked at again.
        for at in range(position + 1, len(self._samples)):
            after = self._samples[at]
            since_ns = self._since(at, after.stamp_ns, after.digest)
            self._samples[at] = replace(after, unchanged_since_ns=since_ns)

    def _since(self, position: int, stamp_ns: int, digest: int | None) -> int:
        if position == 0 or digest is None or self._samples[position - 1].digest != digest:
            return stamp_ns
        return self._samples[position - 1].unchanged_since_ns

    def _forget(self) -> None:
        # The sample that was newest at the far end of the memory is kept too: it answers for that time.
        keep_from = bisect_right(self._stamps, self._stamps[-1] - self._memory_ns) - 1
        if keep_from > 0:
            del self._stamps[:keep_from]
            del self._samples[:keep_from]
            self.has_forgotten = True
