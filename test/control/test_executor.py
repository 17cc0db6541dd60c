"""The executor's states: how it begins, follows, switches tasks, stops, and goes on only when asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.control.chunk import Refusal
from kuavo_smolvla_ros.control.reasons import RefusalReason, Request, State, StopReason, Transition

MakeWorld = Callable[..., Any]
S = 1_000_000_000
MS = 1_000_000


def arms(world: Any) -> np.ndarray:
    return world.settings.index(world.settings.pose_names)


def test_says_nothing_before_a_pose_is_known(world: Any) -> None:
    for _ in range(20):
        decision = world.tick(joints=None)
        assert decision.command is None
        assert decision.state is State.IDLE
    assert "no joint state" in world.last.detail


def test_idle_holds_the_first_measured_pose_and_does_not_creep_with_it(world: Any) -> None:
    pose = world.pose.copy()
    world.step()
    world.follows = False
    for _ in range(100):
        world.pose = world.pose - 0.0005  # gravity
        decision = world.tick()
    assert decision.state is State.IDLE
    assert np.array_equal(world.command, pose)


def test_first_command_is_the_measured_pose(world: Any) -> None:
    pose = world.pose.copy()
    decision = world.follow(0.4)
    assert decision.state is State.FOLLOWING
    assert np.abs(world.command - pose).max() < 0.05


def test_follows_a_chunk_to_its_end(world: Any) -> None:
    goal = world.chunk(0.3).values[-1]
    world.follow(0.3)
    world.run(3.0)
    np.testing.assert_allclose(world.command, goal, atol=1e-9)
    assert world.last.task == "task1"
    assert world.last.sequence == 2


def test_tracks_the_plan_in_time_and_not_by_counting(world: Any) -> None:
    """A chunk from an observation 0.4 s ago is entered 0.4 s from its start."""
    world.step()
    chunk = world.chunk(0.4, age_s=0.4, reach_s=2.0)
    world.tick(chunk)
    world.run(1.0)
    elapsed = (world.ros_ns - chunk.stamp_ns) / S
    joint = int(arms(world)[0])
    expected = np.interp(elapsed, chunk.times_ns / S, chunk.values[:, joint])
    assert world.command[joint] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("offset", [0.1, 0.3, 0.45])
def test_a_target_away_from_the_pose_is_ramped_to(make_world: MakeWorld, offset: float) -> None:
    world = make_world()
    world.step()
    chunk = world.chunk()
    joint = int(arms(world)[1])
    values = chunk.values.copy()
    values[:, joint] += offset
    decision = world.tick(world.chunk(values=values))
    assert decision.state is State.RAMPING
    speeds = []
    while world.last.state is State.RAMPING:
        before = world.command
        world.tick()
        speeds.append(np.abs(world.command - before).max() / 0.01)
    ceiling = world.settings.ramp_speed * world.settings.limits.velocity[joint]
    assert max(speeds) <= ceiling * (1 + 1e-9)
    assert world.last.state is State.FOLLOWING
    assert abs(world.command[joint] - values[-1, joint]) <= world.settings.ramp_above


def test_a_target_within_the_bound_is_followed_at_once(world: Any) -> None:
    world.step()
    values = world.chunk().values + 0.04
    assert world.tick(world.chunk(values=values)).state is State.FOLLOWING


def test_a_gripper_far_away_needs_no_ramp(world: Any) -> None:
    world.step()
    values = world.chunk().values.copy()
    values[:, 7] = 1.0
    assert world.tick(world.chunk(values=values)).state is State.FOLLOWING


def test_a_joint_too_far_outside_its_limits_keeps_everything_still(world: Any) -> None:
    joint = int(arms(world)[4])
    world.pose[joint] = world.settings.limits.upper[joint] + 0.3
    decision = world.step()
    assert decision.command is None
    assert "outside its limits" in decision.detail
    refused = world.tick(world.chunk()).refused
    assert [r.reason for r in refused] == [RefusalReason.NO_MEASURED_POSE]
    world.pose[joint] = world.settings.limits.upper[joint] - 0.1
    assert world.tick().command is not None


def test_a_joint_slightly_outside_is_held_there_and_let_in_by_a_chunk(world: Any) -> None:
    joint = int(arms(world)[4])
    upper = world.settings.limits.upper[joint]
    world.pose[joint] = upper + 0.05
    world.step()
    world.run(0.2)
    assert world.command[joint] == upper + 0.05
    world.tick(world.chunk(-0.2))
    world.run(2.0)
    assert world.command[joint] < upper


def test_an_arm_that_is_not_used_keeps_its_pose(make_world: MakeWorld) -> None:
    world = make_world("kuavo_sim_left")
    kept = world.settings.index(tuple(n for n in world.settings.names if "_r" in n or "right" in n))
    assert len(kept) == 8
    pose = world.pose.copy()
    world.follow(0.3)
    for _ in range(150):
        world.tick()
        assert np.array_equal(world.command[kept], pose[kept])
    world.ask(Request.STOP)
    world.run(0.5)
    assert np.array_equal(world.command[kept], pose[kept])


def test_joints_that_nobody_measures_begin_at_their_first_target(make_world: MakeWorld) -> None:
    world = make_world("kuavo_mobile")
    base = [world.settings.names.index(n) for n in ("base_x", "base_y", "base_yaw", "base_move")]
    assert world.step().command is None  # there is no value for the base, and none is made up
    values = world.chunk().values.copy()
    values[:, base] = [0.7, -0.3, 0.5, 1.0]
    pose = world.pose.copy()
    world.tick(world.chunk(values=values))
    np.testing.assert_allclose(world.command[base], [0.7, -0.3, 0.5, 1.0])
    assert np.array_equal(world.command[:16], pose[:16])
    world.ask(Request.STOP)
    world.run(1.0)
    np.testing.assert_allclose(world.command[base], [0.7, -0.3, 0.5, 1.0])


def test_a_slow_base_does_not_delay_the_stop_of_the_arms(make_world: MakeWorld) -> None:
    world = make_world("kuavo_mobile")
    world.step()
    values = world.chunk().values + np.clip(np.arange(50) - 2, 0, 50)[:, None] * 0.1
    values = np.clip(values, world.settings.limits.lower, world.settings.limits.upper)
    world.tick(world.chunk(values=values))
    world.run(0.7)
    world.ask(Request.STOP)
    arm_rest = base_rest = None
    for k in range(60):
        before = world.command
        world.tick()
        moved = np.abs(world.command - before)
        arm_rest = k if arm_rest is None and not moved[arms(world)].any() else arm_rest
        base_rest = k if base_rest is None and not moved.any() else base_rest
    assert arm_rest is not None
    assert base_rest is not None
    assert arm_rest * 0.01 <= 0.26
    assert arm_rest < base_rest


def test_stop_brakes_along_the_direction_of_motion_and_holds(world: Any) -> None:
    world.follow(np.linspace(0.1, 0.3, 16), reach_s=0.5)
    world.run(0.3)
    at = arms(world)
    start = world.command
    speed = world.executor.guard.velocity[at]
    world.ask(Request.STOP)
    assert world.last.state is State.STOPPING
    while world.last.state is State.STOPPING:
        world.tick()
    moved = (world.command - start)[at]
    assert np.abs(moved).max() > 0.005
    np.testing.assert_allclose(moved / np.linalg.norm(moved), speed / np.linalg.norm(speed), atol=1e-9)
    held = world.command
    world.run(1.0)
    assert np.array_equal(world.command, held)
    assert (world.last.state, world.last.reason) == (State.HOLDING, StopReason.OPERATOR_STOP)


def test_while_stopped_no_chunk_is_used(world: Any) -> None:
    world.follow(0.2)
    world.ask(Request.STOP)
    world.run(0.5)
    held = world.command
    for _ in range(20):
        decision = world.tick(world.chunk(0.3))
        assert [r.reason for r in decision.refused] == [RefusalReason.STOPPED]
    assert np.array_equal(world.command, held)


def test_resume_starts_from_the_measured_pose(world: Any) -> None:
    world.follow(0.2)
    world.ask(Request.STOP)
    world.run(0.4)
    world.follows = False
    world.pose = world.pose + np.where(np.isin(np.arange(16), arms(world)), 0.03, 0.0)
    decision = world.ask(Request.RESUME)
    assert decision.answer is not None
    assert decision.answer.accepted
    assert decision.state is State.IDLE
    world.run(0.5)
    np.testing.assert_allclose(world.command, world.pose, atol=1e-9)


def test_resume_ramps_to_a_pose_that_was_moved_by_hand(world: Any) -> None:
    world.follow(0.2)
    world.ask(Request.STOP)
    world.run(0.4)
    world.follows = False
    middle = (world.settings.limits.lower + world.settings.limits.upper) / 2
    world.pose = world.pose + np.sign(middle - world.pose) * np.where(
        np.isin(np.arange(16), arms(world)), 0.3, 0
    )
    before = world.command
    world.policy_alive = False  # the way back to the measured pose needs no policy
    decision = world.ask(Request.RESUME)
    assert decision.state is State.RAMPING
    assert np.abs(world.command - before).max() < 0.01
    while world.last.state is State.RAMPING:
        world.tick()
    assert world.last.state is State.IDLE
    assert np.abs(world.command - world.pose)[arms(world)].max() <= world.settings.ramp_above


def test_resume_from_far_away_is_not_a_following_error(world: Any) -> None:
    world.step()
    world.run(0.1)
    world.ask(Request.STOP)
    world.follows = False
    world.pose[3] += 0.6
    decision = world.ask(Request.RESUME)
    assert decision.answer.accepted
    while world.last.state is State.RAMPING:
        world.tick()
    assert (world.last.state, world.last.reason) == (State.IDLE, None)
    assert world.command[3] == pytest.approx(world.pose[3], abs=0.05)


def test_resume_does_not_let_go_of_what_a_gripper_holds(world: Any) -> None:
    grippers = [7, 15]
    world.step()
    values = world.chunk().values.copy()
    values[:, grippers] = 1.0
    world.tick(world.chunk(values=values))
    world.run(0.8)
    world.follows = False
    world.pose[grippers] = 0.6  # fingers rest on the object
    world.ask(Request.STOP)
    world.run(0.3)
    world.ask(Request.RESUME)
    world.run(0.3)
    np.testing.assert_allclose(world.command[grippers], 1.0)


def test_an_observation_from_before_the_resume_is_not_used(world: Any) -> None:
    world.follow(0.2)
    world.ask(Request.STOP)
    world.run(0.4)
    world.ask(Request.RESUME)
    decision = world.tick(world.chunk(0.1, age_s=0.2))
    assert [r.reason for r in decision.refused] == [RefusalReason.STALE]
    world.run(0.1)
    assert world.tick(world.chunk(0.1, age_s=0.05)).accepted


@pytest.mark.parametrize("request_", [Request.RESUME, Request.UNPAUSE])
def test_there_is_nothing_to_resume_while_moving_or_idle(world: Any, request_: Request) -> None:
    world.step()
    assert world.ask(request_).answer.accepted is False
    world.tick(world.chunk(0.2))
    decision = world.ask(request_)
    assert decision.answer.accepted is False
    assert decision.state is State.FOLLOWING


def test_resume_while_still_stopping_is_declined(world: Any) -> None:
    world.follow(0.4, reach_s=0.5)
    world.run(0.3)
    decision = world.ask(Request.STOP, Request.RESUME)
    assert decision.state is State.STOPPING
    assert decision.answer.accepted is False
    assert "stopping" in decision.answer.detail


def test_pause_ends_by_unpause_but_a_stop_does_not(world: Any) -> None:
    world.follow(0.2)
    world.ask(Request.PAUSE)
    world.run(0.4)
    assert world.last.reason is StopReason.OPERATOR_PAUSE
    assert world.ask(Request.UNPAUSE).state is State.IDLE
    world.tick(world.chunk(0.1))
    world.ask(Request.PAUSE)
    world.run(0.4)
    world.ask(Request.STOP)
    assert world.last.reason is StopReason.OPERATOR_STOP
    decision = world.ask(Request.UNPAUSE)
    assert decision.answer.accepted is False
    assert decision.state is State.HOLDING


def test_emergency_stop_stays_until_released_and_then_until_resumed(world: Any) -> None:
    world.follow(0.3)
    world.run(0.2)
    world.ask(Request.E_STOP)
    world.run(0.5)
    assert (world.last.state, world.last.reason) == (State.HOLDING, StopReason.E_STOP)
    assert world.ask(Request.RESUME).answer.accepted is False
    assert world.ask(Request.STOP).reason is StopReason.E_STOP
    released = world.ask(Request.RELEASE_E_STOP)
    assert released.answer.accepted
    assert released.state is State.HOLDING
    assert world.ask(Request.RESUME).state is State.IDLE


def test_emergency_stop_replaces_a_lesser_reason_but_not_the_other_way(world: Any) -> None:
    world.follow(0.3)
    world.ask(Request.STOP)
    world.run(0.4)
    assert world.ask(Request.E_STOP).reason is StopReason.E_STOP
    world.state_alive = False
    assert world.run(1.0).reason is StopReason.E_STOP
    assert world.ask(Request.STOP).reason is StopReason.E_STOP


def test_a_stop_while_idle_is_a_stop(world: Any) -> None:
    world.step()
    assert world.ask(Request.STOP).state is State.HOLDING
    assert not world.tick(world.chunk(0.1)).accepted


def test_shutdown_brings_the_arms_to_rest_and_is_final(world: Any) -> None:
    world.follow(0.4, reach_s=0.5)
    world.run(0.3)
    decision = world.ask(Request.SHUTDOWN)
    periods = 0
    while not decision.at_rest:
        decision = world.tick()
        periods += 1
    assert 0 < periods * 0.01 <= 0.3
    assert world.ask(Request.RESUME).answer.accepted is False


def test_an_arm_that_is_blocked_is_not_pushed_for_ever(world: Any) -> None:
    world.follow(0.3, reach_s=0.5)
    world.run(0.4)
    world.follows = False  # the arms have met something
    world.run(0.1)
    world.ask(Request.STOP)
    world.run(0.3)
    world.pose = world.command - 0.2
    pushed = world.command
    world.run(0.1)
    assert np.array_equal(world.command, pushed)
    world.run(1.5)
    np.testing.assert_allclose(world.command[arms(world)], world.pose[arms(world)], atol=1e-9)
    assert np.array_equal(world.command[[7, 15]], pushed[[7, 15]])
    relaxed = world.command
    world.pose = world.pose - 0.3  # once only: an arm that sinks is not followed down
    world.run(2.0)
    np.testing.assert_allclose(world.command, relaxed, atol=1e-12)


def switch_task(world: Any, **changes: Any) -> Any:
    """0.3 s into a chunk of task 1 comes one of task 2."""
    world.follow(0.3, steps=20, reach_s=1.5)
    world.run(0.3)
    return world.tick(world.chunk(-0.2, task="task2", **changes))


def test_blend_begins_the_new_task_at_once(make_world: MakeWorld) -> None:
    world = make_world()
    assert switch_task(world).task == "task2"
    assert world.last.state is State.FOLLOWING


def test_finish_chunk_begins_the_new_task_at_the_end_of_the_old_chunk(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.FINISH_CHUNK)
    end_ns = switch_task(world).ros_ns
    assert world.last.task == "task1"
    end_ns = world.executor.plan.valid_until_ns
    while world.last.task == "task1":
        world.tick()
        assert world.last.state is State.FOLLOWING
    assert end_ns - 110 * MS <= world.ros_ns <= end_ns
    world.run(1.0)
    assert (world.last.state, world.last.task) == (State.FOLLOWING, "task2")


def test_finish_chunk_uses_the_newest_of_those_that_waited(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.FINISH_CHUNK)
    switch_task(world)
    newest = world.chunk(0.1, task="task3")
    world.tick(newest)
    while world.last.task == "task1":
        world.tick()
    assert (world.last.task, world.last.sequence) == ("task3", newest.sequence)


def test_finish_chunk_drops_one_that_waited_too_long(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.FINISH_CHUNK)
    switch_task(world, steps=8)
    refused: list[Refusal] = []
    while world.last.state is State.FOLLOWING:
        refused += world.tick().refused
    assert [r.reason for r in refused] == [RefusalReason.EXPIRED]
    assert world.last.reason is StopReason.STARVED


def test_finish_chunk_goes_back_when_the_old_task_is_asked_for_again(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.FINISH_CHUNK)
    switch_task(world)
    world.tick(world.chunk(0.1, task="task1"))
    world.run(2.5)
    assert world.last.task == "task1"


def test_stop_then_switch_comes_to_rest_first_and_goes_on_by_itself(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.STOP_THEN_SWITCH)
    decision = switch_task(world)
    assert (decision.state, decision.reason) == (State.STOPPING, StopReason.TASK_SWITCH)
    while world.last.state is State.STOPPING:
        world.tick()
    assert world.last.state is State.HOLDING
    assert world.last.at_rest
    while world.last.state is not State.FOLLOWING:
        world.tick(world.chunk(-0.2, task="task2"))
    assert (world.last.task, world.last.reason) == ("task2", None)


def test_stop_then_switch_can_still_be_stopped_for_good(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.STOP_THEN_SWITCH)
    switch_task(world)
    world.ask(Request.STOP)
    world.run(1.0)
    assert (world.last.state, world.last.reason) == (State.HOLDING, StopReason.OPERATOR_STOP)


def test_stop_then_switch_notices_that_the_policy_died_meanwhile(make_world: MakeWorld) -> None:
    world = make_world(transition=Transition.STOP_THEN_SWITCH)
    world.follow(0.3, reach_s=0.5)
    world.run(0.3)
    world.tick(world.chunk(task="task2", steps=2, fps=50, age_s=0.0))  # over before the arms are at rest
    world.policy_alive = False
    world.run(1.0)
    assert [r.reason for d in world.decisions for r in d.refused] == [RefusalReason.EXPIRED]
    assert (world.last.state, world.last.reason) == (State.HOLDING, StopReason.POLICY_LOST)


def test_braking_begins_one_period_after_the_last_step_at_the_latest(world: Any) -> None:
    world.follow(0.4, steps=6, reach_s=0.5)
    end_ns = world.executor.plan.valid_until_ns
    while world.last.state is State.FOLLOWING:
        world.tick()
    assert world.last.reason is StopReason.STARVED
    assert 0 < world.ros_ns - end_ns <= 10 * MS
    speeds = [np.abs(world.executor.guard.velocity).max()]
    while world.last.state is State.STOPPING:
        world.tick()
        speeds.append(np.abs(world.executor.guard.velocity).max())
    assert speeds[0] > 0.3
    assert np.all(np.diff(speeds) < 0)


def test_starving_can_be_told_to_wait_for_the_next_chunk(make_world: MakeWorld) -> None:
    world = make_world(starvation_latches=False)
    world.follow(0.2, steps=6)
    world.run(1.0)
    assert (world.last.state, world.last.reason) == (State.HOLDING, StopReason.STARVED)
    decision = world.tick(world.chunk(0.1))
    assert (decision.state, decision.reason) == (State.FOLLOWING, None)


def test_a_chunk_that_comes_while_braking_for_want_of_one_is_followed_at_once(make_world: MakeWorld) -> None:
    world = make_world(starvation_latches=False)
    world.follow(0.4, steps=6, reach_s=0.5)
    while world.last.state is State.FOLLOWING:
        world.tick()
    world.tick()
    assert world.last.state is State.STOPPING
    assert world.tick(world.chunk(0.1)).state in (State.FOLLOWING, State.RAMPING)


def test_what_the_guard_keeps_back_is_counted_by_joint(world: Any) -> None:
    world.step()
    values = world.chunk().values.copy()
    joint = int(arms(world)[3])
    values[10:, joint] = world.settings.limits.upper[joint] + 0.5
    world.tick(world.chunk(values=values))
    world.run(3.0)
    name = world.settings.names[joint]
    assert world.last.limited == (name,)
    assert list(world.last.interventions) == [name]
    assert world.last.interventions[name] > 100


def test_a_chunk_that_was_no_array_is_reported_like_any_refused_one(world: Any) -> None:
    world.follow(0.1)
    ragged = Refusal(RefusalReason.WRONG_SHAPE, "points have between 1 and 3 positions", 9)
    assert world.tick(ragged).refused == (ragged,)
    assert world.last.state is State.FOLLOWING
