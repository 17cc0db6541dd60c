"""The executor node as a process: what it does to a robot, and what it survives."""

from __future__ import annotations

import signal
import time
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Int32, String

from kuavo_smolvla_ros.robot.spec import RobotSpec

LONGEST_STEP_S = 0.05
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def within_limits(spec: RobotSpec, arms: np.ndarray) -> None:
    """No command outside position limits, none further from the one before than the speed limit allows."""
    names = [n for n in spec.action_names if n.startswith("zarm")]
    limits = spec.limits(names)
    assert np.all(arms >= limits.lower - 1e-9)
    assert np.all(arms <= limits.upper + 1e-9)
    if len(arms) > 1:
        # A busy machine makes steps longer, but none is longer than the executor allows.
        assert np.max(np.abs(np.diff(arms, axis=0)) / limits.velocity) <= LONGEST_STEP_S


@pytest.fixture
def following(stage: Any, robot: Any, thinker: Any, ready: np.ndarray, towards: Any) -> Any:
    """An executor that is following a chunk: its process and its status."""
    process = stage.start("executor_node", dry_run=False)
    status = stage.status_of("executor")
    status.wait(state="idle", detail="waiting for a chunk")
    thinker.say(thinker.chunk(towards(ready)))
    status.wait(state="following")
    return process, status


def test_follows_a_chunk_to_its_end_and_says_so(
    stage: Any, robot: Any, thinker: Any, following: Any, ready: np.ndarray, spec: RobotSpec, towards: Any
) -> None:
    _, status = following
    status.wait(state="holding", reason="starved")
    goal = towards(ready)[-1]
    arms = [i for i, n in enumerate(spec.action_names) if n.startswith("zarm")]
    assert robot.commands[-1][1][arms] == pytest.approx(goal[arms], abs=0.02)
    within_limits(spec, robot.arms())
    assert np.max(np.abs(robot.arms()[0] - ready[arms])) < 0.05, "the first command is the measured pose"


def test_bad_chunks_move_nothing(
    stage: Any, robot: Any, thinker: Any, ready: np.ndarray, spec: RobotSpec, towards: Any
) -> None:
    """Non-finite, misshapen, misnamed, foreign, old, early, far away: none is obeyed, by either arm."""
    stage.start("executor_node", dry_run=False)
    status = stage.status_of("executor")
    status.wait(state="idle", detail="waiting for a chunk")
    good = towards(ready)
    nan, inf = good.copy(), good.copy()
    nan[20, 3], inf[29, 15] = np.nan, -np.inf
    swapped = (spec.action_names[1], spec.action_names[0], *spec.action_names[2:])
    far = good.copy()
    far[:, 3] -= 1.0
    now_ns = thinker.now_ns()
    bad = [
        ("non_finite", {"values": nan}),
        ("non_finite", {"values": inf}),
        ("wrong_shape", {"values": good[:, :15]}),
        ("wrong_shape", {"values": good[:1], "times_ns": np.zeros(1, np.int64)}),
        ("wrong_names", {"names": swapped}),
        ("wrong_names", {"names": spec.action_names[:15], "values": good[:, :15]}),
        ("foreign_fingerprint", {"fingerprint": "0123456789abcdef"}),
        ("expired", {"stamp_ns": now_ns - 10**10}),
        ("from_the_future", {"stamp_ns": now_ns + 10**11}),
        ("times_not_increasing", {"times_ns": np.zeros(30, np.int64)}),
        ("too_far_from_pose", {"values": far}),
    ]
    for count, (reason, spoilt) in enumerate(bad, start=1):
        thinker.say(thinker.chunk(**{"values": good, **spoilt}))
        status.wait(refused_chunks=str(count))
        assert status.now["last_refusals"].split(" | ")[-1].startswith(reason)
    assert status.now["state"] == "idle"
    arms = robot.arms()
    assert len(arms) > 10, "an idle executor holds the arms where they are"
    assert np.ptp(arms, axis=0).max() < 1e-9


def test_duplicate_and_reordered_chunks_change_nothing(
    stage: Any, robot: Any, thinker: Any, following: Any, ready: np.ndarray, towards: Any
) -> None:
    _, status = following
    early = thinker.chunk(towards(ready, reach=-0.2))
    late = thinker.chunk(towards(ready))
    for chunk in (late, late, early):
        thinker.say(chunk)
    status.wait(refused_chunks="2")
    assert "duplicate" in status.now["last_refusals"]
    assert "out_of_order" in status.now["last_refusals"]
    assert status.now["sequence"] == str(late.sequence)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("silence", "joint_state_stale"),
        ("nan", "joint_state_invalid"),
        ("missing", "joint_state_invalid"),
    ],
)
def test_stops_when_the_joint_state_fails(
    spoil: str, reason: str, robot: Any, following: Any, spec: RobotSpec
) -> None:
    _, status = following
    begun = time.monotonic()
    if spoil == "silence":
        robot.silent = True
    elif spoil == "nan":
        robot.change = lambda f: {**f, "position": [float("nan"), *f["position"][1:]]}
    else:
        robot.change = lambda f: {**f, "name": f["name"][1:], "position": f["position"][1:]}
    status.wait(state="holding", reason=reason)
    at_rest = robot.rest_after(begun)
    assert at_rest < 0.5, f"at rest after {at_rest:.3f} s"
    within_limits(spec, robot.arms())


def test_joint_names_in_another_order_are_the_same_pose(robot: Any, following: Any) -> None:
    _, status = following
    robot.change = lambda f: {k: list(reversed(v)) if isinstance(v, list) else v for k, v in f.items()}
    status.wait(state="holding", reason="starved")


def test_silent_policy_brings_the_arms_to_rest_within_half_a_second(
    robot: Any, thinker: Any, following: Any
) -> None:
    _, status = following
    thinker.alive = False
    begun = time.monotonic()
    status.wait(state="holding", reason="policy_lost")
    at_rest = robot.rest_after(begun)
    assert at_rest <= 0.5, f"at rest after {at_rest:.3f} s"


def test_second_commander_silences_the_executor(
    stage: Any, robot: Any, following: Any, ready: np.ndarray
) -> None:
    _, status = following
    with stage.lock:
        intruder = stage.node.create_publisher(JointState, "/kuavo_arm_traj", 10)
    status.wait(state="holding", reason="foreign_publisher")
    heard = len(robot.commands)
    answer = stage.call("/executor/resume")
    assert not answer.success
    assert "foreign_publisher" in answer.message
    assert len(robot.commands) == heard, "nothing is commanded against another's will"
    with stage.lock:
        stage.node.destroy_publisher(intruder)
    stage.wait_for(lambda: stage.call("/executor/resume").success, "the intruder to be gone")


def test_stop_holds_until_resumed_and_then_waits_for_a_fresh_chunk(
    stage: Any, robot: Any, thinker: Any, following: Any, ready: np.ndarray, towards: Any
) -> None:
    _, status = following
    old = thinker.chunk(towards(ready))
    assert stage.call("/executor/stop").success
    status.wait(state="holding", reason="operator_stop")
    thinker.say(thinker.chunk(towards(ready)))
    status.wait(refused_chunks="1")
    assert stage.call("/executor/resume").success
    thinker.say(old)
    status.wait(refused_chunks="2")
    assert "stale" in status.now["last_refusals"]
    thinker.say(thinker.chunk(robot.pose + 0 * towards(ready)))
    status.wait(state="following")


def test_emergency_stop_needs_two_steps_to_leave(stage: Any, following: Any) -> None:
    _, status = following
    assert stage.call("/executor/e_stop").success
    status.wait(state="holding", reason="e_stop")
    refused = stage.call("/executor/resume")
    assert not refused.success
    assert "e_stop" in refused.message
    assert stage.call("/executor/release_e_stop").success
    assert stage.call("/executor/resume").success


def test_restarted_executor_holds_the_arms_where_they_are(
    stage: Any, robot: Any, following: Any, ready: np.ndarray
) -> None:
    process, _ = following
    process.send(signal.SIGKILL)
    process.ended_within(90)
    robot.pose += np.where(np.arange(16) % 8 == 7, 0.0, 0.08)  # the arms were moved meanwhile
    robot._target[:] = robot.pose
    heard = len(robot.commands)
    stage.start("executor_node", dry_run=False)
    stage.wait_for(lambda: len(robot.commands) >= heard + 20, "commands of the new executor")
    arms = robot.arms(heard)
    measured = robot.pose[[i for i in range(16) if i % 8 != 7]]
    assert np.max(np.abs(arms - measured)) < 0.05


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_within_two_seconds_with_the_arms_at_rest(
    number: signal.Signals, robot: Any, following: Any
) -> None:
    process, _ = following
    begun = time.monotonic()
    process.send(number)
    assert process.ended_within(2.0) == 0
    assert time.monotonic() - begun < 2.0
    assert "Traceback" not in process.output
    last = robot.arms()[-3:]
    assert np.max(np.abs(np.diff(last, axis=0))) < 0.03


def test_dry_run_decides_and_commands_nothing(
    stage: Any, robot: Any, thinker: Any, ready: np.ndarray, towards: Any
) -> None:
    stage.start("executor_node")
    status = stage.status_of("executor")
    status.wait(state="idle", detail="waiting for a chunk", dry_run="True")
    thinker.say(thinker.chunk(towards(ready)))
    status.wait(state="following")
    assert robot.commands == []
    assert stage.node.get_publishers_info_by_topic("/kuavo_arm_traj") == []


def test_unknown_robot_is_one_sentence(stage: Any) -> None:
    process = stage.start("executor_node", robot="nobody")
    assert process.ended_within(90) == 1
    assert "executor_node: there is no robot description 'nobody'" in process.output
    assert "Traceback" not in process.output


def test_start_with_a_value_out_of_bounds_is_one_sentence(stage: Any) -> None:
    process = stage.start("executor_node", policy_max_silence_s=60.0)
    assert process.ended_within(90) == 1
    assert "executor_node: policy_max_silence_s: " in process.output
    assert "Traceback" not in process.output


def test_pause_and_stop_come_by_the_robots_own_topics(
    stage: Any, robot: Any, thinker: Any, following: Any, spec: RobotSpec, towards: Any
) -> None:
    _, status = following
    with stage.lock:
        pause, stop = (
            stage.node.create_publisher(Bool, spec.signals[n].topic, 10) for n in ("pause", "stop")
        )
    stage.wait_for(lambda: pause.get_subscription_count() and stop.get_subscription_count(), "ears")
    pause.publish(Bool(data=True))
    status.wait(state="holding", reason="operator_pause")
    pause.publish(Bool(data=False))
    status.wait(state="idle")
    thinker.say(thinker.chunk(robot.pose + 0 * towards(robot.pose)))
    status.wait(state="following")
    stop.publish(Bool(data=True))
    status.wait(state="holding", reason="operator_stop")
    pause.publish(Bool(data=False))
    stop.publish(Bool(data=False))
    assert not stage.call("/executor/release_e_stop").success
    assert status.now["reason"] == "operator_stop", "the end of a pause is not the end of a stop"


def test_moves_only_while_the_robot_is_as_it_must_be(
    stage: Any, thinker: Any, ready: Any, towards: Any, robot_on: Any
) -> None:
    """Arm mode and stance of the real robot's description; without them, refused by name, and stopped."""
    robot_on("kuavo")
    stage.start("executor_node", dry_run=False, robot="kuavo")
    status = stage.status_of("executor")
    with stage.lock:
        mode = stage.node.create_publisher(Int32, "/kuavo/arm_mode", LATCHED)
        gait = stage.node.create_publisher(String, "/kuavo/gait", LATCHED)
    mode.publish(Int32(data=1))
    gait.publish(String(data="stance"))
    status.wait(state="idle", detail="waiting for a chunk")

    def told(part: str) -> bool:
        thinker.say(thinker.chunk(towards(ready)))
        return part in status.now.get("last_refusals", "")

    stage.wait_for(lambda: told("arm_mode is 1, needed is 2"), "a refusal for the arm mode")
    mode.publish(Int32(data=2))
    stage.wait_for(lambda: told("") and status.now["state"] == "following", "the arms to follow")
    gait.publish(String(data="walk"))
    status.wait(state="holding", reason="precondition")
    assert "gait is walk, needed is stance" in status.now["detail"]


def test_diagnostics_tell_what_the_arms_do_and_why(
    stage: Any, robot: Any, thinker: Any, following: Any, ready: np.ndarray, towards: Any, spec: RobotSpec
) -> None:
    _, status = following
    arrays: list[DiagnosticArray] = []
    with stage.lock:
        stage.node.create_subscription(DiagnosticArray, "/diagnostics", arrays.append, 10)
    thinker.say(thinker.chunk(towards(ready, steps=2, reach=0.45)))  # faster than the arms may go
    status.wait(state="holding", reason="starved")

    def told_of_the_hold() -> bool:
        # One may have been told while the arms were still braking; the next comes a second later.
        return any(pair.key == "state" and pair.value == "holding" for pair in arrays[-1].status[0].values)

    stage.wait_for(lambda: arrays and told_of_the_hold(), "diagnostics of the hold")
    (told,) = arrays[-1].status
    assert told.name == "executor: executor"
    assert told.level == b"\x01"
    values = {pair.key: pair.value for pair in told.values}
    assert (values["reason"], values["starvations"]) == ("starved", "1")
    assert (values["limits"], values["dry_run"]) == ("default", "False")
    assert values["fingerprint"] == spec.fingerprint
    assert float(values["chunk_age_s"]) > 0
    assert 0 <= float(values["joint_state_age_s"]) < 1.0
    assert all(int(values[f"limited.{n}"]) > 0 for n in spec.action_names if n.startswith("zarm"))
