"""The policy node as a process, with a real (tiny) policy, seeing a simulated robot."""

from __future__ import annotations

import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.nodes.chunk_message import from_message
from kuavo_smolvla_ros.robot.messages import stamp_ns
from kuavo_smolvla_ros.robot.spec import RobotSpec

PATIENCE_S = 90.0  # loading torch on a busy two-core machine; a wait ends as soon as it can
SIM = {"picture_height": 96, "picture_width": 128}


def until(condition: Any, what: str, timeout_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


class Policy:
    """A policy node under test, beside a simulator."""

    def __init__(self, stage: Any, folder: Path | str, **parameters: Any) -> None:
        self.stage = stage
        self.status = stage.status_of("policy")
        with stage.lock:
            self._say = stage.node.create_publisher(String, "/policy/instruction", 10)
            self._set = {
                node: stage.node.create_client(SetParameters, f"/{node}/set_parameters")
                for node in ("policy", "kuavo_sim")
            }
            self._change = stage.node.create_client(ChangeState, "/policy/change_state")
        defaults = {"use_sim_time": True, "checkpoint": str(folder), "seed": 0}
        self.process = stage.start("policy_node", **(defaults | parameters))

    def wait(self, **wanted: str) -> dict[str, str]:
        return self.status.wait(PATIENCE_S, **wanted)

    def wait_message(self, part: str) -> None:
        until(
            lambda: part in self.status.now.get("message", ""),
            f"'{part}' in the status, was {self.status.now}",
        )

    def say(self, text: str) -> None:
        until(self._say.get_subscription_count, "ears for instructions")
        with self.stage.lock:
            self._say.publish(String(data=text))

    def set(self, node: str, **values: Any) -> Any:
        until(self._set[node].service_is_ready, f"parameters of {node}")
        request = SetParameters.Request()
        for name, value in values.items():
            kind = {str: "string", float: "double", bool: "bool", int: "integer"}[type(value)]
            holder = ParameterValue(type=getattr(ParameterType, f"PARAMETER_{kind.upper()}"))
            setattr(holder, f"{kind}_value", value)
            request.parameters.append(ParameterMessage(name=name, value=holder))
        return self._call(self._set[node], request).results[0]

    def change(self, transition: int) -> bool:
        until(self._change.service_is_ready, "the lifecycle service")
        request = ChangeState.Request(transition=Transition(id=transition))
        return bool(self._call(self._change, request).success)

    def _call(self, client: Any, request: Any) -> Any:
        with self.stage.lock:
            future = client.call_async(request)
        until(future.done, "an answer")
        return future.result()


@pytest.fixture
def policy(stage: Any, checkpoint: Path, chunks: Any) -> Policy:
    """A policy that publishes chunks for task 1."""
    stage.start("sim_node", **SIM)
    made = Policy(stage, checkpoint, instruction="task1_moving_grasp")
    chunks.wait_for_more(2, PATIENCE_S)
    return made


def test_chunks_are_trajectories_with_times(policy: Policy, chunks: Any, spec: RobotSpec) -> None:
    first, second = (from_message(m) for m in chunks.wait_for_more(2))
    for chunk in (first, second):
        assert isinstance(chunk, ActionChunk)
        assert chunk.names == spec.action_names
        assert chunk.fingerprint == spec.fingerprint
        assert chunk.task == "task1_moving_grasp"
        assert chunk.values.shape == (50, 16)
        assert chunk.times_ns.tolist() == [i * 100_000_000 for i in range(50)]
    assert second.sequence == first.sequence + 1
    assert second.stamp_ns - first.stamp_ns >= 800_000_000, "eight steps lie between two observations"
    status = policy.wait(active="True", task="task1_moving_grasp")
    assert status["message"] == "publishing chunks"
    assert float(status["latency_p50_s"]) > 0


def test_successive_chunks_agree_where_the_first_is_being_executed(policy: Policy, chunks: Any) -> None:
    """Real-time chunking: what will be executed while the next chunk is computed stays as it was."""
    first, second = (from_message(m) for m in chunks.wait_for_more(2))
    assert isinstance(first, ActionChunk)
    assert isinstance(second, ActionChunk)
    begin = (second.stamp_ns - first.stamp_ns) / 1e8
    at = begin + np.arange(3)
    low = np.floor(at).astype(int)
    share = (at - low)[:, None]
    expected = first.values[low] * (1 - share) + first.values[low + 1] * share
    seam = np.abs(second.values[:1] - expected[:1]).max()
    elsewhere = np.abs(second.values[20:40] - first.values[28:48]).max()
    assert seam < 0.25 * elsewhere, (seam, elsewhere)


def test_says_what_it_waits_for_and_follows_instructions(stage: Any, checkpoint: Path, chunks: Any) -> None:
    stage.start("sim_node", **SIM)
    policy = Policy(stage, checkpoint, unknown_instruction="refuse")
    policy.wait_message("no instruction")
    policy.say("task2_weighing")
    policy.wait(task="task2_weighing")
    chunks.wait_for_more(1)

    refused = policy.set("policy", instruction="Dance on the table")
    assert not refused.successful
    assert "none of the instructions the policy was trained on" in refused.reason
    too_long = policy.set("policy", unknown_instruction="accept")
    assert too_long.successful
    refused = policy.set("policy", instruction="please " * 60)
    assert not refused.successful
    assert "tokens long" in refused.reason

    assert policy.set("policy", instruction="Lift the cup").successful
    policy.wait(task="free", instruction="Lift the cup")
    assert until(
        lambda: chunks.wait_for_more(1)[-1].header.frame_id.endswith("/free"), "a chunk of the new task"
    )
    for number in range(300):
        policy.say(f"task{1 + number % 2}_{('moving_grasp', 'weighing')[number % 2]}")
    policy.wait(task="task2_weighing")
    chunks.wait_for_more(2)


def test_camera_faults_end_chunks_by_name_and_pass(policy: Policy, chunks: Any) -> None:
    for fault, says in (
        ("camera_drop:wrist_cam_l", "left_image"),
        ("camera_freeze:head_cam_h", "head_image"),
        ("camera_corrupt:head_cam_h", "camera 'head_cam_h'"),
        ("state_drop", "arm_state"),
        ("state_nan", "zarm_l1_joint is nan"),
    ):
        assert policy.set("kuavo_sim", fault=fault).successful
        policy.wait_message(says)
        assert policy.set("kuavo_sim", fault="none").successful
        policy.wait(message="publishing chunks")
        chunks.wait_for_more(1)


def test_clock_jumps_are_survived(policy: Policy, chunks: Any) -> None:
    for fault in ("clock_forward", "clock_back"):
        before = stamp_ns(chunks.wait_for_more(1)[-1])
        assert policy.set("kuavo_sim", fault=fault).successful

        def fresh(before: int = before, sign: int = 1 if fault == "clock_forward" else -1) -> bool:
            return sign * (stamp_ns(chunks.wait_for_more(1)[-1]) - before) > 1_000_000_000

        until(fresh, f"chunks after {fault}")


def test_working_in_turns_gives_short_chunks_that_begin_now(
    stage: Any, checkpoint: Path, chunks: Any
) -> None:
    stage.start("sim_node", **SIM)
    Policy(stage, checkpoint, instruction="task1_moving_grasp", mode="synchronous")
    first, second = (from_message(m) for m in chunks.wait_for_more(2, PATIENCE_S))
    assert isinstance(first, ActionChunk)
    assert isinstance(second, ActionChunk)
    assert len(first.values) == 9, "eight steps, then the last one held"
    assert first.values[8].tolist() == first.values[7].tolist()
    assert first.times_ns[0] > 0, "nothing of the answer is past when it is given"
    assert second.stamp_ns >= first.stamp_ns + first.times_ns[0] + 800_000_000


def test_lifecycle_frees_and_loads_again(policy: Policy, chunks: Any) -> None:
    for _ in range(3):
        assert policy.change(Transition.TRANSITION_DEACTIVATE)
        policy.wait(active="False")
        heard = len(chunks.heard)
        assert policy.change(Transition.TRANSITION_CLEANUP)
        assert len(chunks.heard) == heard
        assert policy.change(Transition.TRANSITION_CONFIGURE)
        assert policy.change(Transition.TRANSITION_ACTIVATE)
        policy.wait(active="True")
        chunks.wait_for_more(1)
    assert not policy.set("policy", mode="synchronous").successful, "not while active"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_arms_rest_within_half_a_second_of_the_policys_death(
    number: signal.Signals, stage: Any, policy: Policy, spec: RobotSpec
) -> None:
    commands: list[tuple[float, np.ndarray]] = []
    with stage.lock:
        stage.node.create_subscription(
            JointState,
            "/kuavo_arm_traj",
            lambda m: commands.append((time.monotonic(), np.array(m.position))),
            100,
        )
    status = stage.status_of("executor")
    stage.start("executor_node", use_sim_time=True, dry_run=False, refuse_above=3.0)
    status.wait(PATIENCE_S, state="following")
    until(lambda: len(commands) > 50, "motion")
    begun = time.monotonic()
    policy.process.send(number)
    status.wait(PATIENCE_S, state="holding", reason="policy_lost")
    moving = [t for (_, a), (t, b) in pairwise(commands) if t > begun and np.abs(a - b).max() > 1e-9]
    at_rest = (moving[-1] - begun) if moving else 0.0
    assert at_rest <= 0.5, f"at rest after {at_rest:.3f} s"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_within_two_seconds(number: signal.Signals, policy: Policy) -> None:
    policy.process.send(number)
    assert policy.process.ended_within(2.0) == 0
    assert "Traceback" not in policy.process.output


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"robot": "kuavo_mobile"}, "was made for the robot with fingerprint"),
        ({"mode": "fast"}, "mode: 'fast' is unknown; choose one of realtime, synchronous"),
    ],
)
def test_wrong_start_is_said_in_a_sentence(
    stage: Any, checkpoint: Path, parameters: dict[str, Any], says: str
) -> None:
    process = Policy(stage, checkpoint, **parameters).process
    assert process.ended_within(PATIENCE_S) == 1
    assert says in process.output
    assert "Traceback" not in process.output


def test_no_checkpoint_is_said_in_a_sentence(stage: Any) -> None:
    process = Policy(stage, "").process
    assert process.ended_within(PATIENCE_S) == 1
    assert "no checkpoint: set the parameter 'checkpoint' to a folder or a hub id" in process.output
    assert "Traceback" not in process.output
