"""A value that is not executed neither stops the arms nor ever reaches the robot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.control.gates import GatedJoint, Gates
from kuavo_smolvla_ros.control.reasons import RefusalReason, Request, State
from kuavo_smolvla_ros.control.settings import settings_for
from kuavo_smolvla_ros.robot.limits import Limits
from kuavo_smolvla_ros.robot.spec import load_spec

MakeWorld = Callable[..., Any]
INF = np.inf
NAMES = ("arm", "base", "flag")
GATES = Gates(NAMES, (GatedJoint("base", "flag", 0.5, INF), GatedJoint("arm", "flag", -INF, 0.5)))
LIMITS = Limits(NAMES, np.array([-1.0, -2.0, 0.0]), np.array([1.0, 2.0, 1.0]), np.ones(3), np.ones(3))
BASE, FLAG = slice(16, 19), 19


def chunk_of(world: Any, base: Any, flag: Any, arms: float = 0.0, **changes: Any) -> Any:
    """A chunk from the pose whose base and flag are these, one for each step or for all."""
    values = world.chunk(np.r_[np.full(16, arms), np.zeros(4)]).values.copy()
    values[:, BASE], values[:, FLAG] = base, flag
    return world.chunk(values=values, **changes)


def steps(*parts: tuple[int, Any]) -> np.ndarray:
    """So many steps of each value in turn, 50 in all."""
    return np.concatenate([np.repeat([value], count, axis=0) for count, value in parts])


def test_a_gate_by_hand() -> None:
    values = np.array([[0.1, 0.2, 0.0], [0.1, 0.2, 0.5], [0.1, 0.2, 0.51], [0.1, 0.2, 1.0]])
    assert GATES.open(values).tolist() == [
        [True, False, True],
        [True, False, True],
        [False, True, True],
        [False, True, True],
    ]


def test_what_is_not_executed_is_what_was_last() -> None:
    flag = np.array([0, 1, 1, 0, 0, 1, 0])
    values = np.stack([np.arange(7) / 10, 10.0 * (flag == 0) + np.arange(7) / 10, flag], axis=1)
    kept = GATES.executed(values, LIMITS)
    np.testing.assert_allclose(kept[:, 0], [0.0, 0.0, 0.0, 0.3, 0.4, 0.4, 0.6])
    np.testing.assert_allclose(kept[:, 1], [0.1, 0.1, 0.2, 0.2, 0.2, 0.5, 0.5])
    assert np.array_equal(kept[:, 2], flag)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 1000))
def test_executed_values_stay_and_the_others_do_not_matter(flags: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.stack([*rng.uniform(-1, 1, (2, len(flags))), np.array(flags)], axis=1)
    is_open = GATES.open(values)
    kept = GATES.executed(values, LIMITS)
    assert np.array_equal(kept[is_open], values[is_open])
    other = np.where(is_open, values, rng.choice([1e308, -1e308, 9.0], values.shape))
    ever = is_open.any(axis=0)
    assert np.array_equal(GATES.executed(other, LIMITS)[:, ever], kept[:, ever])
    assert np.all(np.abs(GATES.executed(other, LIMITS)[:, ~ever]) <= 2.0)


def test_the_gates_come_from_the_robot_s_description() -> None:
    settings = settings_for(load_spec("kuavo_mobile"))
    gates = settings.chunk_gates
    names = [n for n, gated in zip(settings.chunk_names, gates.gated, strict=True) if gated]
    assert len(names) == 14 + 3
    assert {gate.by for gate in settings.gated} == {"base_move"}
    assert not settings_for(load_spec("kuavo_sim")).chunk_gates.gated.any()


@pytest.mark.parametrize("value", [9.0, -57.3, 1e308])
@pytest.mark.parametrize("flag", [0.0, 0.5])
def test_a_base_that_is_not_told_to_walk_stops_no_arm(
    make_world: MakeWorld, value: float, flag: float
) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    decision = world.tick(chunk_of(world, value, flag, arms=0.1))
    assert not decision.refused
    before = world.command[:16].copy()
    world.run(1.5)
    assert world.last.state is State.FOLLOWING
    np.testing.assert_allclose(world.command[:14], before[:14] + 0.1, atol=0.02)
    for _ in range(3):
        assert world.tick(chunk_of(world, -value, flag)).accepted
        world.run(0.3)


@pytest.mark.parametrize("flag", [0.51, 1.0])
def test_of_one_that_walks_it_is_refused(make_world: MakeWorld, flag: float) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    flags = steps((49, 0.0), (1, flag))
    base = steps((49, [0.0, 0.0, 0.0]), (1, [0.0, 0.0, 9.0]))
    (refusal,) = world.tick(chunk_of(world, base, flags)).refused
    assert refusal.reason is RefusalReason.OUTSIDE_LIMITS
    assert "base_yaw" in refusal.detail
    assert world.tick(chunk_of(world, base, 0.0)).accepted


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
@pytest.mark.parametrize("column", [0, 16, 18, 19])
def test_what_is_no_number_is_refused_wherever_it_stands(
    make_world: MakeWorld, bad: float, column: int
) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    chunk = chunk_of(world, 0.0, 0.0)
    chunk.values[7, column] = bad
    (refusal,) = world.tick(chunk).refused
    assert refusal.reason is RefusalReason.NON_FINITE


def test_a_flag_far_outside_its_range_is_refused(make_world: MakeWorld) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    (refusal,) = world.tick(chunk_of(world, 0.0, -57.0)).refused
    assert refusal.reason is RefusalReason.OUTSIDE_LIMITS


def walks(world: Any) -> bool:
    return bool(world.command[FLAG] > 0.5)


def test_a_base_begins_where_it_is_first_sent(make_world: MakeWorld) -> None:
    """Nothing of what stood in its place while it was not told to walk is ever commanded."""
    world = make_world("kuavo_mobile")
    world.step()
    world.tick(chunk_of(world, 2.0, 0.0))
    world.run(0.5)
    world.tick(chunk_of(world, [0.7, -0.3, 0.5], steps((10, 0.0), (40, 1.0))))
    for _ in range(150):
        world.tick()
        if walks(world):
            np.testing.assert_allclose(world.command[BASE], [0.7, -0.3, 0.5], atol=1e-9)
    assert walks(world)


def test_later_it_goes_on_from_where_it_was_sent_last(make_world: MakeWorld) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    world.tick(chunk_of(world, [0.5, 0.0, 0.0], 1.0))
    world.run(0.5)
    world.tick(chunk_of(world, [-2.0, 2.0, 3.0], 0.0))
    world.run(1.0)
    assert not walks(world)
    np.testing.assert_allclose(world.command[BASE], [0.5, 0.0, 0.0], atol=1e-9)
    world.tick(chunk_of(world, [0.9, 0.0, 0.0], 1.0))
    reached = []
    for _ in range(150):
        reached.append(world.command[16])
        world.tick()
    assert reached[0] == pytest.approx(0.5, abs=0.01)
    assert np.all(np.diff(reached) <= 0.4 * 0.01 + 1e-9)
    assert np.all(np.diff(reached) >= -1e-9)  # never towards what stood there unexecuted
    assert reached[-1] == pytest.approx(0.9, abs=0.01)


def test_arms_that_are_not_commanded_do_not_leap_when_they_are_again(make_world: MakeWorld) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    world.tick(chunk_of(world, 0.0, 1.0))
    world.run(0.2)
    at_rest = world.command[:14].copy()
    world.tick(chunk_of(world, 0.0, steps((10, 1.0), (40, 0.0)), arms=0.4, age_s=0.0))
    for _ in range(120):
        world.tick()
        if walks(world):
            np.testing.assert_allclose(world.command[:7], at_rest[:7], atol=1e-9)
    assert not walks(world)
    assert world.judge.worst_velocity <= 1 + 1e-6
    world.run(1.0)
    assert np.abs(world.command[:7] - at_rest[:7]).max() > 0.3


def test_a_stop_while_it_walks_holds_the_base_where_it_was_sent(make_world: MakeWorld) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    world.tick(chunk_of(world, [0.5, 0.1, 0.2], 1.0))
    world.run(0.3)
    world.ask(Request.STOP)
    world.run(1.0)
    assert world.last.state is State.HOLDING
    np.testing.assert_allclose(world.command[BASE], [0.5, 0.1, 0.2], atol=1e-9)
    assert walks(world)


@pytest.mark.parametrize("seed", range(4))
def test_limits_hold_between_executed_commands_under_any_chunks(make_world: MakeWorld, seed: int) -> None:
    """A base sent anywhere and a flag that flickers: the judge looks at what is executed."""
    world = make_world("kuavo_mobile", max_following_error=1e9, refuse_above=1e9)
    rng = np.random.default_rng(seed)
    world.step()
    walked = 0
    for _ in range(40):
        flags = rng.integers(0, 2, 50) if rng.random() < 0.5 else np.full(50, rng.integers(0, 2))
        nowhere = rng.choice([1e308, -9.0, 0.3], (50, 3))
        base = np.where(flags[:, None] > 0.5, rng.uniform(-2, 2, (50, 3)), nowhere)
        assert world.tick(chunk_of(world, base, flags, arms=rng.uniform(-0.3, 0.3))).accepted
        for _ in range(int(rng.integers(2, 25))):
            world.tick()
            walked += walks(world)
    assert 50 < walked < 400
    assert world.judge.worst_velocity > 0.9
    assert world.judge.worst_acceleration > 0.9
