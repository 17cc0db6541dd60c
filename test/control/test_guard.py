"""The guard step by step: it goes where it is told, no further and no faster than it may."""

from __future__ import annotations

import numpy as np
import pytest

from kuavo_smolvla_ros.control.guard import Guard
from kuavo_smolvla_ros.robot.limits import Limits

DT = 0.01


def started(limits: Limits, **options: object) -> Guard:
    guard = Guard(limits, **options)  # type: ignore[arg-type]
    guard.start(np.zeros(len(limits)))
    return guard


def path(guard: Guard, target: np.ndarray, steps: int, **options: object) -> np.ndarray:
    return np.array([guard.step(target, DT, **options) for _ in range(steps)])  # type: ignore[arg-type]


def test_reaches_a_target_in_the_shortest_time_its_limits_allow_and_without_overshoot(
    small_limits: Limits,
) -> None:
    guard = started(small_limits)
    target = np.array([1.0, 0.3, 0.9, 1.0])
    way = path(guard, target, 300)
    np.testing.assert_allclose(way[-1], target, atol=1e-12)
    assert np.all(way <= target + 1e-12)
    # 1 rad at 1 rad/s and 5 rad/s2: a trapezoid of 1 s + 0.2 s
    assert np.argmax(way[:, 0] > 0.999) * DT == pytest.approx(1.2, abs=0.05)


def test_comes_to_rest_at_the_target_and_stays(small_limits: Limits) -> None:
    guard = started(small_limits)
    way = path(guard, np.array([0.37, 0.11, 0.5, 1.0]), 300)
    assert guard.at_rest
    assert np.ptp(way[-50:], axis=0).max() == 0.0


def test_a_moving_target_is_followed_without_lag(small_limits: Limits) -> None:
    guard = started(small_limits)
    times = np.arange(1, 400) * DT
    wave = 0.15 * (1 - np.cos(1.5 * times))
    pace = np.diff(np.concatenate([[0.0], wave])) / DT
    errors = []
    for value, speed in zip(wave, pace, strict=True):
        out = guard.step(np.array([value, 0, value, 0]), DT, velocity=np.array([speed, 0, speed, 0]))
        errors.append(np.abs(out[[0, 2]] - value).max())
    assert max(errors) < 1e-6
    assert guard.interventions.sum() == 0


def test_limiting_one_joint_does_not_slow_another(small_limits: Limits) -> None:
    target = np.array([0.5, 1.9, 0.5, 0.0])
    together = path(started(small_limits), target, 100)
    alone = path(started(small_limits), np.where([True, False, True, True], target, 0.0), 100)
    assert np.array_equal(together[:, [0, 2, 3]], alone[:, [0, 2, 3]])
    assert together[-1, 1] < 0.2


def test_keep_direction_stays_on_the_line_for_one_group_and_leaves_the_others(small_limits: Limits) -> None:
    groups = ("arm", "arm", "gripper", "switch")
    target = np.array([0.6, 0.3, 1.0, 0.0])
    free = path(started(small_limits, groups=groups), target, 100)
    kept = path(started(small_limits, groups=groups, keep_direction=True), target, 400)
    assert np.abs(free[:, 0] - 2 * free[:, 1]).max() > 0.1
    np.testing.assert_allclose(kept[:, 0], 2 * kept[:, 1], atol=1e-9)
    np.testing.assert_allclose(kept[-1], target, atol=1e-6)
    assert np.array_equal(kept[:100, 2], free[:, 2])


def test_braking_takes_v_over_a_and_keeps_the_direction_of_a_group(small_limits: Limits) -> None:
    guard = started(small_limits, groups=("arm", "arm", "gripper", "switch"))
    for _ in range(100):
        guard.step(np.array([1.4, 1.9, 0.0, 0.0]), DT)
    speed = guard.velocity.copy()
    assert speed[:2] == pytest.approx([1.0, 0.2])
    start = guard.position.copy()
    steps = 0
    while not guard.at_rest:
        guard.brake(DT)
        steps += 1
        moved = guard.position - start
        assert moved[0] * speed[1] == pytest.approx(moved[1] * speed[0], abs=1e-12)
    assert steps * DT == pytest.approx(0.2, abs=DT)


def test_a_switch_follows_at_once_and_exactly(small_limits: Limits) -> None:
    guard = started(small_limits)
    assert guard.step(np.array([0, 0, 0, 1.0]), DT)[3] == 1.0
    assert guard.step(np.array([0, 0, 0, 0.0]), DT)[3] == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("joint", range(4))
def test_one_bad_number_brakes_every_joint(small_limits: Limits, bad: float, joint: int) -> None:
    target = np.array([1.0, 1.0, 0.8, 1.0])
    one, other = started(small_limits), started(small_limits)
    for guard in (one, other):
        path(guard, target, 10)
    hostile = target.copy()
    hostile[joint] = bad
    assert np.array_equal(one.step(hostile, DT), other.brake(DT))


def test_a_target_velocity_that_is_not_finite_brakes_too(small_limits: Limits) -> None:
    guard = started(small_limits)
    path(guard, np.ones(4), 10)
    before = np.abs(guard.velocity[0])
    guard.step(np.ones(4), DT, velocity=np.array([np.nan, 0, 0, 0]))
    assert np.abs(guard.velocity[0]) < before


def test_stops_at_a_position_limit_without_harder_braking(small_limits: Limits) -> None:
    guard = started(small_limits)
    way = path(guard, np.array([99.0, 99.0, 99.0, 99.0]), 2000)
    assert np.array_equal(way[-1], small_limits.upper)
    change = np.diff(np.diff(way[:, 0]) / DT) / DT
    assert np.abs(change).max() <= 5.0 * (1 + 1e-9)
    assert guard.interventions.min() == 2000


def test_outside_a_limit_a_joint_may_stay_or_come_in_but_not_go_further(small_limits: Limits) -> None:
    guard = Guard(small_limits)
    guard.start(np.array([1.6, 0.0, -0.1, 0.0]))
    stay = path(guard, np.array([1.6, 0.0, -0.1, 0.0]), 20)
    assert np.array_equal(stay[-1, [0, 2]], [1.6, -0.1])
    further = path(guard, np.array([9.0, 0.0, -9.0, 0.0]), 20)
    assert np.array_equal(further[-1, [0, 2]], [1.6, -0.1])
    inside = path(guard, np.array([1.0, 0.0, 0.5, 0.0]), 200)
    assert np.all(np.diff(inside[:, 0]) <= 0)
    np.testing.assert_allclose(inside[-1, [0, 2]], [1.0, 0.5], atol=1e-9)


def test_a_step_after_a_long_gap_starts_from_rest(small_limits: Limits) -> None:
    guard = started(small_limits)
    path(guard, np.ones(4), 60)
    before = guard.position.copy()
    after = guard.step(np.ones(4), 3.0)
    assert 0 < after[0] - before[0] <= 5.0 * 0.05**2 * (1 + 1e-9)


def test_a_lower_speed_binds_the_wish_but_never_brakes_harder(small_limits: Limits) -> None:
    guard = started(small_limits)
    path(guard, np.ones(4), 60)
    slowed = path(guard, np.array([1.4, 0, 0, 0]), 40, speed=0.25)
    speeds = np.diff(slowed[:, 0]) / DT
    assert np.abs(np.diff(speeds)).max() <= 5.0 * DT * (1 + 1e-6)
    assert speeds[-1] == pytest.approx(0.25)


def test_ramping_is_not_counted_as_intervention(small_limits: Limits) -> None:
    guard = started(small_limits)
    path(guard, np.ones(4), 20, speed=0.25)
    assert guard.interventions.sum() == 0
    path(guard, np.ones(4), 20)
    assert guard.interventions[0] == 20


@pytest.mark.parametrize("dt_s", [0.0, -0.01, np.nan, np.inf])
def test_time_must_pass_between_commands(small_limits: Limits, dt_s: float) -> None:
    with pytest.raises(ValueError, match="time between two commands"):
        started(small_limits).step(np.zeros(4), dt_s)


@pytest.mark.parametrize("pose", [np.array([0, np.nan, 0, 0.0]), np.array([0, np.inf, 0, 0.0]), np.zeros(3)])
def test_does_not_start_from_a_pose_that_is_none(small_limits: Limits, pose: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot start"):
        Guard(small_limits).start(pose)


def test_knows_no_pose_before_start_and_after_release(small_limits: Limits) -> None:
    guard = Guard(small_limits)
    with pytest.raises(ValueError, match="not started"):
        guard.step(np.zeros(4), DT)
    guard.start(np.zeros(4))
    guard.release()
    assert not guard.started
    with pytest.raises(ValueError, match="not started"):
        guard.brake(DT)


def test_a_joint_without_position_limits_is_refused(small_limits: Limits) -> None:
    endless = Limits(("a",), np.array([-np.inf]), np.array([1.0]), np.array([1.0]), np.array([1.0]))
    with pytest.raises(ValueError, match="without position limits"):
        Guard(endless)
    with pytest.raises(ValueError, match="groups"):
        Guard(small_limits, groups=("arm",))
