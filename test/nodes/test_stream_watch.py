"""Rates, ages and life of streams, by the stamps of their messages."""

from __future__ import annotations

import pytest

from kuavo_smolvla_ros.nodes.diagnostics import quantiles, seconds
from kuavo_smolvla_ros.nodes.stream_watch import StreamWatch
from kuavo_smolvla_ros.robot.timeline import Budget, Timeline

S, MS = 1_000_000_000, 1_000_000
BUDGETS = {"camera": Budget(250 * MS, 1 * S), "state": Budget(100 * MS), "held": Budget(None)}


@pytest.fixture
def timeline() -> Timeline[bytes]:
    return Timeline(BUDGETS, 50 * MS)


def feed(timeline: Timeline[bytes], start_ns: int, seconds: float, moving: bool = True) -> int:
    """Pictures at 30 Hz and states at 500 Hz; the time of the last."""
    for tick in range(round(seconds * 500)):
        now = start_ns + tick * 2 * MS
        timeline.push("state", now, b"")
        if tick % 17 == 0:
            timeline.push("camera", now, b"", digest=tick if moving else 0)
    return now


def test_rates_are_by_stamps_whatever_the_wall_says(timeline: Timeline[bytes]) -> None:
    watch, now = StreamWatch(BUDGETS), S
    for _ in range(6):
        now = feed(timeline, now + 2 * MS, 0.7)
        found = watch.look(timeline.buffers, now)
    assert found["state"].rate_hz == pytest.approx(500, rel=0.01)
    assert found["camera"].rate_hz == pytest.approx(500 / 17, rel=0.1)
    assert found["state"].age_ns == 0
    assert not found["camera"].dead


def test_nothing_heard_is_dead_unless_it_is_a_held_value(timeline: Timeline[bytes]) -> None:
    found = StreamWatch(BUDGETS).look(timeline.buffers, S)
    assert {name: stream.dead for name, stream in found.items()} == {
        "camera": True, "state": True, "held": False,
    }  # fmt: skip
    assert all(stream.age_ns is None and stream.rate_hz is None for stream in found.values())


def test_silence_beyond_the_age_limit_is_death(timeline: Timeline[bytes]) -> None:
    now = feed(timeline, S, 0.5)
    watch = StreamWatch(BUDGETS)
    assert not watch.look(timeline.buffers, now + 90 * MS)["state"].dead
    found = watch.look(timeline.buffers, now + 150 * MS)
    assert found["state"].dead
    assert not found["camera"].dead


def test_picture_that_no_longer_changes_is_death_with_fresh_stamps(timeline: Timeline[bytes]) -> None:
    now = feed(timeline, S, 1.5, moving=False)
    assert StreamWatch(BUDGETS).look(timeline.buffers, now)["camera"].dead


def test_clock_that_was_set_back_begins_the_rates_anew(timeline: Timeline[bytes]) -> None:
    watch = StreamWatch(BUDGETS)
    for start in (10 * S, 11 * S):
        watch.look(timeline.buffers, feed(timeline, start, 1.0))
    timeline.clear()
    found = watch.look(timeline.buffers, feed(timeline, S, 0.5))
    assert found["state"].rate_hz is None
    found = watch.look(timeline.buffers, feed(timeline, S + 500 * MS, 0.5))
    assert found["state"].rate_hz == pytest.approx(500, rel=0.01)


def test_numbers_for_people() -> None:
    assert seconds(None) == "never"
    assert seconds(1_500 * MS) == 1.5
    assert quantiles("x", []) == {}
    assert quantiles("x", [0.1]) == {"x_p50_s": 0.1, "x_p95_s": 0.1, "x_max_s": 0.1}
    assert quantiles("x", [i / 100 for i in range(100)])["x_p95_s"] == 0.95
