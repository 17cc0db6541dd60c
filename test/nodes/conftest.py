"""Real nodes in real processes, in a ROS domain of their own, watched by a probe in the test's process."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Header, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from kuavo_smolvla_ros.control.chunk import ActionChunk, uniform_times_ns
from kuavo_smolvla_ros.nodes.chunk_message import to_message
from kuavo_smolvla_ros.robot.messages import build, stamp_fields
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec
from kuavo_smolvla_ros.robot.vectors import decode_block, encode_state

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# A wait that succeeds ends at once, so this only has to outlast the busiest machine: loading torch included.
WAIT_S = 90.0
STATE_PERIOD_S = 0.005
PROBE_PRIORITY = 10
END_WITHIN_S = 3.0
# What the executor stops for when the machine has no time for the test's robot or policy.
STARVED_MACHINE = ("joint_state_stale", "policy_lost", "control_gap")
GIVE_UP_S = 5.0


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Poll until it holds; what was waited for is in the failure."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.002)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


def as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


class NodeProcess:
    """A node of ours in a process, its output kept."""

    def __init__(self, module: str, parameters: dict[str, Any], env: dict[str, str], log: Path) -> None:
        line = [sys.executable, "-m", f"kuavo_smolvla_ros.nodes.{module}", "--ros-args"]
        for name, value in parameters.items():
            line += ["-p", f"{name}:={as_yaml(value)}"]
        self._log = log
        with log.open("w") as stream:
            self.popen = subprocess.Popen(line, stdout=stream, stderr=subprocess.STDOUT, env=env)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def last_words(self) -> str:
        """What a process that has ended said at last."""
        return f"{self._log.stem} has ended with {self.popen.returncode}: {self.output[-2000:]}"

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def ended_within(self, timeout_s: float) -> int:
        return self.popen.wait(timeout_s)

    def ask_to_end(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.kill()
            self.popen.wait()


class Stage:
    """One ROS domain: starts node processes in it, and holds a probe that is spun in a thread."""

    def __init__(self, domain: int, folder: Path) -> None:
        self.env = os.environ | {"ROS_DOMAIN_ID": str(domain), "OMP_NUM_THREADS": "1"}
        self._folder = folder
        self._processes: list[NodeProcess] = []
        self._numbers = itertools.count()
        self._clients: dict[str, Any] = {}
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("probe", context=self.context)
        self.lock = threading.RLock()
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        # What the probe plays (a robot, a policy) has computers of its own; it must not wait for this one.
        with suppress(OSError):
            how = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, how, os.sched_param(PROBE_PRIORITY))
        while not self._ending.is_set():
            with self.lock:
                self._executor.spin_once(timeout_sec=0.001)
            time.sleep(0.0002)

    def end(self, process: NodeProcess) -> None:
        """Kill it."""
        process.kill()
        self._processes.remove(process)

    def start(self, module: str, **parameters: Any) -> NodeProcess:
        log = self._folder / f"{module}_{next(self._numbers)}.log"
        if module == "executor_node":
            parameters.setdefault("flight_folder", str(self._folder / "flights"))
        process = NodeProcess(module, parameters, self.env, log)
        self._processes.append(process)
        return process

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
        """Poll until it holds and return what it gave; a node that has died meanwhile is told of."""
        try:
            return wait_for(condition, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.last_words()}") from None

    def last_words(self) -> str:
        """What processes said that have ended."""
        return "\n".join(p.last_words() for p in self._processes if p.popen.poll() is not None)

    def ask(self, kind: Any, service: str, request: Any, timeout_s: float = WAIT_S) -> Any:
        """Call a service and wait for its answer."""
        if service not in self._clients:
            with self.lock:
                self._clients[service] = self.node.create_client(kind, service)
        client = self._clients[service]
        self.wait_for(client.service_is_ready, f"service {service}", timeout_s)
        with self.lock:
            future = client.call_async(request)
        self.wait_for(future.done, f"answer of {service}", timeout_s)
        return future.result()

    def call(self, service: str, timeout_s: float = WAIT_S) -> Any:
        return self.ask(Trigger, service, Trigger.Request(), timeout_s)

    def set_parameters(self, node: str, **values: Any) -> Any:
        """Set them; the result of the first that was refused, else of the last."""
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParameters.Request(parameters=parameters)
        results = self.ask(SetParameters, f"/{node}/set_parameters", request).results
        return next((result for result in results if not result.successful), results[-1])

    def status_of(self, node: str) -> Status:
        return Status(self, node)

    def close(self) -> None:
        # Asked first: taking this participant apart while one that was killed still sends to it has crashed.
        for process in self._processes:
            process.ask_to_end()
        deadline = time.monotonic() + END_WITHIN_S
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.ended_within(max(0.0, deadline - time.monotonic()))
            process.kill()
        self._ending.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


class Status:
    """The statuses a node has published, newest last."""

    def __init__(self, stage: Stage, node: str) -> None:
        self.seen: list[dict[str, str]] = []
        self._stage = stage
        with stage.lock:
            stage.node.create_subscription(DiagnosticStatus, f"/{node}/status", self._take, LATCHED)

    def _take(self, message: DiagnosticStatus) -> None:
        values = {pair.key: pair.value for pair in message.values}
        self.seen.append(values | {"message": message.message})

    @property
    def now(self) -> dict[str, str]:
        return self.seen[-1] if self.seen else {}

    def wait(self, timeout_s: float = WAIT_S, **wanted: str) -> dict[str, str]:
        """Wait until the newest status has these values."""

        starved_since: float | None = None

        def matches() -> bool:
            nonlocal starved_since
            reason = self.now.get("reason")
            if reason not in STARVED_MACHINE or reason == wanted.get("reason"):
                starved_since = None
            elif starved_since is None:
                starved_since = time.monotonic()
            elif time.monotonic() - starved_since > GIVE_UP_S:
                raise AssertionError("the machine was too busy")  # in vain: such a stop stays
            return bool(self.seen) and all(self.now.get(k) == v for k, v in wanted.items())

        try:
            wait_for(matches, "", timeout_s)
        except AssertionError as error:
            said = f"the last was {self.now}\n{self._stage.last_words()}"
            raise AssertionError(f"no status {wanted}{error}; {said}") from None
        return self.now


class Robot:
    """A robot as nodes meet it: publishes joint states, follows commands with a lag, keeps what it heard."""

    def __init__(self, stage: Stage, spec: RobotSpec, pose: np.ndarray) -> None:
        self.spec, self.pose = spec, pose.copy()
        self.commands: list[tuple[float, np.ndarray]] = []
        self.change: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
        self.silent = False
        self._stage = stage
        self._index = {name: i for i, name in enumerate(spec.action_names)}
        self._target = pose.copy()
        with stage.lock:
            node = stage.node
            streams = {b.stream for b in spec.state}
            self._outs = {s: node.create_publisher(JointState, spec.streams[s].topic, 10) for s in streams}
            for stream in spec.outputs.values():
                node.create_subscription(JointState, stream.topic, self._hear(stream.name), 100)
            node.create_timer(STATE_PERIOD_S, self._tick)

    def _hear(self, stream: str) -> Callable[[Any], None]:
        blocks = [b for b in self.spec.action if b.stream == stream]

        def take(message: Any) -> None:
            for block in blocks:
                for name, value in zip(block.joints, decode_block(block, message), strict=True):
                    self._target[self._index[name]] = value
            if stream == "arm_command":
                self.commands.append((time.monotonic(), self._target.copy()))

        return take

    def _tick(self) -> None:
        self.pose += 0.2 * (self._target - self.pose)
        if self.silent:
            return
        now_ns = self._stage.node.get_clock().now().nanoseconds
        for name, fields in encode_state(self.spec, self.pose).items():
            self._outs[name].publish(build(JointState, self.change({**fields, **stamp_fields(now_ns)})))

    def rest_after(self, begun: float) -> float:
        """Seconds from then to the last command that differed from the one before."""
        fresh = [(t, command) for t, command in self.commands if t >= begun]
        moved = [t for (_, a), (t, b) in pairwise(fresh) if np.max(np.abs(a - b)) > 1e-9]
        return moved[-1] - begun if moved else 0.0

    def arms(self, since: int = 0) -> np.ndarray:
        """Arm commands heard, one row each."""
        at = [i for i, n in enumerate(self.spec.action_names) if n.startswith("zarm")]
        return np.array([command[at] for _, command in self.commands[since:]])


class Thinker:
    """A policy's voice: chunks and signs of life, as told by the test."""

    def __init__(self, stage: Stage, spec: RobotSpec) -> None:
        self.spec, self._stage = spec, stage
        self.alive = True
        self.sequence = 0
        with stage.lock:
            self._chunks = stage.node.create_publisher(JointTrajectory, "/policy/action_chunk", 10)
            self._alive = stage.node.create_publisher(Header, "/policy/alive", 10)
            stage.node.create_timer(0.05, self._say_alive)

    def _say_alive(self) -> None:
        if self.alive:
            self._alive.publish(build(Header, {"frame_id": self.spec.fingerprint}))

    def now_ns(self) -> int:
        return int(self._stage.node.get_clock().now().nanoseconds)

    def chunk(self, values: np.ndarray, **changes: Any) -> ActionChunk:
        """A chunk for these values, one row per step, stamped now; `changes` spoil it."""
        self.sequence += 1
        fields: dict[str, Any] = {
            "stamp_ns": self.now_ns(),
            "times_ns": uniform_times_ns(len(values), self.spec.fps),
            "names": self.spec.action_names,
            "values": values,
            "task": "task1_moving_grasp",
            "sequence": self.sequence,
            "fingerprint": self.spec.fingerprint,
        }
        return ActionChunk(**(fields | changes))

    def say(self, chunk: ActionChunk) -> None:
        with self._stage.lock:
            self._chunks.publish(to_message(chunk))


@pytest.fixture(scope="session")
def slow_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same policy, its chunks 0.2 s long and its thoughts many times longer than usual."""
    folder = tmp_path_factory.mktemp("policy") / "slow"
    shutil.copytree(checkpoint, folder)
    file = folder / "config.json"
    slow = {"chunk_size": 3, "n_action_steps": 2, "rtc_execution_horizon": 2, "num_steps": 400}
    file.write_text(json.dumps(json.loads(file.read_text()) | slow))
    return folder


@contextmanager
def opened_stage(folder: Path, reserve_domain: Callable[[], Any]) -> Iterator[Stage]:
    domain, lock = reserve_domain()
    made = Stage(domain, folder)
    try:
        yield made
    finally:
        made.close()
        lock.close()


@pytest.fixture
def stage(tmp_path: Path, reserve_domain: Callable[[], Any]) -> Iterator[Stage]:
    with opened_stage(tmp_path, reserve_domain) as made:
        yield made


@pytest.fixture(scope="module")
def shared_stage(
    tmp_path_factory: pytest.TempPathFactory, reserve_domain: Callable[[], Any]
) -> Iterator[Stage]:
    """A stage for all tests of a file, where starting the processes anew would cost more than the tests."""
    with opened_stage(tmp_path_factory.mktemp("stage"), reserve_domain) as made:
        yield made


@pytest.fixture
def spec() -> RobotSpec:
    return load_spec("kuavo_sim")


@pytest.fixture
def ready(spec: RobotSpec) -> np.ndarray:
    """A pose away from home and from every limit."""
    return np.array([spec.poses["task1_ready"].get(n, 0.3) * 0.9 for n in spec.action_names])


@pytest.fixture(scope="session")
def towards() -> Callable[..., np.ndarray]:
    """A slow motion of all arm joints away from a pose by `reach`, over `steps` steps of 0.1 s."""

    def motion(ready: np.ndarray, steps: int = 30, reach: float = 0.3) -> np.ndarray:
        away = np.where(ready > 0, -1.0, 1.0) * reach
        away[[7, 15]] = 0.0
        return ready + np.linspace(0, 1, steps)[:, None] * away

    return motion


@pytest.fixture
def robot(stage: Stage, spec: RobotSpec, ready: np.ndarray) -> Robot:
    return Robot(stage, spec, ready)


@pytest.fixture
def robot_on(stage: Stage, ready: np.ndarray) -> Callable[[str], Robot]:
    """A robot of another description."""
    return lambda name: Robot(stage, load_spec(name), ready)


@pytest.fixture
def thinker(stage: Stage, spec: RobotSpec) -> Thinker:
    return Thinker(stage, spec)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with random weights for the simulated robot: it moves around task 1's ready pose."""
    from kuavo_smolvla_ros.policy.untrained import save_untrained

    return save_untrained(
        load_spec("kuavo_sim"), tmp_path_factory.mktemp("policy") / "tiny", pose="task1_ready"
    )


class Chunks:
    """The chunks a policy node has published, with the time each was heard."""

    def __init__(self, stage: Stage) -> None:
        self.heard: list[tuple[float, Any]] = []
        self._stage = stage
        with stage.lock:
            stage.node.create_subscription(JointTrajectory, "/policy/action_chunk", self._take, 10)

    def _take(self, message: Any) -> None:
        self.heard.append((time.monotonic(), message))

    def wait_for_more(self, count: int = 1) -> list[Any]:
        have = len(self.heard)
        self._stage.wait_for(lambda: len(self.heard) >= have + count, f"{count} more chunks")
        return [message for _, message in self.heard[have:]]


@pytest.fixture
def chunks(stage: Stage) -> Chunks:
    return Chunks(stage)


@pytest.fixture(scope="module")
def shared_chunks(shared_stage: Stage) -> Chunks:
    return Chunks(shared_stage)


class Policy:
    """A policy node under test, beside a simulator."""

    def __init__(self, stage: Stage, checkpoint: Path | str, **parameters: Any) -> None:
        self.stage = stage
        self.status = stage.status_of("policy")
        with stage.lock:
            self._say = stage.node.create_publisher(String, "/policy/instruction", 400)
        defaults = {"use_sim_time": True, "checkpoint": str(checkpoint), "seed": 0}
        self.process = stage.start("policy_node", **(defaults | parameters))

    def wait(self, **wanted: str) -> dict[str, str]:
        return self.status.wait(**wanted)

    def wait_message(self, part: str) -> None:
        try:
            self.stage.wait_for(lambda: part in self.status.now.get("message", ""), f"'{part}' in the status")
        except AssertionError as error:
            raise AssertionError(f"{error}; it was {self.status.now}") from None

    def say(self, text: str) -> None:
        self.stage.wait_for(self._say.get_subscription_count, "ears for instructions")
        with self.stage.lock:
            self._say.publish(String(data=text))

    def set(self, **values: Any) -> Any:
        return self.stage.set_parameters("policy", **values)

    def change(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return bool(self.stage.ask(ChangeState, "/policy/change_state", request).success)


@pytest.fixture(scope="session")
def policy_process() -> type[Policy]:
    return Policy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real processes get two more tries: a busy neighbour on the machine can starve any."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=2))
