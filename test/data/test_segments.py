"""Where episodes can be, against definitions written out in full."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kuavo_smolvla_ros.data.segments import (
    Window,
    clock_windows,
    in_gaps,
    live_stretches,
    odd_stamps,
    runs,
    split_at_pauses,
    still_stretches,
    trim_idle,
)
from kuavo_smolvla_ros.robot.grid import Recorded, admit
from kuavo_smolvla_ros.robot.stream_buffer import MAX_REORDER_NS

MS, S = 1_000_000, 1_000_000_000
# Values on a coarse grid: distances are exact, so that no definition hangs on rounding.
values = arrays(np.float64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.integers(0, 3).map(float))


def rising(steps: list[int]) -> np.ndarray:
    return np.cumsum([1000 * S, *steps], dtype=np.int64)


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_the_stretches_of_true(marks: list[bool]) -> None:
    found = runs(np.array(marks, dtype=np.bool_))
    assert [i for run in found for i in range(run.start, run.stop)] == [i for i, m in enumerate(marks) if m]
    assert all(a.stop < b.start for a, b in itertools.pairwise(found))


@given(values, st.data())
def test_still_stretches_stay_within_the_tolerance_and_cannot_be_longer(
    rows: np.ndarray, data: st.DataObject
) -> None:
    moving = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    found = still_stretches(rows, 1.0, moving)
    assert sorted(i for s in found for i in range(s.start, s.stop)) == np.flatnonzero(~moving).tolist()
    for s in found:
        assert (np.abs(rows[s] - rows[s.start]) <= 1.0).all()
        if s.stop < len(rows):
            assert moving[s.stop] or (np.abs(rows[s.stop] - rows[s.start]) > 1.0).any()


@given(values, st.integers(0, 5), st.data())
def test_trimming_keeps_every_motion_and_the_margin(
    rows: np.ndarray, margin: int, data: st.DataObject
) -> None:
    moving = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    away = (np.abs(rows - rows[0]) > 1.0).any(axis=1) | moving
    before_end = (np.abs(rows - rows[-1]) > 1.0).any(axis=1) | moving
    kept = trim_idle(rows, 1.0, moving, margin)
    if not away.any():
        assert kept is None
        return
    assert kept is not None
    first = int(np.argmax(away))
    last = len(rows) - 1 - int(np.argmax(before_end[::-1])) if before_end.any() else 0
    assert kept.start == max(0, first - margin)
    assert kept.stop == min(len(rows), last + 1 + margin) or not before_end.any()


@given(values, st.integers(1, 8))
def test_pauses_divide_into_parts_that_lose_nothing(rows: np.ndarray, longest: int) -> None:
    moving = np.zeros(len(rows), dtype=np.bool_)
    parts = split_at_pauses(rows, 1.0, moving, longest)
    assert parts[0].start == 0
    assert parts[-1].stop == len(rows)
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    pauses = [s for s in still_stretches(rows, 1.0, moving) if s.stop - s.start > longest]
    for cut in (part.start for part in parts[1:]):
        assert any(pause.start < cut < pause.stop for pause in pauses)


@given(st.lists(st.integers(1, 300), min_size=5, max_size=60), st.integers(0, 59), st.integers(200, 10**6))
def test_a_lone_stamp_from_the_future_is_odd_and_no_other(steps: list[int], at: int, ahead_ms: int) -> None:
    stamps = rising([step * MS for step in steps])
    assert not odd_stamps(stamps).any()
    at = min(at, len(stamps) - 4)
    changed = stamps.copy()
    changed[at] = stamps[at + 3] + ahead_ms * MS
    odd = odd_stamps(changed)
    assert odd[at]
    assert odd.sum() == 1
    assert admit(changed[~odd])[1].total() == len(stamps) - 1


@given(st.lists(st.integers(1, 300), min_size=8, max_size=60), st.integers(4, 55), st.integers(20, 10**6))
def test_a_clock_set_back_loses_at_most_the_last_three(steps: list[int], at: int, back_s: int) -> None:
    stamps = rising([step * MS for step in steps])
    at = min(at, len(stamps) - 4)
    stamps[at:] -= back_s * S + 20 * S
    odd = odd_stamps(stamps)
    assert set(np.flatnonzero(odd)) <= {at - 3, at - 2, at - 1}
    assert odd[at - 1]


def test_reordering_that_is_allowed_is_not_odd() -> None:
    stamps = rising([10 * MS] * 20)
    stamps[[5, 6]] = stamps[[6, 5]]
    assert not odd_stamps(stamps).any()
    stamps[5] += MAX_REORDER_NS - 30 * MS
    assert not odd_stamps(stamps).any()


def test_jumps_of_several_streams_near_each_other_are_one() -> None:
    assert clock_windows([]) == [Window()]
    first, second = clock_windows([100 * S, 101 * S, 103 * S])
    assert (first.end_ns, second.start_ns) == (100 * S, 103 * S)
    windows = clock_windows([100 * S, 200 * S])
    assert len(windows) == 3
    times = np.array([99, 100, 150, 200, 250]) * S
    assert [w.holds(times).tolist() for w in windows] == [
        [True, False, False, False, False],
        [False, True, True, False, False],
        [False, False, False, True, True],
    ]


@given(
    st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=30), min_size=1, max_size=3),
    st.integers(500, 2500),
)
def test_live_stretches_hold_no_long_gap_of_any_stream(steps: list[list[int]], longest_ms: int) -> None:
    streams = {str(i): Recorded(rising([s * MS for s in own])) for i, own in enumerate(steps)}
    found = live_stretches(streams, longest_ms * MS, None, None)
    for start, end in found:
        assert start <= end
        for stream in streams.values():
            stamps = stream.stamps_ns
            assert stamps[0] <= start
            assert end <= stamps[-1]
            at = np.searchsorted(stamps, [start, end], side="right") - 1
            inside = stamps[at[0] : at[1] + 2]
            gaps = [(a, b) for a, b in itertools.pairwise(inside) if b - a > longest_ms * MS]
            assert all(b <= start or a >= end for a, b in gaps)
    covered = sum(end - start for start, end in found)
    assert covered <= min(int(s.stamps_ns[-1] - s.stamps_ns[0]) for s in streams.values())


def test_live_stretches_end_at_the_bounds_given() -> None:
    stream = {"a": Recorded(rising([S] * 10))}
    assert live_stretches(stream, 2 * S, 1003 * S, 1005 * S) == [(1003 * S, 1005 * S)]
    assert live_stretches(stream, 2 * S, 1020 * S, None) == []
    assert live_stretches({"a": Recorded(np.empty(0, np.int64))}, 2 * S, None, None) == []


@pytest.mark.parametrize(
    ("last_alive_s", "expected"),
    [(None, [0, 0, 1, 1, 0, 0, 0]), (6.0, [0, 0, 1, 1, 0, 1, 1]), (4.1, [0, 0, 1, 1, 0, 0, 0])],
)
def test_silence_counts_between_commands_and_while_another_command_goes_on(
    last_alive_s: float | None, expected: list[int]
) -> None:
    stamps = np.array([0, 500 * MS, S, 3600 * MS, 4 * S], dtype=np.int64)
    grid = np.array([0, S, 2 * S, 3 * S, 4 * S, 5 * S, 6 * S], dtype=np.int64)
    alive = None if last_alive_s is None else int(last_alive_s * S)
    assert in_gaps(stamps, 600 * MS, alive, grid).astype(int).tolist() == expected
    assert not in_gaps(np.empty(0, np.int64), MS, None, grid).any()
