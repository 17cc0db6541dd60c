"""A bad command changes nothing, and the refusal names the joint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.sim.command import (
    LIMIT_TOLERANCE,
    CommandError,
    action_limits,
    action_names,
    check_action,
)

LOWER, UPPER = action_limits(mobile=False)
MIDDLE = (LOWER + UPPER) / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("joint", [0, 7, 15])
def test_no_number_is_refused_by_name(bad, joint):
    action = MIDDLE.copy()
    action[joint] = bad
    with pytest.raises(CommandError, match=action_names(mobile=False)[joint]):
        check_action(action, mobile=False)


@pytest.mark.parametrize(
    "wrong", [MIDDLE[:15], np.append(MIDDLE, 0.0), MIDDLE[None], [], 0.5, "open", None, [["a"] * 16]]
)
def test_wrong_shapes_and_types_are_refused(wrong):
    with pytest.raises(CommandError, match="refused"):
        check_action(wrong, mobile=False)


def test_widths_of_the_two_robots_do_not_mix():
    with pytest.raises(CommandError, match=r"expected \(20,\)"):
        check_action(MIDDLE, mobile=True)
    with pytest.raises(CommandError, match=r"expected \(16,\)"):
        check_action(np.append(MIDDLE, [0, 0, 0, 0]), mobile=False)


@given(st.lists(st.floats(0, 1), min_size=16, max_size=16))
def test_everything_inside_the_limits_is_taken_as_it_is(shares):
    action = LOWER + np.array(shares) * (UPPER - LOWER)
    assert check_action(action, mobile=False) == pytest.approx(action, abs=1e-12)


@given(st.integers(0, 15), st.booleans(), st.floats(2 * LIMIT_TOLERANCE, 1e6))
def test_everything_outside_is_refused_with_the_joint_and_its_limits(joint, above, excess):
    action = MIDDLE.copy()
    action[joint] = UPPER[joint] + excess if above else LOWER[joint] - excess
    with pytest.raises(CommandError, match=f"{action_names(mobile=False)[joint]}.*limits"):
        check_action(action, mobile=False)


def test_a_limit_rounded_to_float32_is_the_limit():
    for bound in (LOWER, UPPER):
        assert check_action(bound.astype(np.float32), mobile=False) == pytest.approx(bound, abs=1e-6)


def test_a_refused_command_leaves_the_arm_on_its_last_target(simulation):
    sim = simulation(1)
    goal = sim.state()
    goal[3] += 0.2
    sim.command(goal)
    sim.step(20)
    bad = goal.copy()
    bad[4] = np.nan
    for refused in (bad, goal[:8], goal + 10.0):
        with pytest.raises(CommandError):
            sim.command(refused)
        with pytest.raises(CommandError):
            sim.act(refused)
    assert sim.time_s == pytest.approx(0.2)
    assert sim.target == pytest.approx(goal)
    sim.step(200)
    assert sim.state()[3] == pytest.approx(goal[3], abs=0.01)
