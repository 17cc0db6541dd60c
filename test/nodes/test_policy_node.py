"""The policy node as a process, with a real (tiny) policy, seeing a simulated robot.

Starting it takes seconds (torch), so the tests share one simulator and one policy node, and leave both as
they found them. What ends a node starts its own, in test_policy_node_ends.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.nodes.chunk_message import from_message
from kuavo_smolvla_ros.robot.messages import stamp_ns
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec

SIM = {"picture_height": 96, "picture_width": 128}
TASK1, TASK2 = "task1_moving_grasp", "task2_weighing"


@pytest.fixture(scope="module")
def stage(shared_stage: Any) -> Any:
    return shared_stage


@pytest.fixture(scope="module")
def chunks(shared_chunks: Any) -> Any:
    return shared_chunks


@pytest.fixture(scope="module")
def started(stage: Any, chunks: Any, policy_process: Any, checkpoint: Path) -> Any:
    """A policy node that has everything but an instruction."""
    stage.start("sim_node", **SIM)
    made = policy_process(stage, checkpoint)
    made.wait_message("no instruction: set the parameter or publish on ~/instruction")
    return made


@pytest.fixture
def policy(started: Any, chunks: Any) -> Iterator[Any]:
    """A policy that publishes chunks for task 1."""
    assert started.stage.set_parameters("kuavo_sim", fault="none").successful
    assert started.set(unknown_instruction="warn", instruction=TASK1).successful
    started.wait(active="True", task=TASK1, message="publishing chunks", mode="realtime")
    chunks.wait_for_more(1)
    yield started
    started.stage.set_parameters("kuavo_sim", fault="none")


def heard(chunks: Any, count: int) -> list[ActionChunk]:
    """The next chunks, each of them whole."""
    found = [from_message(m) for m in chunks.wait_for_more(count)[:count]]
    for chunk in found:
        assert isinstance(chunk, ActionChunk)
    return found  # type: ignore[return-value]


def test_chunks_are_trajectories_with_times(policy: Any, chunks: Any, spec: RobotSpec) -> None:
    first, second = heard(chunks, 2)
    for chunk in (first, second):
        assert chunk.names == spec.action_names
        assert chunk.fingerprint == spec.fingerprint
        assert chunk.task == TASK1
        assert chunk.values.shape == (50, 16)
        assert chunk.times_ns.tolist() == [i * 100_000_000 for i in range(50)]
    assert second.sequence == first.sequence + 1
    assert second.stamp_ns - first.stamp_ns >= 800_000_000, "eight steps lie between two observations"


def test_successive_chunks_agree_where_the_first_is_being_executed(policy: Any, chunks: Any) -> None:
    """Real-time chunking: what will be executed while the next chunk is computed stays as it was."""
    first, second = heard(chunks, 2)
    begin = (second.stamp_ns - first.stamp_ns) / 1e8
    at = begin + np.arange(3)
    low = np.floor(at).astype(int)
    share = (at - low)[:, None]
    expected = first.values[low] * (1 - share) + first.values[low + 1] * share
    seam = np.abs(second.values[:1] - expected[:1]).max()
    elsewhere = np.abs(second.values[20:40] - first.values[28:48]).max()
    assert seam < 0.25 * elsewhere, (seam, elsewhere)


def test_diagnostics_tell_of_every_stream_and_of_the_thinking(
    policy: Any, stage: Any, chunks: Any, spec: RobotSpec, checkpoint: Path
) -> None:
    arrays: list[DiagnosticArray] = []
    with stage.lock:
        listening = stage.node.create_subscription(DiagnosticArray, "/diagnostics", arrays.append, 10)
    stage.wait_for(lambda: len(arrays) >= 3, "diagnostics")
    with stage.lock:
        stage.node.destroy_subscription(listening)
    (told,) = arrays[-1].status
    assert told.name == "policy: policy"
    values = {pair.key: pair.value for pair in told.values}
    for name, stream in spec.inputs.items():
        assert float(values[f"{name}.rate_hz"]) == pytest.approx(stream.rate_hz, rel=0.3), name
        assert -0.05 < float(values[f"{name}.age_s"]) < 1.0
        assert values[f"{name}.dead"] == "False"
        assert int(values[f"{name}.received"]) > 0
    assert 0 <= float(values["skew_s"]) <= spec.max_skew_s
    assert values["dead_streams"] == ""
    for figure in ("latency", "picture_to_chunk"):
        p50, p95, largest = (float(values[f"{figure}_{q}_s"]) for q in ("p50", "p95", "max"))
        assert 0 < p50 <= p95 <= largest
    assert float(values["chunk_age_s"]) > 0
    assert int(values["chunks"]) > 0
    assert (values["task"], values["fingerprint"]) == (TASK1, spec.fingerprint)
    assert values["checkpoint"] == str(checkpoint)


def test_instruction_is_taken_by_topic_and_by_parameter_or_refused_with_a_reason(
    policy: Any, chunks: Any
) -> None:
    policy.say(TASK2)
    policy.wait(task=TASK2)
    assert policy.set(unknown_instruction="refuse").successful
    refused = policy.set(instruction="Dance on the table")
    assert not refused.successful
    assert "none of the instructions the policy was trained on" in refused.reason
    assert policy.set(unknown_instruction="accept").successful
    refused = policy.set(instruction="please " * 60)
    assert not refused.successful
    assert "tokens long" in refused.reason
    assert policy.status.now["task"] == TASK2, "what was refused changed nothing"
    assert policy.set(instruction="Lift the cup").successful
    policy.wait(task="free", instruction="Lift the cup")
    policy.stage.wait_for(
        lambda: chunks.wait_for_more(1)[-1].header.frame_id.endswith("/free"), "a chunk of the new task"
    )


def test_flood_of_instructions_ends_with_the_last(policy: Any, chunks: Any) -> None:
    for number in range(300):
        policy.say((TASK1, TASK2)[number % 2])
    policy.wait(task=TASK2)
    chunks.wait_for_more(2)
    assert policy.status.now["task"] == TASK2


@pytest.mark.parametrize(
    ("fault", "says", "dead"),
    [
        ("camera_drop:wrist_cam_l", "left_image", "left_image"),
        ("camera_freeze:head_cam_h", "head_image: its picture has not changed", "head_image"),
        ("camera_corrupt:head_cam_h", "camera 'head_cam_h'", None),
        ("state_drop", "arm_state", "arm_state"),
        ("state_nan", "zarm_l1_joint is nan", None),
        ("state_missing_joint", "'zarm_l1_joint' is missing", None),
    ],
)
def test_a_broken_stream_ends_chunks_by_name_and_passes(
    policy: Any, chunks: Any, fault: str, says: str, dead: str | None
) -> None:
    simulator = policy.stage
    assert simulator.set_parameters("kuavo_sim", fault=fault).successful
    policy.wait_message(says)
    if dead is not None:
        policy.wait(**{f"{dead}.dead": "True"})
        assert dead in policy.status.now["dead_streams"]
    assert simulator.set_parameters("kuavo_sim", fault="none").successful
    policy.wait(message="publishing chunks")
    chunks.wait_for_more(1)


def test_reordered_joint_names_change_nothing(policy: Any, chunks: Any) -> None:
    assert policy.stage.set_parameters("kuavo_sim", fault="state_reorder").successful
    chunks.wait_for_more(2)
    assert policy.status.now["message"] == "publishing chunks"


@pytest.mark.parametrize(("fault", "sign"), [("clock_forward", 1), ("clock_back", -1)])
def test_clock_jump_is_survived(policy: Any, chunks: Any, fault: str, sign: int) -> None:
    policy.stage.wait_for(
        lambda: stamp_ns(chunks.wait_for_more(1)[-1]) > 7_000_000_000, "enough time to jump back"
    )
    before = stamp_ns(chunks.wait_for_more(1)[-1])
    assert policy.stage.set_parameters("kuavo_sim", fault=fault).successful
    policy.stage.wait_for(
        lambda: sign * (stamp_ns(chunks.wait_for_more(1)[-1]) - before) > 1_000_000_000,
        f"chunks after {fault}",
    )


def test_pictures_are_encoded_while_the_arms_still_move(policy: Any, chunks: Any) -> None:
    """The simulator's cameras run freely, so an observation's pictures are there before it can be made."""
    policy.stage.wait_for(lambda: int(policy.status.now["used_ahead"]) >= 6, "pictures encoded ahead")
    now = policy.status.now
    assert int(now["encoded_ahead"]) <= 6 * (int(now["chunks"]) + 2), "two of each camera for a thought"
    assert not policy.set(vision_ahead=False).successful, "not while active"
    assert policy.change(Transition.TRANSITION_DEACTIVATE)
    assert policy.set(vision_ahead=False).successful
    assert policy.change(Transition.TRANSITION_ACTIVATE)
    try:
        chunks.wait_for_more(3)
        policy.stage.wait_for(lambda: policy.status.now.get("encoded_ahead") == "0", "a fresh status")
    finally:
        policy.change(Transition.TRANSITION_DEACTIVATE)
        policy.set(vision_ahead=True)
        policy.change(Transition.TRANSITION_ACTIVATE)


def test_working_in_turns_gives_short_chunks_that_begin_now(policy: Any, chunks: Any) -> None:
    refused = policy.set(mode="synchronous")
    assert not refused.successful
    assert "mode cannot change while active: deactivate first" in refused.reason
    assert policy.change(Transition.TRANSITION_DEACTIVATE)
    assert policy.set(mode="synchronous").successful
    assert policy.change(Transition.TRANSITION_ACTIVATE)
    try:
        first, second = heard(chunks, 2)
        assert len(first.values) == 9, "eight steps, then the last one held"
        assert first.values[8].tolist() == first.values[7].tolist()
        assert first.times_ns[0] > 0, "nothing of the answer is past when it is given"
        assert second.stamp_ns >= first.stamp_ns + first.times_ns[0] + 800_000_000
    finally:
        policy.change(Transition.TRANSITION_DEACTIVATE)
        policy.set(mode="realtime")
        policy.change(Transition.TRANSITION_ACTIVATE)


def possessions(process: Any, stage: Any) -> dict[str, float]:
    """What a process holds that it could forget to give back."""
    pid = process.popen.pid
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    topics = [s.topic for s in load_spec("kuavo_sim").inputs.values()]
    with stage.lock:
        ears = sum(len(stage.node.get_subscriptions_info_by_topic(topic)) for topic in topics)
    return {
        "memory_mb": float(fields["VmRSS"].split()[0]) / 1024,
        "threads": float(fields["Threads"]),
        "files": float(len(list(Path(f"/proc/{pid}/fd").iterdir()))),
        "subscriptions": float(ears),
    }


def cycle(policy: Any, stage: Any, chunks: Any, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """What the node holds after two rounds of its life, and after `count` more."""
    before: dict[str, float] = {}
    for number in range(2 + count):
        assert policy.change(Transition.TRANSITION_DEACTIVATE)
        silent = len(chunks.heard)
        assert policy.change(Transition.TRANSITION_CLEANUP)
        assert len(chunks.heard) == silent
        assert policy.change(Transition.TRANSITION_CONFIGURE)
        assert policy.change(Transition.TRANSITION_ACTIVATE)
        chunks.wait_for_more(1)
        if number == 1:
            before = possessions(policy.process, stage)
    expected = before["subscriptions"]
    stage.wait_for(
        lambda: possessions(policy.process, stage)["subscriptions"] <= expected,
        "the graph to forget old ears",
    )
    return before, possessions(policy.process, stage)


def nothing_leaked(before: dict[str, float], after: dict[str, float], count: int) -> None:
    print(f"{count} lives: before {before}, after {after}")
    assert after["threads"] <= before["threads"]
    assert after["subscriptions"] <= before["subscriptions"]
    assert after["files"] <= before["files"]
    # Allocators keep some of what they were given back; a policy that stayed would weigh 5 MB each time.
    assert after["memory_mb"] - before["memory_mb"] < 20 + 0.5 * count


def test_lifecycle_frees_and_loads_again_without_a_leak(policy: Any, stage: Any, chunks: Any) -> None:
    nothing_leaked(*cycle(policy, stage, chunks, 4), 4)


@pytest.mark.slow
def test_lifecycle_fifty_times_without_a_leak(policy: Any, stage: Any, chunks: Any) -> None:
    nothing_leaked(*cycle(policy, stage, chunks, 50), 50)


def test_another_checkpoint_is_taken_by_configuring_again(
    policy: Any, chunks: Any, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.symlink_to(checkpoint)
    assert policy.change(Transition.TRANSITION_DEACTIVATE)
    assert policy.change(Transition.TRANSITION_CLEANUP)
    assert policy.set(checkpoint=str(tmp_path / "nothing")).successful
    assert not policy.change(Transition.TRANSITION_CONFIGURE), "a node that cannot load says so and stays"
    for folder in (other, checkpoint):
        assert policy.set(checkpoint=str(folder)).successful
        assert policy.change(Transition.TRANSITION_CONFIGURE)
        assert policy.change(Transition.TRANSITION_ACTIVATE)
        policy.wait(active="True", checkpoint=str(folder))
        chunks.wait_for_more(1)
        if folder is other:
            assert policy.change(Transition.TRANSITION_DEACTIVATE)
            assert policy.change(Transition.TRANSITION_CLEANUP)
