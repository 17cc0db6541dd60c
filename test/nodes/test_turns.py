"""How chunks of the two modes are timed."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.nodes.turns import (
    HOLD_S,
    LEFT_BEHIND_RAD,
    continued,
    followed,
    in_turns,
    next_due_ns,
    standing,
)
from kuavo_smolvla_ros.robot.spec import load_spec

MS = 1_000_000
FPS = 10.0


def chunk(values: np.ndarray, times_ns: np.ndarray, stamp_ns: int = 5_000 * MS) -> ActionChunk:
    names = tuple(f"joint{i}" for i in range(values.shape[1]))
    return ActionChunk(stamp_ns, times_ns, names, values, "task", 1, "robot")


def ramp(rows: int = 50) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(rows)[:, None] * np.ones((1, 2)), np.arange(rows) * 100 * MS


@given(st.integers(1, 60), st.integers(0, 2_000 * MS))
def test_in_turns_the_first_steps_begin_when_the_answer_is_there(count: int, late_ns: int) -> None:
    values, times = ramp()
    cut, at = in_turns(values, times, count, late_ns)
    kept = min(count, 50)
    assert cut[:kept].tolist() == values[:kept].tolist()
    assert cut[-1].tolist() == values[kept - 1].tolist(), "the last one is held"
    assert at[0] == late_ns
    assert at[-1] - at[-2] == round(HOLD_S * 1000) * MS
    due = next_due_ns(chunk(cut, at), count, FPS)
    assert due == 5_000 * MS + late_ns + count * 100 * MS, "after its steps, counted from when they begin"


def test_in_real_time_the_next_thought_is_due_by_the_observation_and_told_of_what_goes_on() -> None:
    values, times = ramp()
    first = chunk(values, times)
    assert next_due_ns(first, 8, FPS) == 5_800 * MS
    rest, delay = continued(first, 5_850 * MS, FPS, latency_s=0.25)
    assert rest is not None
    assert rest[:, 0].tolist() == np.arange(8.5, 49.0).tolist()
    assert delay == 3
    assert continued(first, 9_850 * MS, FPS, latency_s=1.2)[1] == 1, "no more than there is"
    assert continued(first, 10_000 * MS, FPS, latency_s=0.1) == (None, 0), "it is over"
    assert continued(None, 5_000 * MS, FPS, latency_s=0.1) == (None, 0)


def test_before_the_first_chunk_the_robot_stands_still_and_will() -> None:
    still = np.array([0.5, -0.2])
    rest, delay = continued(None, 5_000 * MS, FPS, latency_s=0.25, still=still)
    assert rest is not None
    assert delay == 4, "three that will be past, and the one that is due then"
    assert rest.tolist() == [still.tolist()] * 4
    assert continued(None, 5_000 * MS, FPS, latency_s=0.0, still=still)[1] == 1
    assert continued(None, 5_000 * MS, FPS, latency_s=9.0, still=still, most=4)[1] == 4


def test_after_a_chunk_that_is_over_the_robot_stands_still_as_before_the_first() -> None:
    values, times = ramp()
    still = np.array([0.5, -0.2])
    over = continued(chunk(values, times), 10_000 * MS, FPS, latency_s=0.25, still=still)
    first = continued(None, 10_000 * MS, FPS, latency_s=0.25, still=still)
    assert over[0] is not None
    assert first[0] is not None
    assert (over[0].tolist(), over[1]) == (first[0].tolist(), first[1])


SIM = load_spec("kuavo_sim")
AT = {name: SIM.state_names.index(name) for name in SIM.action_names if name in SIM.state_names}
ARM = next(name for name in AT if SIM.joints[name].group.endswith("_arm"))
CLAW = next(name for name in AT if not SIM.joints[name].group.endswith("_arm"))


def moving(joint: str, speed: float = 1.0) -> ActionChunk:
    """Ten seconds in which one joint moves and the others are at zero."""
    values = np.zeros((101, len(SIM.action_names)))
    values[:, SIM.action_names.index(joint)] = np.arange(101) * 0.1 * speed
    return ActionChunk(5_000 * MS, np.arange(101) * 100 * MS, SIM.action_names, values, "task", 1, "robot")


def measured(joint: str, value: float) -> np.ndarray:
    state = np.zeros(len(SIM.state_names))
    state[AT[joint]] = value
    return state


@given(st.floats(0.0, 10.0), st.floats(-2.0, 12.0))
def test_a_plan_is_continued_while_the_arms_are_near_it_at_that_time(after_s: float, pose: float) -> None:
    previous = moving(ARM)
    kept = followed(SIM, previous, measured(ARM, pose), 5_000 * MS + round(after_s * 1000) * MS)
    if abs(pose - round(after_s, 3)) < LEFT_BEHIND_RAD - 1e-3:
        assert kept is previous
    elif abs(pose - round(after_s, 3)) > LEFT_BEHIND_RAD + 1e-3:
        assert kept is None


def test_a_gripper_that_holds_a_thing_leaves_no_plan_behind() -> None:
    previous = moving(CLAW)
    assert followed(SIM, previous, measured(CLAW, 0.0), 12_000 * MS) is previous


def test_arms_held_before_a_plan_and_after_its_end_are_compared_with_its_ends() -> None:
    previous = moving(ARM)
    assert followed(SIM, previous, measured(ARM, 0.0), 4_000 * MS) is previous
    assert followed(SIM, previous, measured(ARM, 10.0), 60_000 * MS) is previous
    assert followed(SIM, previous, measured(ARM, 9.0), 60_000 * MS) is None
    assert followed(SIM, None, measured(ARM, 0.0), 4_000 * MS) is None


def test_an_arm_joint_that_nobody_measures_says_nothing() -> None:
    blind = dataclasses.replace(SIM, state=())
    assert followed(blind, moving(ARM), np.zeros(0), 12_000 * MS) is not None


def test_standing_is_where_the_arms_are_measured() -> None:
    spec = load_spec("kuavo_sim")
    state = np.linspace(-1.0, 1.0, len(spec.state_names))
    told = standing(spec, state)
    assert told is not None
    assert dict(zip(spec.action_names, told, strict=True)) == dict(zip(spec.state_names, state, strict=True))


def test_a_base_that_stands_is_told_nothing_else() -> None:
    spec = load_spec("kuavo_mobile")
    told = standing(spec, np.ones(len(spec.state_names)))
    assert told is not None
    assert told[-4:].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert told[: len(spec.state_names)].tolist() == [1.0] * len(spec.state_names)


def test_what_nobody_measures_and_nothing_gates_cannot_be_held() -> None:
    spec = load_spec("kuavo_sim")
    blind = dataclasses.replace(spec, state=spec.state[1:])
    assert standing(blind, np.zeros(len(blind.state_names))) is None
