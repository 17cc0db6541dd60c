"""Uniform time: no drift, no step out of place, and gaps that are seen."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kuavo_smolvla_ros.robot.grid import (
    Gap,
    Recorded,
    find_gaps,
    sample_grid,
    uniform_grid,
)
from kuavo_smolvla_ros.robot.timeline import Budget

MS = 1_000_000
START = 1_700_000_000 * 1_000 * MS
RATES = st.sampled_from([1, 3, 7, 10, 15, 29.97, 30, 59.94, 100, 500, 0.5, Fraction(30000, 1001)])


@given(st.integers(1, 2 * 10**18), st.integers(0, 30 * 10**9), RATES)
@example(1, 333_333_333, 3)
@example(1, 333_333_332, 3)
def test_grid_is_every_exact_time_cut_to_a_nanosecond(start: int, length: int, fps: float | Fraction) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    grid = uniform_grid(start, start + length, fps).tolist()
    exact = [start + int(Fraction(i * 10**9) / rate) for i in range(len(grid) + 1)]
    assert grid == exact[:-1]
    assert grid[-1] <= start + length < exact[-1]


@pytest.mark.parametrize(("fps", "count"), [(30, 108_001), (29.97, 107_893), (10, 36_001)])
def test_an_hour_does_not_drift(fps: float, count: int) -> None:
    grid = uniform_grid(START, START + 3_600_000 * MS, fps)
    assert grid.size == count
    last = Fraction(count - 1) * 10**9 / Fraction(str(fps))
    assert 0 <= last - (int(grid[-1]) - START) < 1
    assert set(np.diff(grid)) <= {int(10**9 / fps), int(10**9 / fps) + 1}


def test_empty_and_impossible_grids() -> None:
    assert uniform_grid(10, 9, 30).size == 0
    assert uniform_grid(10, 10, 30).tolist() == [10]
    for fps in (0, -10):
        with pytest.raises(ValueError, match="has no period"):
            uniform_grid(0, 10, fps)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 60))
def test_gaps_are_all_neighbours_too_far_apart(steps: list[int], limit: int) -> None:
    stamps = np.cumsum([1, *steps], dtype=np.int64)
    pairs = zip(stamps[:-1].tolist(), stamps[1:].tolist(), strict=True)
    assert find_gaps(stamps, limit) == [Gap(a, b) for a, b in pairs if b - a > limit]


@pytest.mark.parametrize(
    ("stamps", "digests", "says"),
    [
        (np.array([1, 1], dtype=np.int64), None, r"must rise; pass them through admit"),
        (np.array([2, 1], dtype=np.int64), None, "must rise"),
        (np.array([1.0, 2.0]), None, "one row of int64"),
        (np.array([[1]], dtype=np.int64), None, "one row of int64"),
        (np.array([1, 2], dtype=np.int64), np.array([1]), "1 digests for 2 stamps"),
    ],
)
def test_recordings_that_skipped_admission_are_refused(
    stamps: np.ndarray, digests: np.ndarray | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Recorded(stamps, digests)


def test_an_empty_stream_leaves_nothing_usable() -> None:
    streams = {"a": Recorded(np.array([5], dtype=np.int64)), "b": Recorded(np.empty(0, np.int64))}
    result = sample_grid(streams, {"a": Budget(100), "b": Budget(100)}, 50, np.arange(5, 20))
    assert not result.usable.any()
    assert result.runs() == []
    assert str(result.outcome(0)) == "b: no sample with a stamp at or before this time"


def test_a_known_signal_comes_back_in_phase() -> None:
    """Index-based retiming would bend time over the dropped frames; header time does not."""
    rng = np.random.default_rng(0)
    at = np.sort(rng.choice(np.arange(900), 850, replace=False)) / 30  # 30 Hz with 50 frames lost
    stamps = START + np.round(at * 1e9).astype(np.int64)
    grid = uniform_grid(int(stamps[0]), int(stamps[-1]), 10)
    result = sample_grid({"a": Recorded(stamps)}, {"a": Budget(250 * MS)}, 50 * MS, grid)
    wave = np.sin(2 * np.pi * 0.5 * at)[result.picks["a"]]
    truth = np.sin(2 * np.pi * 0.5 * (grid[result.usable] - START) / 1e9)
    lags = (grid[result.usable] - stamps[result.picks["a"]]) / 1e9
    assert result.usable.mean() > 0.99
    assert np.abs(wave - truth).max() <= 2 * np.pi * 0.5 * lags.max()
    assert lags.min() >= 0
