"""The simulator behind the robot's topics, as a process: streams, commands, services, faults."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.images import decode_image
from kuavo_smolvla_ros.robot.messages import build, stamp_ns
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec
from kuavo_smolvla_ros.robot.vectors import decode_state, encode_action

SMALL = {"picture_height": 96, "picture_width": 128}


@pytest.fixture
def spec() -> RobotSpec:
    return load_spec("kuavo_mobile")


class Watch:
    """What a simulator says."""

    def __init__(self, stage: Any, spec: RobotSpec) -> None:
        self.spec, self.stage = spec, stage
        self.heard: dict[str, list[Any]] = {name: [] for name in (*spec.streams, "clock", "score", "success")}
        kinds = {"sensor_msgs/msg/JointState": JointState, "sensor_msgs/msg/CompressedImage": CompressedImage}
        with stage.lock:
            node = stage.node
            for stream in spec.inputs.values():
                take = self._take(stream.name)
                node.create_subscription(kinds[stream.type], stream.topic, take, qos_profile_sensor_data)
            node.create_subscription(Clock, "/clock", self._take("clock"), 10)
            node.create_subscription(String, "/simulator/score", self._take("score"), 10)
            node.create_subscription(Bool, "/simulator/success", self._take("success"), 10)
            self.outs = {
                n: node.create_publisher(JointState, spec.streams[n].topic, 10)
                for n in ("arm_command", "gripper_command")
            }

    def _take(self, name: str) -> Callable[[Any], None]:
        return self.heard[name].append

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        return self.stage.wait_for(condition, what)

    def wait_for_all(self) -> None:
        names = [*self.spec.inputs, "clock", "score"]
        self.wait(lambda: all(self.heard[n] for n in names), "every stream")
        self.wait(lambda: all(out.get_subscription_count() for out in self.outs.values()), "its ears")

    def state(self) -> np.ndarray:
        return decode_state(self.spec, {n: self.heard[n][-1] for n in ("arm_state", "gripper_state")})

    def score(self) -> dict[str, Any]:
        return json.loads(self.heard["score"][-1].data)

    def command(self, action: np.ndarray) -> None:
        wide = np.concatenate([action, np.zeros(4)])
        with self.stage.lock:
            for name, fields in encode_action(self.spec, wide).items():
                self.outs[name].publish(build(JointState, fields))

    def set(self, **values: Any) -> Any:
        return self.stage.set_parameters("kuavo_sim", **values)


@pytest.fixture
def watch(stage: Any, spec: RobotSpec) -> Watch:
    return Watch(stage, spec)


@pytest.fixture
def sim(stage: Any, watch: Watch) -> Any:
    process = stage.start("sim_node", **SMALL)
    watch.wait_for_all()
    return process


def test_streams_come_at_their_rates_in_simulated_time(sim: Any, watch: Watch, spec: RobotSpec) -> None:
    """Rates by stamp: what the wall clock makes of them is the machine's business."""
    for heard in watch.heard.values():
        heard.clear()
    watch.wait(lambda: len(watch.heard["arm_state"]) > 600, "a second of joint states")
    for name in ("arm_state", "gripper_state"):
        stamps = np.array([stamp_ns(m) for m in watch.heard[name]])
        assert np.median(np.diff(stamps)) == 2_000_000
    for camera in spec.cameras.values():
        stamps = np.array([stamp_ns(m) for m in watch.heard[camera.stream]])
        assert np.median(np.diff(stamps)) == pytest.approx(1e9 / 30, abs=2e6)
        assert decode_image(watch.heard[camera.stream][-1]).shape == (96, 128, 3)


def test_cameras_take_turns(sim: Any, watch: Watch, spec: RobotSpec) -> None:
    """Pictures spread over time leave the physics room between them."""
    streams = [c.stream for c in spec.cameras.values()]
    watch.wait(lambda: all(len(watch.heard[s]) > 5 for s in streams), "some pictures")
    phases = [stamp_ns(watch.heard[s][-1]) % 33_333_333 for s in streams]
    distances = [abs(a - b) for i, a in enumerate(phases) for b in phases[i + 1 :]]
    assert min(min(d, 33_333_333 - d) for d in distances) > 5_000_000


def test_commands_move_the_arms_and_grippers(sim: Any, watch: Watch) -> None:
    goal = watch.state()
    goal[2] += 0.3
    goal[7] = 1.0
    watch.command(goal)
    watch.wait(lambda: abs(watch.state()[2] - goal[2]) < 0.02 and watch.state()[7] > 0.9, "the motion")


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ([float("nan")] * 14, "is nan"),
        ([0.0] * 13, "reaches to value 14"),
        ([0.0, 170.0] + [0.0] * 12, "outside its limits"),
    ],
)
def test_bad_command_is_refused_and_the_arms_keep_their_pose(
    sim: Any, watch: Watch, stage: Any, position: list[float], says: str
) -> None:
    before = watch.state()
    with stage.lock:
        watch.outs["arm_command"].publish(build(JointState, {"name": ["x"] * 14, "position": position}))
    watch.wait(lambda: says in sim.output, f"'{says}' in the log")
    assert "command refused" in sim.output
    heard = len(watch.heard["arm_state"])
    watch.wait(lambda: len(watch.heard["arm_state"]) > heard + 50, "more states")
    assert watch.state() == pytest.approx(before, abs=0.02)


def test_reset_takes_task_and_seed_and_repeats_itself(sim: Any, watch: Watch, stage: Any) -> None:
    assert watch.set(task=2, seed=7).successful
    answer = stage.call("/simulator/reset")
    assert answer.success
    assert answer.message == "task 2, easy, seed 7"
    watch.wait(lambda: watch.score()["task"] == "task2_weighing", "the second task")
    assert watch.score()["time_s"] < 5.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"level": "hard"}, "choose one of easy, contest"),
        ({"fault": "camera_melt:head_cam_h"}, "there is no fault 'camera_melt'"),
        ({"fault": "camera_drop:nose"}, "with NAME one of head_cam_h"),
        ({"real_time_factor": 0.0}, "can only be chosen at the start"),
    ],
)
def test_wrong_parameter_is_refused_with_a_sentence(
    sim: Any, watch: Watch, values: dict[str, Any], says: str
) -> None:
    result = watch.set(**values)
    assert not result.successful
    assert says in result.reason


def test_faults_strike_and_end(sim: Any, watch: Watch, spec: RobotSpec) -> None:
    def fresh(stream: str, count: int = 5) -> list[Any]:
        have = len(watch.heard[stream])
        watch.wait(lambda: len(watch.heard[stream]) >= have + count, f"{stream} after the fault")
        return watch.heard[stream][have + 1 :]

    def silent(stream: str) -> bool:
        fresh("clock", 10)
        have = len(watch.heard[stream])
        fresh("clock", 40)
        return len(watch.heard[stream]) == have

    assert watch.set(fault="camera_drop:head_cam_h").successful
    assert silent("head_image")
    assert not silent("left_image")

    assert watch.set(fault="camera_freeze:head_cam_h").successful
    fresh("head_image", 4)
    frozen = fresh("head_image", 4)
    assert len({bytes(m.data) for m in frozen}) == 1
    assert len({stamp_ns(m) for m in frozen}) == len(frozen), "with fresh stamps"

    assert watch.set(fault="camera_corrupt:head_cam_h").successful
    fresh("head_image", 4)
    with pytest.raises(UserError):
        decode_image(fresh("head_image", 2)[-1])

    assert watch.set(fault="none").successful
    fresh("head_image", 4)
    moving = fresh("head_image", 4)
    assert len({bytes(m.data) for m in moving}) > 1, "a camera that works never gives the same picture twice"

    for fault, broken in (
        ("state_nan", lambda m: not np.all(np.isfinite(m.position))),
        ("state_reorder", lambda m: m.name[0] == "zarm_r7_joint"),
        ("state_missing_joint", lambda m: "zarm_l1_joint" not in m.name),
    ):
        assert watch.set(fault=fault).successful
        fresh("arm_state", 100)
        assert all(broken(m) for m in fresh("arm_state", 20)), fault
    assert watch.set(fault="state_drop").successful
    assert silent("arm_state")


@pytest.mark.parametrize(("fault", "jump_s"), [("clock_forward", 5.0), ("clock_back", -5.0)])
def test_clock_jumps_and_stamps_with_it(sim: Any, watch: Watch, fault: str, jump_s: float) -> None:
    def seconds(message: Clock) -> float:
        return message.clock.sec + message.clock.nanosec / 1e9

    watch.wait(lambda: seconds(watch.heard["clock"][-1]) > 6.5, "enough time to jump back")
    assert watch.set(fault=fault).successful

    def jumped() -> bool:
        times = np.array([seconds(m) for m in watch.heard["clock"]])
        return bool(np.any(np.abs(np.diff(times) - jump_s) < 0.5))

    watch.wait(jumped, "the jump")
    last = stamp_ns(watch.heard["arm_state"][-1]) / 1e9
    assert last == pytest.approx(seconds(watch.heard["clock"][-1]), abs=0.5)


def test_expert_commands_over_the_robots_own_topics(stage: Any, watch: Watch) -> None:
    commands: list[Any] = []
    with stage.lock:
        stage.node.create_subscription(JointState, "/kuavo_arm_traj", commands.append, 100)
    stage.start("sim_node", **SMALL, expert=True)
    watch.wait(lambda: len(commands) > 100, "the expert's commands")
    assert all(len(m.position) == 14 and len(m.name) == 14 for m in commands)
    assert all(stamp_ns(m) > 0 for m in commands)
    positions = np.array([m.position for m in commands])
    assert np.ptp(positions, axis=0).max() > 1.0, "in degrees, it has begun to move"


def test_handshake_waits_for_the_policy_and_for_start(stage: Any, watch: Watch) -> None:
    called: list[Any] = []

    def init(request: Any, response: Any) -> Any:
        called.append(request)
        response.success = True
        return response

    stage.start("sim_node", **SMALL, handshake=True)
    watch.wait_for_all()
    assert watch.score()["running"] is False
    with stage.lock:
        stage.node.create_service(Trigger, "/simulator/init", init)
    watch.wait(lambda: called, "the call of /simulator/init")
    assert stage.call("/simulator/start").success
    watch.wait(lambda: watch.score()["running"], "scoring")
    assert watch.heard["success"][-1].data is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(sim: Any, number: signal.Signals) -> None:
    sim.send(number)
    assert sim.ended_within(5.0) == 0
    assert "Traceback" not in sim.output


def test_wrong_start_is_one_sentence(stage: Any) -> None:
    process = stage.start("sim_node", level="hard")
    assert process.ended_within(90) == 1
    assert "sim_node: level: 'hard' is unknown; choose one of easy, contest" in process.output
    assert "Traceback" not in process.output
