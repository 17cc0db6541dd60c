"""Two clocks: what a jump is, what a gap is, and what is only a fast or a stalled simulator."""

from __future__ import annotations

import pytest

from kuavo_smolvla_ros.control.clock import ClockWatch
from kuavo_smolvla_ros.control.reasons import StopReason

MS = 1_000_000


def watch() -> ClockWatch:
    clock = ClockWatch(period_s=0.01, max_time_factor=4.0, tolerance_s=0.1, max_gap_s=0.2)
    clock.tick(1_000_000 * MS, 0)
    return clock


def after(clock: ClockWatch, ros_ms: float, mono_ms: float) -> tuple[float, StopReason | None]:
    assert clock.seen is not None
    tick = clock.tick(clock.seen[0] + round(ros_ms * MS), clock.seen[1] + round(mono_ms * MS))
    return tick.dt_s, tick.fault


def test_the_first_reading_is_no_step() -> None:
    assert ClockWatch(0.01, 4.0, 0.1, 0.2).tick(5, 5).dt_s == 0.0


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_a_steady_clock_of_any_speed_is_no_fault(factor: float) -> None:
    clock = watch()
    for _ in range(100):
        assert after(clock, 10 * factor, 10) == (pytest.approx(0.01 * factor), None)


@pytest.mark.parametrize("jump_ms", [-1, -10, -5000, 300, 86_400_000])
def test_a_jump_is_named_and_counts_as_one_period(jump_ms: float) -> None:
    assert after(watch(), jump_ms, 10) == (0.01, StopReason.CLOCK_JUMP)


def test_after_a_jump_time_goes_on_from_there() -> None:
    clock = watch()
    after(clock, -5000, 10)
    assert after(clock, 10, 10) == (pytest.approx(0.01), None)


@pytest.mark.parametrize("mono_ms", [201, 1000, 60_000])
def test_a_gap_in_both_clocks_is_a_gap_and_not_a_jump(mono_ms: float) -> None:
    assert after(watch(), mono_ms, mono_ms) == (mono_ms / 1000, StopReason.CONTROL_GAP)


def test_a_late_tick_is_a_longer_step() -> None:
    assert after(watch(), 60, 60) == (pytest.approx(0.06), None)


def test_a_stalled_clock_makes_no_step_and_loses_none() -> None:
    clock = watch()
    assert after(clock, 0, 10) == (0.0, None)
    assert after(clock, 0.4, 10) == (0.0, None)
    assert after(clock, 0.4, 10) == (0.0, None)
    assert after(clock, 9.2, 10) == (pytest.approx(0.01), None)


def test_a_burst_of_late_calls_makes_one_step() -> None:
    clock = watch()
    steps = [after(clock, ms, ms)[0] for ms in (30, 0.01, 0.01, 9.98)]
    assert steps == [pytest.approx(0.03), 0.0, 0.0, pytest.approx(0.01)]
