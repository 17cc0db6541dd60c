"""Moves the arms: follows action chunks at its own rate, within limits, and owns every stop.

All decisions are made by `control.Executor`, which knows no ROS; this node feeds it once per period and
publishes what it answers. It imports no torch. It is a process of its own, so that whatever happens to the
policy's process leaves the arms in good hands.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.serialization import deserialize_message
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Header
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from kuavo_smolvla_ros import __version__
from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.reasons import ADVICE, Request, State, StopReason, Transition
from kuavo_smolvla_ros.control.records import Decision, Inputs, JointSample
from kuavo_smolvla_ros.control.settings import settings_for
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.chunk_message import from_message
from kuavo_smolvla_ros.nodes.diagnostics import Level, seconds, status
from kuavo_smolvla_ros.nodes.ears import Ears
from kuavo_smolvla_ros.nodes.flight_recorder import FlightRecorder, FlightSettings
from kuavo_smolvla_ros.nodes.message_types import message_class
from kuavo_smolvla_ros.nodes.parameters import Param, declare
from kuavo_smolvla_ros.nodes.realtime import take_precedence
from kuavo_smolvla_ros.robot.description import Condition, RobotSpec
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.messages import NS_PER_S, build, stamp_fields, stamp_ns
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.vectors import decode_hold, decode_state, encode_action

LOOK_AROUND_S = 0.2
DIAGNOSTICS_S = 1.0
ANSWER_WITHIN_PERIODS = 3
REST_WITHIN_S = 1.0
FLIGHT_WITHIN_S = 0.7  # together within the 2 s that an end may take
SIM_CLOCK_LAG_S = 0.25
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)

TRANSITIONS = tuple(t.value for t in Transition)

PARAMETERS = {
    "robot": Param("kuavo_sim", "robot description: a shipped name or a YAML file", fixed=True),
    "limit_profile": Param("", "limits: hardware, default, first_run; empty: as described", fixed=True),
    "dry_run": Param(True, "decide everything and command nothing", fixed=True),
    "policy": Param("/policy", "name of the policy node whose chunks are followed", fixed=True),
    "transition": Param("blend", "what a chunk of another task does", choices=TRANSITIONS, fixed=True),
    "keep_direction": Param(False, "let a limited joint slow the others of its group down", fixed=True),
    "starvation_latches": Param(True, "out of chunks once, move again only when asked to resume", fixed=True),
    "ramp_above": Param(0.05, "rad from pose to target above which arms ramp", 0.001, 1.0, fixed=True),
    "refuse_above": Param(0.5, "rad from pose to target refused at the start", 0.01, 6.3, fixed=True),
    "policy_max_silence_s": Param(0.2, "policy silence after which arms stop", 0.05, 10.0, fixed=True),
    "chunk_max_age_s": Param(3.0, "age of observation refused above", 0.1, 60.0, fixed=True),
    "flight_folder": Param("outputs/flight", "where the last seconds before each stop are kept", fixed=True),
    "flight_seconds": Param(30.0, "seconds kept before a stop", 1.0, 600.0, fixed=True),
    "flight_keep": Param(50, "stops kept; the oldest is removed", 1, 10000, fixed=True),
    "flight_min_free_mb": Param(500.0, "MB left free on that disk", 0.0, 1e6, fixed=True),
}  # fmt: skip
BOUNDS = (
    "keep_direction",
    "starvation_latches",
    "ramp_above",
    "refuse_above",
    "policy_max_silence_s",
    "chunk_max_age_s",
)


class ExecutorNode(Node):
    """Plumbing around the executor."""

    def __init__(self, **node_arguments: Any) -> None:
        super().__init__("executor", **node_arguments)
        declare(self, PARAMETERS)
        self.spec: RobotSpec = load_spec(self._value("robot"), self._value("limit_profile") or None)
        bounds = {name: self._value(name) for name in BOUNDS}
        if self._value("use_sim_time"):
            # /clock comes as a message like any other and may lie behind the stamps it is compared with.
            bounds["max_ahead_s"] = SIM_CLOCK_LAG_S
        if self._value("dry_run"):
            bounds["max_following_error"] = math.inf  # nobody moves the arms, so they cannot follow
        settings = settings_for(self.spec, transition=Transition(self._value("transition")), **bounds)
        self.core = Executor(settings)
        self.dry_run = self._value("dry_run")
        self.decision: Decision | None = None
        self._requests: deque[tuple[Request, Callable[[bool, str], None] | None]] = deque()
        self._chunks: deque[ActionChunk | Refusal] = deque()
        self._policy_heard_ns: int | None = None
        self._joints: JointSample | None = None
        self._foreign: tuple[str, ...] = ()
        self._conditions: dict[str, Any] = {}
        self._refusals: deque[str] = deque(maxlen=5)
        self._refused = 0
        self._starved = 0
        self._told: tuple[Any, ...] = ()
        self.flight = self._flight_recorder()
        self._open()

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _flight_recorder(self) -> FlightRecorder:
        about = {
            "robot": self.spec.name,
            "fingerprint": self.spec.fingerprint,
            "limits": self.spec.limit_profile,
            "dry_run": str(self.dry_run),
            "node": self.get_fully_qualified_name(),
            "software": __version__,
        }
        settings = FlightSettings(
            Path(self._value("flight_folder")).expanduser().absolute(),
            seconds=self._value("flight_seconds"),
            keep=self._value("flight_keep"),
            min_free_mb=self._value("flight_min_free_mb"),
        )
        return FlightRecorder(settings, self.spec.command_rate_hz, about)

    def _open(self) -> None:
        states = {b.stream for b in (*self.spec.state, *self.spec.hold_state)}
        streams = {name: s for name, s in self.spec.inputs.items() if name in states}
        self._ears = Ears(f"{self.get_name()}_ears", self.get_namespace(), streams, self.context)
        self._newest: dict[str, bytes] = {}
        policy = self._value("policy")
        self.create_subscription(JointTrajectory, f"{policy}/action_chunk", self._on_chunk, 10)
        self.create_subscription(Header, f"{policy}/alive", self._on_alive, 10)
        self._types = {s.name: message_class(s.type) for s in self.spec.outputs.values()}
        # In a dry run the command topics are not even opened: nobody can mistake this node for their owner.
        self._command_outs = {
            s.name: self.create_publisher(self._types[s.name], s.topic, 10)
            for s in self.spec.outputs.values()
            if not self.dry_run
        }
        self._status_out = self.create_publisher(DiagnosticStatus, "~/status", LATCHED)
        self._diagnostics_out = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        for name, request in (
            ("stop", Request.STOP),
            ("e_stop", Request.E_STOP),
            ("release_e_stop", Request.RELEASE_E_STOP),
            ("resume", Request.RESUME),
        ):
            self.create_service(Trigger, f"~/{name}", self._service(request))
        for name, on, off in (("pause", Request.PAUSE, Request.UNPAUSE), ("stop", Request.STOP, None)):
            if name in self.spec.signals:
                signal = self.spec.signals[name]
                self.create_subscription(message_class(signal.type), signal.topic, self._signal(on, off), 10)
        for condition in self.spec.preconditions:
            self.create_subscription(
                message_class(condition.type), condition.topic, self._note(condition), LATCHED
            )
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._control = self.create_timer(1.0 / self.spec.command_rate_hz, self.tick, clock=steady)
        self.create_timer(LOOK_AROUND_S, self._look_around, clock=steady)
        self.create_timer(DIAGNOSTICS_S, self._report, clock=steady)

    # --- What comes in

    def _on_chunk(self, message: Any) -> None:
        self._chunks.append(from_message(message))

    def _on_alive(self, message: Any) -> None:
        if message.frame_id == self.spec.fingerprint:
            self._policy_heard_ns = time.monotonic_ns()

    def _service(self, request: Request) -> Callable[[Any, Any], Any]:
        """Requests are decided in the period that follows; the reply tells what was decided."""

        def serve(_: Any, response: Any) -> Any:
            result: list[tuple[bool, str]] = []
            self._requests.append((request, lambda accepted, text: result.append((accepted, text))))
            for _ in range(ANSWER_WITHIN_PERIODS):
                self.tick()
                if result:
                    break
            response.success, response.message = result[0] if result else (False, "not decided")
            return response

        return serve

    def _signal(self, on: Request, off: Request | None) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            request = on if message.data else off
            if request is not None:
                self._requests.append((request, None))

        return take

    def _note(self, condition: Condition) -> Callable[[Any], None]:
        def note(message: Any) -> None:
            self._conditions[condition.name] = condition.path.value(message)

        return note

    def _unmet(self) -> str | None:
        for condition in self.spec.preconditions:
            if self._conditions.get(condition.name) != condition.equals:
                seen = self._conditions.get(condition.name, "not known")
                return f"{condition.name} is {seen}, needed is {condition.equals}: {condition.hint}"
        return None

    def _look_around(self) -> None:
        """Who else commands the robot? On each topic one publisher of this node's name is this node."""
        me = (self.get_name(), self.get_namespace())
        found = []
        for stream in self.spec.outputs.values():
            infos = self.get_publishers_info_by_topic(stream.topic)
            names = [(info.node_name, info.node_namespace) for info in infos]
            if me in names and not self.dry_run:
                names.remove(me)
            found += [f"{namespace.rstrip('/')}/{name} on {stream.topic}" for name, namespace in names]
        self._foreign = tuple(sorted(found))

    def _listen(self) -> None:
        heard_ns = time.monotonic_ns()
        fresh = {heard.stream: heard.data for heard in self._ears.drain()}
        if not fresh:
            return
        self._newest |= fresh
        if set(self._newest) != set(self._ears.types):
            return
        messages = {n: deserialize_message(data, self._ears.types[n]) for n, data in self._newest.items()}
        oldest_ns = min(stamp_ns(message) for message in messages.values())
        try:
            pose = np.concatenate([decode_state(self.spec, messages), decode_hold(self.spec, messages)])
        except MessageError as error:
            # What cannot be read is shown to the executor as it is: not a pose, whatever it says.
            self.get_logger().error(str(error), throttle_duration_sec=1.0)
            pose = np.full(len(self.core.settings.measured_names), np.nan)
        self._joints = JointSample(oldest_ns, heard_ns, pose)

    # --- One period

    def tick(self) -> None:
        """Feed the executor and publish its command."""
        ros_ns = int(self.get_clock().now().nanoseconds)
        if ros_ns <= 0:  # simulated time that has not begun
            return
        self._listen()
        asked = [self._requests.popleft() for _ in range(len(self._requests))]
        chunks = tuple(self._chunks.popleft() for _ in range(len(self._chunks)))
        inputs = Inputs(
            ros_ns=ros_ns,
            mono_ns=time.monotonic_ns(),
            joints=self._joints,
            chunks=chunks,
            requests=tuple(request for request, _ in asked),
            policy_heard_ns=self._policy_heard_ns,
            foreign_publishers=() if self.dry_run else self._foreign,
            unmet=self._unmet(),
        )
        decision = self.flight.step(self.core, inputs)
        self.decision = decision
        if decision.command is not None and not self.dry_run:
            self._publish(decision.command, ros_ns)
        self._answer(asked, decision)
        self._tell(decision)
        self.flight.period_done(self._control.time_until_next_call() / NS_PER_S)

    def _publish(self, command: np.ndarray, ros_ns: int) -> None:
        width = len(self.spec.action_names)
        for name, fields in encode_action(self.spec, command[:width], command[width:]).items():
            if self.spec.streams[name].stamp == "header":
                fields |= stamp_fields(ros_ns)
            self._command_outs[name].publish(build(self._types[name], fields))

    def _answer(
        self, asked: list[tuple[Request, Callable[[bool, str], None] | None]], decision: Decision
    ) -> None:
        for request, reply in asked:
            if reply is None:
                continue
            if decision.answer is not None and request in (Request.RESUME, Request.RELEASE_E_STOP):
                reply(decision.answer.accepted, decision.answer.detail)
            else:
                reply(True, _situation(decision))

    # --- Telling

    def _tell(self, decision: Decision) -> None:
        for refusal in decision.refused:
            self._refused += 1
            text = f"{refusal.reason.value}: {refusal.detail}"
            self._refusals.append(text)
            self.get_logger().warning(f"chunk refused, {text}", throttle_duration_sec=1.0)
        told = (decision.state, decision.reason, decision.task)
        if told == self._told:
            return
        if decision.reason is StopReason.STARVED and self._told[1:2] != (StopReason.STARVED,):
            self._starved += 1
        self._told = told
        text = _situation(decision)
        if decision.reason is not None and decision.state in (State.STOPPING, State.HOLDING):
            self.get_logger().warning(f"{text}. To go on: {ADVICE[decision.reason]}")
        else:
            self.get_logger().info(text)
        self._report()

    def _report(self) -> None:
        for sentence in self.flight.outcomes():
            self.get_logger().info(sentence)
        message = self._status()
        self._status_out.publish(message)
        now_ns = max(0, int(self.get_clock().now().nanoseconds))
        array = build(DiagnosticArray, stamp_fields(now_ns))
        array.status = [message]
        self._diagnostics_out.publish(array)

    def _status(self) -> DiagnosticStatus:
        decision = self.decision
        values: dict[str, Any] = {
            "robot": self.spec.name,
            "fingerprint": self.spec.fingerprint,
            "limits": self.spec.limit_profile,
            "dry_run": self.dry_run,
            "refused_chunks": self._refused,
            "last_refusals": " | ".join(self._refusals),
            "last_flight": self.flight.last_file or "",
        }
        if decision is None:
            return status("executor", Level.STALE, "no control period yet", values)
        newest, joints = self.core.intake.newest, self._joints
        values |= {
            "starvations": self._starved,
            "chunk_age_s": seconds(None if newest is None else decision.ros_ns - newest[0]),
            "joint_state_age_s": seconds(None if joints is None else decision.ros_ns - joints.stamp_ns),
            "state": decision.state.value,
            "reason": decision.reason.value if decision.reason else "",
            "detail": decision.detail,
            "task": decision.task or "",
            "sequence": decision.sequence if decision.sequence is not None else "",
            "at_rest": decision.at_rest,
        }
        values |= {f"limited.{joint}": count for joint, count in decision.interventions.items()}
        stopped = decision.reason is not None
        level = Level.WARN if stopped else Level.OK
        return status(f"{self.get_name()}: executor", level, _situation(decision), values)

    def bring_to_rest(self, timeout_s: float) -> None:
        """Brake before the process ends."""
        self._requests.append((Request.SHUTDOWN, None))
        deadline = time.monotonic() + timeout_s
        period_s = 1.0 / self.spec.command_rate_hz
        while time.monotonic() < deadline:
            self.tick()
            if self.decision is None or self.decision.at_rest:
                return
            time.sleep(period_s)

    def close(self) -> None:
        self.flight.close(FLIGHT_WITHIN_S)
        for sentence in self.flight.outcomes():
            self.get_logger().info(sentence)
        self._ears.close()


def _situation(decision: Decision) -> str:
    text = decision.state.value
    if decision.reason is not None:
        text += f" ({decision.reason.value})"
    return f"{text}: {decision.detail}" if decision.detail else text


def main(args: list[str] | None = None) -> int:
    precedence = take_precedence()  # before DDS starts its threads, which then have it too
    # Signals are ours: rclpy's handlers would take the publishers away before the arms are at rest.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    node = None
    executor = SingleThreadedExecutor()
    try:
        node = ExecutorNode()
        node.get_logger().info(precedence)
        executor.add_node(node)
        while not ending.is_set():
            executor.spin_once(timeout_sec=0.1)
        node.bring_to_rest(REST_WITHIN_S)
    except (UserError, ValueError) as error:
        print(f"executor_node: {error}", file=sys.stderr)
        return 1
    finally:
        if node is not None:
            node.close()
        executor.shutdown()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
