"""Every fault has its named reason, ends motion within its time, and stays until somebody asks to go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.control.reasons import (
    ADVICE,
    RefusalReason,
    Request,
    State,
    StopReason,
    Transition,
)

MakeWorld = Callable[..., Any]
Fault = Callable[[Any], Any]
S = 1_000_000_000
MS = 1_000_000


def moving(world: Any) -> Any:
    """Arms in fast motion, with a chunk that lasts."""
    world.follow(np.tile([0.35, -0.35], 8), reach_s=0.6)
    world.run(0.3)
    assert world.last.state is State.FOLLOWING
    assert np.abs(world.executor.guard.velocity).max() > 0.5
    return world


def _nan_state(world: Any) -> Any:
    world.pose[3] = np.nan
    return world.tick()


def _short_state(world: Any) -> Any:
    inputs = world.inputs()
    return world.tick(joints=replace(inputs.joints, positions=inputs.joints.positions[:15]))


def _state_lost(world: Any) -> Any:
    world.state_alive = False
    return world.run(0.12)


def _state_from_the_future(world: Any) -> Any:
    inputs = world.inputs()
    return world.tick(joints=replace(inputs.joints, stamp_ns=world.ros_ns + S))


def _state_silent_while_clock_stands(world: Any) -> Any:
    for _ in range(60):
        world.mono_ns += 10 * MS
        world.state_alive = False
        world.step()
    return world.last


def _clock_forward(world: Any) -> Any:
    world.ros_ns += 100 * S
    return world.tick()


def _clock_back(world: Any) -> Any:
    world.ros_ns -= 3 * S
    return world.tick()


def _policy_killed(world: Any) -> Any:
    world.policy_alive = False
    return world.run(0.22)


def _starved(world: Any) -> Any:
    while world.last.state is State.FOLLOWING:
        world.tick()
    return world.last


def _arms_blocked(world: Any) -> Any:
    world.follows = False
    world.pose = world.pose - 0.55
    return world.tick()


FAULTS: list[tuple[StopReason, str, Fault]] = [
    (StopReason.E_STOP, "emergency", lambda w: w.ask(Request.E_STOP)),
    (StopReason.OPERATOR_STOP, "asked", lambda w: w.ask(Request.STOP)),
    (StopReason.OPERATOR_PAUSE, "asked", lambda w: w.ask(Request.PAUSE)),
    (StopReason.SHUTDOWN, "ending", lambda w: w.ask(Request.SHUTDOWN)),
    (StopReason.FOREIGN_PUBLISHER, "/teleop", lambda w: w.tick(foreign_publishers=("/teleop",))),
    (StopReason.CLOCK_JUMP, "+100.0", _clock_forward),
    (StopReason.CLOCK_JUMP, "-2.99", _clock_back),
    (StopReason.CONTROL_GAP, "0.300 s", lambda w: w.tick(dt_s=0.3)),
    (StopReason.JOINT_STATE_INVALID, "zarm_l4_joint is nan", _nan_state),
    (StopReason.JOINT_STATE_INVALID, "(15,)", _short_state),
    (StopReason.JOINT_STATE_STALE, "old", _state_lost),
    (StopReason.JOINT_STATE_STALE, "ahead", _state_from_the_future),
    (StopReason.JOINT_STATE_STALE, "monotonic", _state_silent_while_clock_stands),
    (StopReason.JOINT_STATE_STALE, "no joint state", lambda w: w.tick(joints=None)),
    (StopReason.PRECONDITION, "arm mode", lambda w: w.tick(unmet="arm mode is 1, not 2")),
    (StopReason.FOLLOWING_ERROR, "from its command", _arms_blocked),
    (StopReason.POLICY_LOST, "no sign of the policy", _policy_killed),
    (StopReason.STARVED, "ended", _starved),
]
IDS = [f"{reason.value}-{i}" for i, (reason, _, _) in enumerate(FAULTS)]
SILENT = (StopReason.FOREIGN_PUBLISHER, StopReason.PRECONDITION)


@pytest.mark.parametrize(("reason", "words", "fault"), FAULTS, ids=IDS)
def test_a_fault_is_named_brings_the_arms_to_rest_and_stays(
    world: Any, reason: StopReason, words: str, fault: Fault
) -> None:
    decision = fault(moving(world))
    assert decision.reason is reason
    assert words in decision.detail
    assert decision.state in (State.STOPPING, State.HOLDING)
    world.state_alive = world.policy_alive = True
    world.pose = np.where(np.isfinite(world.pose), world.pose, 0.0)
    for _ in range(26):  # 2.5 rad/s at 10 rad/s2, and the period in which it is noticed
        world.tick()
    assert world.last.state is State.HOLDING
    assert world.last.at_rest
    for _ in range(30):
        decision = world.tick(world.chunk(0.1))
        assert (decision.state, decision.reason) == (State.HOLDING, reason)
        assert not decision.accepted
        assert (decision.command is None) == (reason in SILENT)


@pytest.mark.parametrize(("reason", "words", "fault"), FAULTS, ids=IDS)
def test_after_every_fault_motion_goes_on_when_asked_and_only_from_the_measured_pose(
    world: Any, reason: StopReason, words: str, fault: Fault
) -> None:
    fault(moving(world))
    world.state_alive = world.policy_alive = world.follows = True
    world.pose = np.where(np.isfinite(world.pose), world.pose, world.settings.limits.lower + 0.5)
    world.run(2.0)
    requests = (Request.RELEASE_E_STOP, Request.RESUME) if reason is StopReason.E_STOP else (Request.RESUME,)
    decision = world.ask(*requests)
    if reason is StopReason.SHUTDOWN:
        assert not decision.answer.accepted
        return
    assert decision.answer.accepted, decision.answer.detail
    world.run(2.0)
    assert (world.last.state, world.last.reason) == (State.IDLE, None)
    first = world.tick(world.chunk(0.1))
    assert first.accepted
    assert np.abs(world.command - world.pose).max() < 0.05
    world.run(0.5)
    assert world.last.state is State.FOLLOWING


def test_every_stop_reason_is_reached_by_a_test_and_has_advice() -> None:
    reached = {reason for reason, _, _ in FAULTS} | {StopReason.TASK_SWITCH}
    assert reached == set(StopReason)
    assert set(ADVICE) == set(StopReason)


@pytest.mark.parametrize(
    ("reason", "keeps_failing"),
    [
        (StopReason.JOINT_STATE_STALE, {"joints": None}),
        (StopReason.PRECONDITION, {"unmet": "not in stance"}),
        (StopReason.FOREIGN_PUBLISHER, {"foreign_publishers": ("/teleop",)}),
    ],
)
def test_resume_is_declined_while_the_cause_lasts(
    world: Any, reason: StopReason, keeps_failing: dict[str, Any]
) -> None:
    moving(world)
    world.run(0.5, **keeps_failing)
    decision = world.ask(Request.RESUME, **keeps_failing)
    assert decision.answer.accepted is False
    assert decision.answer.detail.startswith(reason.value)
    assert decision.reason is reason
    assert world.ask(Request.RESUME).answer.accepted


def test_resume_is_declined_with_a_joint_outside_its_limits(world: Any) -> None:
    moving(world)
    world.ask(Request.STOP)
    world.run(0.5)
    world.follows = False
    world.pose[0] = world.settings.limits.upper[0] + 0.4
    decision = world.ask(Request.RESUME)
    assert decision.answer.accepted is False
    assert "outside its limits" in decision.answer.detail


@pytest.mark.parametrize(
    "idle_fault",
    [
        {"unmet": "not in stance"},
        {"joints": None},
    ],
)
def test_while_idle_a_fault_refuses_chunks_but_latches_nothing(
    world: Any, idle_fault: dict[str, Any]
) -> None:
    world.step()
    decision = world.tick(world.chunk(0.1), **idle_fault)
    assert decision.state is State.IDLE
    assert len(decision.refused) == 1
    world.run(0.1, **idle_fault)
    assert world.tick(world.chunk(0.1)).state is State.FOLLOWING


def test_a_clock_that_jumps_while_idle_is_no_fault(world: Any) -> None:
    """A simulator that starts after us takes the clock from zero to now."""
    world.ros_ns = 0
    world.step()
    world.run(0.2)
    world.ros_ns = 1_760_000_000 * S
    assert world.tick().state is State.IDLE
    assert world.tick(world.chunk(0.1, age_s=0.0)).state is State.FOLLOWING


def test_after_a_clock_reset_chunks_of_the_new_time_are_not_out_of_order(world: Any) -> None:
    moving(world)
    world.ros_ns -= 500 * S
    world.tick()
    world.run(0.5)
    world.ask(Request.RESUME)
    world.run(0.1)
    assert world.tick(world.chunk(0.1)).accepted


def test_after_a_clock_reset_while_idle_chunks_of_the_new_time_are_used_and_old_ones_not(world: Any) -> None:
    moving(world)
    world.ask(Request.STOP)
    world.run(0.5)
    world.ask(Request.RESUME)
    world.run(0.1)
    old = world.chunk(0.1)
    world.ros_ns -= 500 * S
    decision = world.tick(replace(old, stamp_ns=world.ros_ns - 50 * MS))
    assert [r.reason for r in decision.refused] == [RefusalReason.STALE]
    world.run(0.1)
    assert world.tick(world.chunk(0.1)).accepted


def test_silence_begins_at_once_when_someone_else_commands(world: Any) -> None:
    moving(world)
    decision = world.tick(foreign_publishers=("/teleop", "/moveit"))
    assert decision.command is None
    assert decision.state is State.HOLDING
    world.follows = False
    limits = world.settings.limits
    world.pose = np.clip(world.pose + 0.3, limits.lower, limits.upper)  # they move the arms elsewhere
    world.run(0.5)
    assert world.last.command is None
    world.ask(Request.RESUME)
    np.testing.assert_allclose(world.command, world.pose)


def rest_time_s(world: Any, **changes: Any) -> float:
    """Until commands stop changing, on the monotonic clock."""
    start = world.mono_ns
    while not (world.last.state is State.HOLDING and world.last.at_rest):
        world.tick(**changes)
        assert world.mono_ns - start < 5 * S
    return float(world.mono_ns - start) / S


@pytest.mark.parametrize("time_factor", [0.2, 1.0, 3.0])
def test_policy_process_killed_arms_at_rest_within_half_a_second(
    make_world: MakeWorld, time_factor: float
) -> None:
    world = make_world()
    world.time_factor = time_factor
    world.step()
    middle = (world.settings.limits.lower + world.settings.limits.upper) / 2
    values = world.chunk().values.copy()
    values += np.sign(middle - values[0]) * np.clip(np.arange(50) - 1, 0, 4)[:, None] * 0.3
    world.tick(world.chunk(values=values))
    world.run(0.3)
    assert np.abs(world.executor.guard.velocity).max() > 1.5
    world.policy_alive = False
    rest_s = rest_time_s(world)
    assert world.last.reason is StopReason.POLICY_LOST
    # The loss is noticed on the wall clock; braking runs on the robot's, which a simulator slows down.
    assert rest_s <= 0.21 + 0.26 / time_factor
    if time_factor >= 1.0:
        assert rest_s <= 0.5


def test_joint_state_age_hold_above_100_ms(world: Any) -> None:
    moving(world)
    world.state_alive = False
    for _ in range(10):
        assert world.tick().state is State.FOLLOWING
    assert world.tick().reason is StopReason.JOINT_STATE_STALE


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("arm", [0, 8])
def test_a_bad_number_for_one_arm_moves_neither(world: Any, bad: float, arm: int) -> None:
    world.step()
    held = world.command
    values = world.chunk(0.3).values.copy()
    values[20, arm] = bad
    decision = world.tick(world.chunk(values=values))
    assert [r.reason for r in decision.refused] == [RefusalReason.NON_FINITE]
    world.run(0.5)
    assert np.array_equal(world.command, held)


def test_a_refused_chunk_leaves_the_plan_in_force_untouched(make_world: MakeWorld) -> None:
    world, twin = make_world(), make_world()
    for w in (world, twin):
        moving(w)
    good = world.chunk(0.1)
    hostile = [
        replace(good, fingerprint="other"),
        replace(good, names=good.names[::-1]),
        replace(good, values=good.values[:, :15]),
        replace(good, values=np.full_like(good.values, np.nan)),
        replace(good, values=good.values + 0.8),
        replace(good, stamp_ns=good.stamp_ns - 60 * S),
        replace(good, stamp_ns=good.stamp_ns + 60 * S),
        replace(good, times_ns=good.times_ns[::-1]),
    ]
    for bad in hostile:
        decision = world.tick(bad)
        twin.tick()
        assert len(decision.refused) == 1
        assert np.array_equal(world.command, twin.command)


def test_a_doubled_a_late_and_a_reordered_chunk_change_nothing(make_world: MakeWorld) -> None:
    world, twin = make_world(), make_world()
    first, second = None, None
    for w in (world, twin):
        w.step()
        first = w.chunk(0.2)
        w.tick(first)
        w.run(0.3)
        second = w.chunk(0.2)
        w.tick(second)
    assert first is not None
    assert second is not None
    for again, reason in ((second, RefusalReason.DUPLICATE), (first, RefusalReason.OUT_OF_ORDER)):
        decision = world.tick(again)
        twin.tick()
        assert [r.reason for r in decision.refused] == [reason]
        assert np.array_equal(world.command, twin.command)


def test_every_refusal_reason_is_reached_through_the_executor(make_world: MakeWorld) -> None:
    world = make_world()
    reached = set()
    world.step(world.chunk(), joints=None)
    reached |= {r.reason for r in world.last.refused}
    world.step()
    good = world.chunk(0.1)
    world.tick(good)
    late = world.chunk(0.1)
    spoilt = [
        good,
        replace(good, sequence=0),
        replace(late, fingerprint=""),
        replace(late, names=()),
        replace(late, values=late.values[:1]),
        replace(late, times_ns=-late.times_ns),
        replace(late, times_ns=late.times_ns * 20),
        replace(late, values=late.values * np.nan),
        replace(late, values=late.values + 10.0),
        replace(late, values=late.values + 1.0),
        replace(late, stamp_ns=late.stamp_ns + S),
        replace(late, stamp_ns=late.stamp_ns + 1, times_ns=late.times_ns // 10_000_000),
        replace(late, stamp_ns=late.stamp_ns - 4 * S),
    ]
    for chunk in spoilt:
        reached |= {r.reason for r in world.tick(chunk).refused}
    world.executor.intake.newest = None
    reached |= {r.reason for r in world.tick(spoilt[-1]).refused}
    world.ask(Request.STOP)
    reached |= {r.reason for r in world.tick(world.chunk()).refused}
    assert reached == set(RefusalReason)


@pytest.mark.parametrize("transition", list(Transition))
@pytest.mark.parametrize("time_factor", [0.2, 1.0, 3.0])
def test_decisions_do_not_depend_on_how_fast_a_simulator_runs(
    make_world: MakeWorld, time_factor: float, transition: Transition
) -> None:
    def story(factor: float) -> list[Any]:
        world = make_world(transition=transition)
        world.time_factor = factor
        moving(world)
        world.tick(world.chunk(-0.2, task="task2"))
        world.run(0.5)
        world.tick(world.chunk(0.2, task="task2"))
        world.run(0.3)
        world.ask(Request.STOP)
        world.run(0.5)
        world.ask(Request.RESUME)
        world.run(0.1)
        world.tick(world.chunk(0.2))
        world.run(0.4)
        return [
            (d.state, d.reason, None if d.command is None else d.command.tolist()) for d in world.decisions
        ]

    assert story(time_factor) == story(1.0)


def test_instruction_change_first_action_of_the_new_task_within_one_period(world: Any) -> None:
    moving(world)
    assert world.tick(world.chunk(-0.2, task="task2")).task == "task2"
