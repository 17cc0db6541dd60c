"""The recorder as a process: what it refuses, what it records, and what is left when it ends or is ended."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import String

from kuavo_smolvla_ros import cli
from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.data.recording_metadata import read_recording_metadata
from kuavo_smolvla_ros.nodes.bringup import BRINGUPS
from kuavo_smolvla_ros.nodes.recorder_node import PARAMETERS
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.messages import build
from kuavo_smolvla_ros.robot.spec import RobotSpec

S = 1_000_000_000
TASK = "task2_weighing"
STATE_HZ, CAMERA_EVERY = 100, 5


class Player:
    """A robot that sends numbered messages on all its streams, as fast as a busy machine lets it."""

    def __init__(self, stage: Any, spec: RobotSpec) -> None:
        self.sent: dict[str, int] = defaultdict(int)
        self.silent: set[str] = set()
        self._stage, self._ticks = stage, 0
        picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        self._picture = build(CompressedImage, {"format": "jpeg", "data": encode_jpeg(picture, 90)})
        self._state = build(
            JointState, {"name": ["a"], "position": [0.5], "velocity": [0.0], "effort": [0.0]}
        )
        self._pictures = {camera.stream for camera in spec.cameras.values()}
        self._streams = spec.streams
        with stage.lock:
            self._outs = {
                s.name: stage.node.create_publisher(
                    CompressedImage if s.name in self._pictures else JointState, s.topic, 10
                )
                for s in spec.streams.values()
            }
            stage.node.create_timer(1.0 / STATE_HZ, self._tick)

    def _tick(self) -> None:
        self._ticks += 1
        now = self._stage.node.get_clock().now().to_msg()
        for name, publisher in self._outs.items():
            is_picture = name in self._pictures
            if name in self.silent or (is_picture and self._ticks % CAMERA_EVERY):
                continue
            message = self._picture if is_picture else self._state
            message.header.stamp = now
            message.header.frame_id = str(self.sent[name])
            self.sent[name] += 1
            publisher.publish(message)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bags"


@pytest.fixture
def recorder(stage: Any, folder: Path) -> Callable[..., tuple[Any, Any]]:
    """Starts a recorder; its process and its status."""

    def start(**parameters: Any) -> tuple[Any, Any]:
        given = {"folder": str(folder), "task": TASK, "min_free_gb": 0.0, **parameters}
        return stage.start("recorder_node", **given), stage.status_of("recorder")

    return start


def begin(stage: Any) -> None:
    """Start an episode once all streams have been heard."""
    answer = stage.wait_for(lambda: accepted(stage), "all streams to be heard")
    assert answer.success, answer.message


def accepted(stage: Any) -> Any:
    answer = stage.call("/recorder/start")
    return answer if answer.success else None


def wait_for_refusal(stage: Any, fits: Callable[[str], bool]) -> str:
    """Ask to start until it is refused for this reason; what was said."""

    def refused() -> str | None:
        answer = stage.call("/recorder/start")
        assert not answer.success, "it recorded something that is not there"
        return answer.message if fits(answer.message) else None

    return str(stage.wait_for(refused, "a refusal by name"))


def set_parameter(stage: Any, name: str, value: Any) -> None:
    result = stage.set_parameters("recorder", **{name: value})
    assert result.successful, result.reason


def numbers(path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    with open_bag(path) as bag:
        for message in bag.messages():
            found[message.topic].append(int(message.decode().header.frame_id))
    return found


def test_an_episode_has_every_message_of_every_stream(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    player = Player(stage, spec)
    process, status = recorder()
    begin(stage)
    status.wait(recording=f"episode_0000_{TASK}")
    before = dict(player.sent)
    time.sleep(2.0)
    after = dict(player.sent)
    answer = stage.call("/recorder/stop")
    assert answer.success
    assert f"recorded {folder / f'episode_0000_{TASK}'}: " in answer.message
    assert "lost" not in answer.message
    (path,) = folder.iterdir()
    found = numbers(path)
    for name, stream in spec.streams.items():
        seen = found[stream.topic]
        assert seen == list(range(seen[0], seen[-1] + 1)), f"{name}: something is missing"
        assert seen[0] <= before[name]
        assert seen[-1] >= after[name] - 1
    with AnyReader([path]) as reader:
        assert {c.topic: c.msgtype for c in reader.connections} == {
            s.topic: s.type for s in spec.streams.values()
        }
        assert sum(1 for _ in reader.messages()) == sum(map(len, found.values()))
    with open_bag(path) as bag:
        metadata = read_recording_metadata(bag.metadata)
        late_s = [
            abs(m.receive_ns - m.decode().header.stamp.sec * S - m.decode().header.stamp.nanosec) / S
            for m in bag.messages({spec.streams["arm_state"].topic})
        ]
    assert metadata is not None
    assert (metadata.task, metadata.robot) == (TASK, spec.name)
    assert metadata.instruction.startswith("Pick up the package from the conveyor belt")
    assert metadata.fingerprint == spec.fingerprint
    assert metadata.difference(spec) is None
    assert float(np.median(late_s)) < 0.05, "received when it arrived"
    process.send(signal.SIGINT)
    assert process.ended_within(3.0) == 0


def test_our_own_tools_take_the_recording(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Player(stage, spec)
    recorder()
    begin(stage)
    time.sleep(1.0)
    assert stage.call("/recorder/stop").success
    (path,) = folder.iterdir()
    cli.main(["check", spec.name, "--bag", str(path)])
    table = capsys.readouterr().out
    for stream in spec.streams.values():
        assert stream.topic in table


def test_missing_streams_are_named(stage: Any, spec: RobotSpec, recorder: Any, folder: Path) -> None:
    player = Player(stage, spec)
    player.silent = {"left_image", "gripper_command"}
    recorder()
    # That one alone: a command stream may pause, a camera may not.
    wait_for_refusal(
        stage, lambda said: said == "/cam_l/color/image_raw/compressed (left_image) is published but silent"
    )
    assert not folder.exists()
    player.silent = set()
    begin(stage)


def test_nobody_there_and_wrong_types_are_told_apart(stage: Any, spec: RobotSpec, recorder: Any) -> None:
    with stage.lock:
        stage.node.create_publisher(String, "/kuavo/arm_state", 10)
    recorder()
    wanted = "(arm_state) is published as std_msgs/msg/String, not as sensor_msgs/msg/JointState"
    refusal = wait_for_refusal(stage, lambda said: wanted in said)
    assert "(head_image) is published by nobody" in refusal
    assert "(arm_command) is published by nobody, so there is no action" in refusal


def test_task_and_instruction_are_asked_for(stage: Any, spec: RobotSpec, recorder: Any, folder: Path) -> None:
    Player(stage, spec)
    recorder(task="")
    assert "set the parameter 'task' of /recorder" in stage.call("/recorder/start").message
    set_parameter(stage, "task", "wave")
    assert "set the parameter 'instruction'" in stage.call("/recorder/start").message
    set_parameter(stage, "instruction", "Wave  with the left hand")
    begin(stage)
    assert "is being recorded; stop or discard it first" in stage.call("/recorder/start").message
    assert stage.call("/recorder/stop").success
    with open_bag(folder / "episode_0000_wave") as bag:
        metadata = read_recording_metadata(bag.metadata)
    assert metadata is not None
    assert (metadata.task, metadata.instruction) == ("wave", "Wave with the left hand")


def test_a_task_of_ones_own_is_a_file(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "cups.yaml"
    Player(stage, spec)
    recorder(task=str(own))
    assert "cups.yaml cannot be read" in stage.call("/recorder/start").message
    own.write_text("task: {name: task5_cups, instruction: Stack the cups}\n")
    begin(stage)
    assert stage.call("/recorder/stop").success
    (path,) = folder.iterdir()
    assert path.name == "episode_0000_task5_cups"
    with open_bag(path) as bag:
        metadata = read_recording_metadata(bag.metadata)
    assert metadata is not None
    assert (metadata.task, metadata.instruction) == ("task5_cups", "Stack the cups")


def test_discard_leaves_nothing_and_numbers_go_on(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    Player(stage, spec)
    recorder()
    for name in ("stop", "discard"):
        answer = stage.call(f"/recorder/{name}")
        assert (answer.success, answer.message) == (False, "nothing is being recorded")
    begin(stage)
    assert stage.call("/recorder/stop").success
    begin(stage)
    assert stage.call("/recorder/discard").success
    begin(stage)
    assert stage.call("/recorder/stop").success
    assert sorted(p.name for p in folder.iterdir()) == [f"episode_000{n}_{TASK}" for n in (0, 1)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_episode_whole(
    number: signal.Signals, stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    Player(stage, spec)
    process, _ = recorder()
    begin(stage)
    time.sleep(0.5)
    process.send(number)
    assert process.ended_within(5.0) == 0
    assert "Traceback" not in process.output
    (path,) = folder.iterdir()
    with open_bag(path) as bag:
        assert sum(1 for _ in bag.messages()) > 50
        assert not bag.damages


def test_a_killed_recorder_loses_less_than_a_second(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    Player(stage, spec)
    process, _ = recorder()
    begin(stage)
    time.sleep(2.5)
    process.send(signal.SIGKILL)
    killed_ns = time.time_ns()
    process.ended_within(5.0)
    (path,) = folder.iterdir()
    with open_bag(path) as bag:
        newest_ns = max(message.receive_ns for message in bag.messages())
        metadata = read_recording_metadata(bag.metadata)
        damages = [damage.sentence for damage in bag.damages]
    assert (killed_ns - newest_ns) / S < 1.0
    assert metadata is not None
    assert metadata.task == TASK
    assert any("did not finish" in sentence for sentence in damages)
    for seen in numbers(path).values():
        assert seen == list(range(seen[0], seen[-1] + 1))


def test_a_recorder_that_is_put_aside_loses_nothing(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    """As by a busy machine: more messages wait than the middleware keeps unless told to."""
    player = Player(stage, spec)
    process, _ = recorder()
    begin(stage)
    before = sum(player.sent.values())
    process.send(signal.SIGSTOP)
    time.sleep(2.0)
    process.send(signal.SIGCONT)
    missed = sum(player.sent.values()) - before
    assert "lost" not in stage.call("/recorder/stop").message
    assert missed > 600
    (path,) = folder.iterdir()
    for topic, seen in numbers(path).items():
        assert seen == list(range(seen[0], seen[-1] + 1)), topic


def test_a_disk_that_fills_up_ends_the_episode_and_keeps_it(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    Player(stage, spec)
    _, status = recorder()
    begin(stage)
    status.wait(recording=f"episode_0000_{TASK}")
    set_parameter(stage, "min_free_gb", 10000.0)
    status.wait(recording="")
    assert "GB are free on the disk of" in status.now["last"]
    assert f"recorded {folder}" in status.now["last"]
    with open_bag(folder / f"episode_0000_{TASK}") as bag:
        assert sum(1 for _ in bag.messages()) > 0
        assert not bag.damages
    refused = stage.call("/recorder/start")
    assert not refused.success
    assert "10000 must stay free (parameter min_free_gb)" in refused.message


def test_rates_gaps_and_dead_streams_are_shown(stage: Any, spec: RobotSpec, recorder: Any) -> None:
    player = Player(stage, spec)
    _, status = recorder()
    begin(stage)
    player.silent = {"head_image"}
    stage.wait_for(
        lambda: float(status.now.get("head_image.longest_gap_ms", 0)) >= 1500, "the gap to be told"
    )
    assert "head_image 0.0 of 30 Hz" in status.now["message"]
    assert float(status.now["arm_state.hz"]) > 20
    assert status.now["arm_state.lost"] == "0"
    assert int(status.now["arm_state.count"]) > 20


def test_simulated_time_is_the_time_of_the_recording(
    stage: Any, spec: RobotSpec, recorder: Any, folder: Path
) -> None:
    Player(stage, spec)
    recorder(use_sim_time=True)
    refused = stage.call("/recorder/start")
    assert not refused.success
    assert "/clock is silent, and use_sim_time is set" in refused.message
    with stage.lock:
        clock = stage.node.create_publisher(Clock, "/clock", 10)
        began = time.monotonic()

        def tick() -> None:
            message = Clock()
            now_ns = 100 * S + round((time.monotonic() - began) * S)
            message.clock.sec, message.clock.nanosec = divmod(now_ns, S)
            clock.publish(message)

        stage.node.create_timer(0.01, tick)
    begin(stage)
    time.sleep(1.0)
    assert stage.call("/recorder/stop").success
    (path,) = folder.iterdir()
    with open_bag(path) as bag:
        times = [message.receive_ns for message in bag.messages({spec.streams["arm_state"].topic})]
    assert 100 * S <= min(times) < max(times) < 200 * S
    assert times == sorted(times)
    assert len(set(times)) > 30, "each message has the time of its arrival, not of its batch"


def test_bringup_starts_it_with_its_arguments() -> None:
    given = {"task": TASK, "namespace": "/left/", "use_sim_time": "true", "min_free_gb": "5"}
    (process,) = BRINGUPS["record"].processes(given)
    assert (process.name, process.executable, process.namespace) == ("recorder", "recorder_node", "left")
    assert process.parameters["task"] == TASK
    assert process.parameters["use_sim_time"] is True
    assert process.parameters["min_free_gb"] == 5.0
    assert set(process.parameters) - {"use_sim_time"} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"robot": "nobody"}, "recorder_node: there is no robot description 'nobody'"),
        ({"robot": "kuavo_bag"}, "the message package 'kuavo_msgs' is not installed"),
    ],
)
def test_what_cannot_be_recorded_is_one_sentence(
    parameters: dict[str, Any], says: str, recorder: Any
) -> None:
    process, _ = recorder(**parameters)
    assert process.ended_within(20) == 1
    assert says in process.output
    assert "Traceback" not in process.output
