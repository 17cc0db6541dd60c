"""The timeline against its definition: every answer is worked out again by looking at all samples.

Times are small multiples of a millisecond, so that equal, reordered, missing and jumping stamps are common.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from kuavo_smolvla_ros.robot.grid import Recorded, admit, sample_grid
from kuavo_smolvla_ros.robot.stream_buffer import RESTART_AFTER, Arrival, StreamBuffer
from kuavo_smolvla_ros.robot.timeline import Budget, NoObservation, Observation, Reason, Timeline

MS = 1_000_000
REORDER, TOLERANCE = 20 * MS, 5 * MS


@dataclass(frozen=True)
class Seen:
    """One sample in the oracle's eyes."""

    stamp: int
    item: int
    digest: int | None


# ---- the definition, by brute force


def admitted(arrivals: list[tuple[int, int, int | None]]) -> tuple[list[list[Seen]], Counter[Arrival]]:
    """(stamp, item, digest) as received -> eras between clock resets, and what became of each."""
    eras: list[list[Seen]] = [[]]
    counts: Counter[Arrival] = Counter()
    behind = 0
    for stamp, item, digest in arrivals:
        held = eras[-1]
        newest = max((s.stamp for s in held), default=None)
        if stamp <= 0:
            arrival = Arrival.UNSTAMPED
        elif newest is not None and newest - stamp > REORDER:
            behind += 1
            arrival = Arrival.RESTARTED if behind == RESTART_AFTER else Arrival.BEHIND
        else:
            behind = 0
            if any(s.stamp == stamp for s in held):
                arrival = Arrival.REPEATED
            else:
                arrival = Arrival.NEWEST if newest is None or stamp > newest else Arrival.LATE
        if arrival is Arrival.RESTARTED:
            behind = 0
            eras.append([])
        if arrival in (Arrival.NEWEST, Arrival.LATE, Arrival.RESTARTED):
            eras[-1].append(Seen(stamp, item, digest))
        counts[arrival] += 1
    return [sorted(era, key=lambda s: s.stamp) for era in eras if era], counts


def asof(samples: list[Seen], t: int) -> Seen | None:
    return next((s for s in reversed(samples) if s.stamp <= t), None)


def frozen_for(samples: list[Seen], sample: Seen) -> int:
    since = sample.stamp
    for earlier in reversed(samples[: samples.index(sample)]):
        if earlier.digest is None or earlier.digest != sample.digest:
            break
        since = earlier.stamp
    return sample.stamp - since


def observed(
    streams: dict[str, list[Seen]], budgets: dict[str, Budget], max_skew: int, t: int
) -> dict[str, int] | list[tuple[Reason, str]]:
    """Items by stream, or what stands in the way."""
    chosen = {name: asof(samples, t) for name, samples in streams.items()}
    problems = []
    for name, sample in chosen.items():
        budget = budgets[name]
        if sample is None:
            problems.append((Reason.MISSING, name))
        elif budget.max_age_ns is not None and t - sample.stamp > budget.max_age_ns:
            problems.append((Reason.STALE, name))
        elif budget.max_frozen_ns is not None and frozen_for(streams[name], sample) > budget.max_frozen_ns:
            problems.append((Reason.DEAD, name))
    if problems:
        return problems
    stamps = {n: s.stamp for n, s in chosen.items() if s is not None and budgets[n].max_age_ns is not None}
    if stamps and max(stamps.values()) - min(stamps.values()) > max_skew:
        return [(Reason.SKEWED, min(stamps, key=lambda name: stamps[name]))]
    return {name: sample.item for name, sample in chosen.items() if sample is not None}


def plain(outcome: Observation[int] | NoObservation) -> dict[str, int] | list[tuple[Reason, str]]:
    if isinstance(outcome, Observation):
        return {name: sample.item for name, sample in outcome.samples.items()}
    return [(problem.reason, problem.stream) for problem in outcome.problems]


# ---- what is fed in

stamps_received = st.lists(
    st.one_of(
        st.integers(0, 400),  # anywhere: zero, repeats and jumps both ways
        st.integers(300, 330),  # close together: reordering within what is allowed
    ),
    max_size=60,
)


@st.composite
def steady(draw: st.DrawFn, watched: bool = False) -> list[Seen]:
    """A stream as one publisher sends it: rising stamps with jitter and holes, pictures that may repeat."""
    period = draw(st.sampled_from([2, 5, 33]))
    start = draw(st.integers(1, 60))
    steps = draw(st.lists(st.integers(1, 12), max_size=40)) if draw(st.booleans()) else [4] * (300 // period)
    stamps = np.cumsum([start, *(max(1, step * period // 4) for step in steps)])
    digests = draw(st.lists(st.integers(0, 1), min_size=len(stamps), max_size=len(stamps)))
    return [
        Seen(int(stamp) * MS, item, digest if watched else None)
        for item, (stamp, digest) in enumerate(zip(stamps, digests, strict=True))
    ]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[dict[str, list[Seen]], dict[str, Budget], int]:
    ages = st.integers(5, 80).map(lambda ms: ms * MS)
    budgets = {
        "head": Budget(draw(ages), draw(st.none() | st.integers(10, 80).map(lambda ms: ms * MS))),
        "joints": Budget(draw(ages)),
        "command": Budget(None if draw(st.booleans()) else draw(ages)),
    }
    streams = {name: draw(steady(budget.max_frozen_ns is not None)) for name, budget in budgets.items()}
    return streams, budgets, draw(st.integers(0, 80)) * MS


def recorded(samples: list[Seen]) -> Recorded:
    digests = [s.digest for s in samples]
    return Recorded(
        np.array([s.stamp for s in samples], dtype=np.int64),
        None if None in digests or not digests else np.array(digests, dtype=np.int64),
    )


def timeline(budgets: dict[str, Budget], max_skew: int) -> Timeline[int]:
    return Timeline(budgets, max_skew, max_reorder_ns=REORDER, future_tolerance_ns=TOLERANCE)


# ---- one stream


@given(stamps_received, st.lists(st.integers(0, 1), min_size=60, max_size=60))
@example([50, 50, 200, 190, 195, 190, 100, 101, 102, 0, 103], [0] * 60)
def test_buffer_holds_what_the_definition_admits(received: list[int], digests: list[int]) -> None:
    memory = 60 * MS
    buffer: StreamBuffer[int] = StreamBuffer("s", memory, max_reorder_ns=REORDER)
    arrivals = [(stamp * MS, item, digests[item]) for item, stamp in enumerate(received)]
    for count, (stamp, item, digest) in enumerate(arrivals, start=1):
        buffer.push(stamp, item, digest)
        if count % 7 and count < len(arrivals):
            continue
        eras, counts = admitted(arrivals[:count])
        assert buffer.counts == counts
        if not eras:
            continue
        samples = eras[-1]
        newest = samples[-1].stamp
        assert buffer.newest_ns == newest
        for t in range(newest - memory, newest + 2 * MS, MS):
            want, got = asof(samples, t), buffer.asof(t)
            assert (want is None) == (got is None)
            if want is not None and got is not None:
                assert (got.stamp_ns, got.item) == (want.stamp, want.item)
                assert got.stamp_ns - got.unchanged_since_ns == frozen_for(samples, want)


@given(stamps_received)
def test_admit_is_what_the_buffer_does(received: list[int]) -> None:
    stamps = [stamp * MS for stamp in received]
    eras, counts = admitted([(stamp, item, None) for item, stamp in enumerate(stamps)])
    orders, found = admit(stamps, max_reorder_ns=REORDER)
    assert [order.tolist() for order in orders] == [[s.item for s in era] for era in eras]
    assert found == counts


@given(st.sets(st.integers(1, 10**15), max_size=50))
def test_admit_takes_rising_stamps_as_they_are(stamps: set[int]) -> None:
    orders, counts = admit(sorted(stamps))
    assert [order.tolist() for order in orders] == ([list(range(len(stamps)))] if stamps else [])
    assert counts == Counter({Arrival.NEWEST: len(stamps)})


# ---- all streams


@given(scenes())
def test_whole_recording_against_the_definition(
    scene: tuple[dict[str, list[Seen]], dict[str, Budget], int],
) -> None:
    streams, budgets, max_skew = scene
    grid = np.arange(1, 400, 2) * MS  # whole milliseconds, so that limits are met exactly
    result = sample_grid({n: recorded(s) for n, s in streams.items()}, budgets, max_skew, grid)
    taken = 0
    for at, t in enumerate(grid.tolist()):
        want = observed(streams, budgets, max_skew, t)
        assert plain(result.outcome(at)) == want
        assert bool(result.usable[at]) == isinstance(want, dict)
        if isinstance(want, dict):
            assert {name: int(picks[taken]) for name, picks in result.picks.items()} == want
            taken += 1
    assert all(picks.size == taken for picks in result.picks.values())
    covered = np.zeros(grid.size, bool)
    for run in result.runs():
        assert not covered[max(run.start - 1, 0) : run.stop].any()
        covered[run] = True
    assert np.array_equal(covered, result.usable)


@given(scenes())
def test_live_object_fed_in_order_against_the_definition(
    scene: tuple[dict[str, list[Seen]], dict[str, Budget], int],
) -> None:
    streams, budgets, max_skew = scene
    live = timeline(budgets, max_skew)
    pending = [(s.stamp, name, s) for name, samples in streams.items() for s in samples]
    heapq.heapify(pending)
    for t in range(1 * MS, 400 * MS, 3 * MS):
        while pending and pending[0][0] <= t:
            _, name, sample = heapq.heappop(pending)
            assert live.push(name, sample.stamp, sample.item, sample.digest, now_ns=sample.stamp).kept
        assert plain(live.observe(t)) == observed(streams, budgets, max_skew, t)


@given(scenes(), st.data())
def test_live_and_recorded_agree_bit_by_bit(
    scene: tuple[dict[str, list[Seen]], dict[str, Budget], int], data: st.DataObject
) -> None:
    """One recording both ways: as it arrives, late and unevenly per stream, and all at once from the file."""
    streams, budgets, max_skew = scene
    budgets = {name: Budget(b.max_age_ns or 50 * MS, b.max_frozen_ns) for name, b in budgets.items()}
    arrivals: list[tuple[int, str, Seen]] = []
    for name, samples in streams.items():
        delays = data.draw(st.lists(st.integers(0, 45), min_size=len(samples), max_size=len(samples)))
        at = 0
        for sample, delay in zip(samples, delays, strict=True):
            at = max(at, sample.stamp + delay * MS)  # one publisher's messages do not overtake one another
            arrivals.append((at, name, sample))
    arrivals.sort(key=lambda arrival: (arrival[0], arrival[1], arrival[2].stamp))

    live = timeline(budgets, max_skew)
    answers: list[Observation[int] | NoObservation] = []
    ticks = itertools.count(0, 7 * MS)
    tick = next(ticks)
    for at, name, sample in arrivals:
        while tick < at:
            outcome = live.latest(tick)
            stalled = any(
                tick - newest > (budgets[stream].max_age_ns or 0)
                for stream, buffer in live.buffers.items()
                if (newest := buffer.newest_ns) is not None
            )
            if stalled:
                assert isinstance(outcome, NoObservation)
                assert outcome.reason is Reason.STALE
            elif live.settled_ns() is not None:
                assert outcome.t_ns <= tick
                answers.append(outcome)
            tick = next(ticks)
        live.push(name, sample.stamp, sample.item, sample.digest, now_ns=at)

    times = np.array([outcome.t_ns for outcome in answers], dtype=np.int64)
    result = sample_grid({n: recorded(s) for n, s in streams.items()}, budgets, max_skew, times)
    seen = [outcome for outcome in answers if isinstance(outcome, Observation)]
    assert result.usable.tolist() == [isinstance(outcome, Observation) for outcome in answers]
    assert [result.outcome(at) for at in range(len(answers))] == answers
    for name, picks in result.picks.items():
        assert picks.tolist() == [outcome.samples[name].item for outcome in seen]


@given(scenes(), st.integers(0, 400), st.integers(0, 60))
def test_what_arrives_later_cannot_change_a_settled_observation(
    scene: tuple[dict[str, list[Seen]], dict[str, Budget], int], cut_ms: int, lag_ms: int
) -> None:
    streams, budgets, max_skew = scene
    budgets = {name: Budget(b.max_age_ns or 50 * MS, b.max_frozen_ns) for name, b in budgets.items()}
    live = timeline(budgets, max_skew)
    cuts = {"head": cut_ms, "joints": cut_ms + lag_ms, "command": cut_ms + lag_ms // 2}
    for name, samples in streams.items():
        for sample in samples:
            if sample.stamp <= cuts[name] * MS:
                live.push(name, sample.stamp, sample.item, sample.digest)
    settled = live.settled_ns()
    if settled is None:
        return
    before = plain(live.observe(settled))
    for name, samples in streams.items():
        for sample in samples:
            if cuts[name] * MS < sample.stamp <= settled + min(b.max_age_ns or 0 for b in budgets.values()):
                live.push(name, sample.stamp, sample.item, sample.digest)
    assert plain(live.observe(settled)) == before
