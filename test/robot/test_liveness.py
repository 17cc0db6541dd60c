"""A driver that repeats one frame with fresh stamps passes every age check; its pixels give it away."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.robot.grid import Recorded, sample_grid, unchanged_since
from kuavo_smolvla_ros.robot.stream_buffer import Arrival
from kuavo_smolvla_ros.robot.timeline import Budget, NoObservation, Observation, Reason, Timeline

MS = 1_000_000
FRAME = 33 * MS
BUDGETS = {"head": Budget(250 * MS, max_frozen_ns=500 * MS), "arms": Budget(100 * MS)}


def watch(digests: list[int]) -> list[Observation[int] | NoObservation]:
    """One frame each 33 ms with these pixels, joint states with every frame; the verdict after each."""
    live: Timeline[int] = Timeline(BUDGETS, 50 * MS)
    verdicts = []
    for i, digest in enumerate(digests, start=1):
        live.push("head", i * FRAME, i, digest=digest, now_ns=i * FRAME)
        live.push("arms", i * FRAME, i, now_ns=i * FRAME)
        verdicts.append(live.latest(i * FRAME))
    return verdicts


def test_frozen_pixels_with_fresh_stamps_are_dead_after_the_limit() -> None:
    verdicts = watch([*range(10), *[77] * 30])
    frozen_at = 10
    allowed = 500 // 33  # frames after the first of the run
    assert all(isinstance(v, Observation) for v in verdicts[: frozen_at + allowed + 1])
    assert all(isinstance(v, NoObservation) for v in verdicts[frozen_at + allowed + 1 :])
    last = verdicts[-1]
    assert isinstance(last, NoObservation)
    assert (last.reason, last.stream) == (Reason.DEAD, "head")
    assert str(last) == "head: its picture has not changed for 957 ms, allowed are 500 ms"


def test_the_limit_is_inclusive() -> None:
    budgets = {"head": Budget(250 * MS, max_frozen_ns=60 * MS)}
    live: Timeline[int] = Timeline(budgets, 50 * MS)
    stamps = np.array([MS, 61 * MS, 61 * MS + 1], dtype=np.int64)
    for stamp in stamps.tolist():
        live.push("head", stamp, 0, digest=7)
    assert isinstance(live.observe(61 * MS), Observation)
    assert isinstance(live.observe(62 * MS), NoObservation)
    recorded = {"head": Recorded(stamps, np.full(3, 7))}
    grid = np.array([61, 62]) * MS
    assert sample_grid(recorded, budgets, 50 * MS, grid).usable.tolist() == [True, False]


def test_one_fresh_frame_brings_it_back() -> None:
    verdicts = watch([*[77] * 30, 78])
    assert isinstance(verdicts[-2], NoObservation)
    assert isinstance(verdicts[-1], Observation)


def test_two_pictures_in_turn_are_alive() -> None:
    assert all(isinstance(v, Observation) for v in watch([1, 2] * 40))


def test_a_watched_stream_needs_digests_live_and_recorded() -> None:
    live: Timeline[int] = Timeline(BUDGETS, 50 * MS)
    with pytest.raises(ValueError, match="head: its picture is watched"):
        live.push("head", FRAME, 0)
    stamps = np.array([FRAME], dtype=np.int64)
    with pytest.raises(ValueError, match="head: its picture is watched"):
        sample_grid({name: Recorded(stamps) for name in BUDGETS}, BUDGETS, 50 * MS, stamps)


def test_a_late_frame_splits_a_run_that_had_looked_frozen() -> None:
    live: Timeline[int] = Timeline({"head": Budget(250 * MS, max_frozen_ns=60 * MS)}, 50 * MS)
    for t in (10, 40, 90):
        live.push("head", t * MS, t, digest=7)
    assert isinstance(live.observe(90 * MS), NoObservation)
    assert live.push("head", 50 * MS, 50, digest=8) is Arrival.LATE
    assert isinstance(live.observe(90 * MS), Observation)


def test_the_run_outlives_the_memory() -> None:
    live: Timeline[int] = Timeline({"head": Budget(250 * MS, max_frozen_ns=60_000 * MS)}, 50 * MS)
    for i in range(1, 2000):
        live.push("head", i * FRAME, i, digest=7)
    last = live.observe(1999 * FRAME)
    assert isinstance(last, NoObservation)
    assert last.problems[0].measured_ns == 1998 * FRAME


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), max_size=40))
def test_unchanged_since_against_looking_back(steps: list[tuple[int, int]]) -> None:
    stamps = np.cumsum([step for step, _ in steps], dtype=np.int64)
    digests = np.array([digest for _, digest in steps], dtype=np.int64)
    found = unchanged_since(stamps, digests)
    for i in range(len(steps)):
        first = i
        while first > 0 and digests[first - 1] == digests[i]:
            first -= 1
        assert found[i] == stamps[first]


def test_without_digests_every_sample_is_new() -> None:
    stamps = np.array([1, 2, 3], dtype=np.int64)
    assert unchanged_since(stamps, None) is stamps
