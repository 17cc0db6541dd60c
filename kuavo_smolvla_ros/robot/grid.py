"""Observations over a whole recording, on a uniform grid of header time: `timeline`'s rule, vectorised.

A recording's stamps go through `admit` first (the live buffer's rules on repeated, reordered and missing
stamps), then `sample_grid` says for every grid time which sample of each stream the live timeline would have
chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kuavo_smolvla_ros.robot.stream_buffer import MAX_REORDER_NS, Arrival, Sample, StreamBuffer
from kuavo_smolvla_ros.robot.timeline import Budget, NoObservation, Observation, judge

Stamps = npt.NDArray[np.int64]

NS_PER_S = 1_000_000_000
_FINEST_RATE = 1001  # 30000/1001 Hz and every rate in whole hundredths are exact
_FOREVER_NS = 1 << 62


class Gap(NamedTuple):
    """A stretch without samples, from the last one before it to the first one after it."""

    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Recorded:
    """One stream's admitted stamps, rising, and the digests of its pictures where those are watched."""

    stamps_ns: Stamps
    digests: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.stamps_ns.dtype != np.int64 or self.stamps_ns.ndim != 1:
            raise ValueError(
                f"stamps are one row of int64, not {self.stamps_ns.shape} {self.stamps_ns.dtype}"
            )
        if np.any(self.stamps_ns[1:] <= self.stamps_ns[:-1]):
            raise ValueError("stamps must rise; pass them through admit() first")
        if self.digests is not None and self.digests.shape != self.stamps_ns.shape:
            raise ValueError(f"{self.digests.size} digests for {self.stamps_ns.size} stamps")


@dataclass(frozen=True)
class GridSamples:
    """What was chosen at each grid time.

    `usable` marks the times with an observation; `picks[stream]` are that stream's sample positions at just
    those.
    """

    grid_ns: Stamps
    usable: npt.NDArray[np.bool_]
    picks: Mapping[str, npt.NDArray[np.intp]]
    streams: Mapping[str, Recorded]
    budgets: Mapping[str, Budget]
    max_skew_ns: int | None

    def outcome(self, at: int) -> Observation[int] | NoObservation:
        """Grid time number `at` through the timeline's own rule; the samples' items are their positions."""
        t_ns = int(self.grid_ns[at])
        found = {name: _asof(stream, t_ns) for name, stream in self.streams.items()}
        return judge(t_ns, found, self.budgets, self.max_skew_ns)

    def runs(self) -> list[slice]:
        """Stretches of grid times with an observation at each: what an episode can be made of."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self.usable, [False]))))
        return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def uniform_grid(start_ns: int, end_ns: int, fps: float | Fraction) -> Stamps:
    """start, start + 1/fps, ... up to and including end: each the exact time, cut to a nanosecond."""
    rate = Fraction(fps).limit_denominator(_FINEST_RATE)
    if rate <= 0:
        raise ValueError(f"a rate of {fps} Hz has no period")
    if end_ns < start_ns:
        return np.empty(0, np.int64)
    period, ticks = NS_PER_S * rate.denominator, rate.numerator
    last = ((end_ns - start_ns + 1) * ticks - 1) // period
    return np.array([start_ns + i * period // ticks for i in range(last + 1)], dtype=np.int64)


def find_gaps(stamps_ns: Stamps, max_gap_ns: int) -> list[Gap]:
    """Neighbours in rising stamps that are further apart than `max_gap_ns`."""
    at = np.flatnonzero(np.diff(stamps_ns) > max_gap_ns)
    return [Gap(int(stamps_ns[i]), int(stamps_ns[i + 1])) for i in at]


def admit(
    stamps_ns: Sequence[int] | Stamps, max_reorder_ns: int = MAX_REORDER_NS
) -> tuple[list[npt.NDArray[np.intp]], Counter[Arrival]]:
    """Stamps in the order received -> positions in the order of their stamps, as the live buffer holds them.

    One array, or one more each time the clock was set back: time starts anew there and no observation reaches
    across. The counter says what became of each.
    """
    stamps = np.asarray(stamps_ns, dtype=np.int64)
    if not stamps.size:
        return [], Counter()
    if stamps[0] > 0 and np.all(stamps[1:] > stamps[:-1]):
        return [np.arange(stamps.size)], Counter({Arrival.NEWEST: int(stamps.size)})
    counts: Counter[Arrival] = Counter()
    eras: list[dict[int, int]] = [{}]
    buffer: StreamBuffer[int] = StreamBuffer("recording", _FOREVER_NS, max_reorder_ns=max_reorder_ns)
    for position, stamp in enumerate(stamps.tolist()):
        arrival = buffer.push(stamp, position)
        counts[arrival] += 1
        if arrival is Arrival.RESTARTED:
            eras.append({})
        if arrival.kept:
            eras[-1][stamp] = position
    return [np.array([era[s] for s in sorted(era)], dtype=np.intp) for era in eras if era], counts


def sample_grid(
    streams: Mapping[str, Recorded],
    budgets: Mapping[str, Budget],
    max_skew_ns: int | None,
    grid_ns: Stamps,
) -> GridSamples:
    """For every grid time, the samples the live timeline would have chosen, all streams at once."""
    for name, budget in budgets.items():
        if budget.max_frozen_ns is not None and streams[name].digests is None:
            raise ValueError(f"{name}: its picture is watched for change, so its digests are needed")
    usable = np.ones(grid_ns.size, dtype=np.bool_)
    newest = np.full(grid_ns.size, np.iinfo(np.int64).min)
    oldest = np.full(grid_ns.size, np.iinfo(np.int64).max)
    positions: dict[str, npt.NDArray[np.intp]] = {}
    for name, stream in streams.items():
        position = np.searchsorted(stream.stamps_ns, grid_ns, side="right") - 1
        positions[name] = position
        usable &= position >= 0
        if not stream.stamps_ns.size:
            continue
        stamp = stream.stamps_ns[
            position
        ]  # where position is -1 this is not a choice, and usable is already False
        budget = budgets[name]
        if budget.max_age_ns is not None:
            usable &= grid_ns - stamp <= budget.max_age_ns
            np.maximum(newest, stamp, out=newest)
            np.minimum(oldest, stamp, out=oldest)
        if budget.max_frozen_ns is not None:
            since = unchanged_since(stream.stamps_ns, stream.digests)[position]
            usable &= stamp - since <= budget.max_frozen_ns
    if max_skew_ns is not None and any(budgets[name].max_age_ns is not None for name in streams):
        usable &= newest - oldest <= max_skew_ns
    picks = {name: position[usable] for name, position in positions.items()}
    return GridSamples(grid_ns, usable, picks, dict(streams), dict(budgets), max_skew_ns)


def unchanged_since(stamps_ns: Stamps, digests: npt.NDArray[np.int64] | None) -> Stamps:
    """Per sample, the stamp of the first of the run of equal pictures it belongs to."""
    if digests is None or stamps_ns.size == 0:
        return stamps_ns
    begins = np.concatenate(([True], digests[1:] != digests[:-1]))
    first = np.maximum.accumulate(np.where(begins, np.arange(stamps_ns.size), 0))
    since: Stamps = stamps_ns[first]
    return since


def _asof(stream: Recorded, t_ns: int) -> Sample[int] | None:
    position = int(np.searchsorted(stream.stamps_ns, t_ns, side="right")) - 1
    if position < 0:
        return None
    stamp = int(stream.stamps_ns[position])
    digest, since = None, stamp
    if stream.digests is not None:
        digest = int(stream.digests[position])
        changed = np.flatnonzero(stream.digests[:position] != digest)
        since = int(stream.stamps_ns[changed[-1] + 1 if changed.size else 0])
    return Sample(stamp, position, digest, since)
