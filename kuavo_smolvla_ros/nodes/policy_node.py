"""Sees and thinks: cameras, joint states and an instruction in, time-stamped action chunks out.

It never commands the robot: the executor node does, and keeps the arms safe whatever comes from here, or does
not come. A lifecycle node: configuring loads and warms the model, activating begins to publish chunks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Header, String
from trajectory_msgs.msg import JointTrajectory

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.ahead import camera_period_s, time_to_encode_s
from kuavo_smolvla_ros.nodes.chunk_message import to_message
from kuavo_smolvla_ros.nodes.diagnostics import Level, quantiles, seconds, status
from kuavo_smolvla_ros.nodes.ears import Ears
from kuavo_smolvla_ros.nodes.inference import LATENCIES_KEPT, Habits, Question, Thinker, Thought
from kuavo_smolvla_ros.nodes.instruction import UNKNOWN_CHOICES, Instruction, resolve
from kuavo_smolvla_ros.nodes.model import LoadedPolicy, load_policy
from kuavo_smolvla_ros.nodes.observer import Observer, stream_values
from kuavo_smolvla_ros.nodes.parameters import Param, declare, refuse
from kuavo_smolvla_ros.nodes.time_factor import TimeFactor
from kuavo_smolvla_ros.nodes.turns import next_due_ns
from kuavo_smolvla_ros.robot.messages import NS_PER_S, build, stamp_fields
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec
from kuavo_smolvla_ros.robot.timeline import NoObservation

TICK_S = 0.01
# While the next observation is about to come, so that it is used at once; always would cost too much.
EAGER_TICK_S = 0.002
ALIVE_S = 0.05
DIAGNOSTICS_S = 1.0
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)

MODES = ("realtime", "synchronous")

PARAMETERS = {
    "robot": Param("kuavo_sim", "robot description: a shipped name or a YAML file", fixed=True),
    "checkpoint": Param("", "folder or hub id of the policy; may change while inactive and unconfigured"),
    "device": Param("", "cpu, cuda or as the checkpoint says (empty)"),
    "mode": Param("realtime", "realtime: think while moving; synchronous: in turns", choices=MODES),
    "n_action_steps": Param(0, "steps between two thoughts; 0: as trained", 0, 1000),
    "vision_ahead": Param(True, "realtime: encode pictures of the next observation as they come in"),
    "instruction": Param("", "what to do: a sentence or the name of a task; may change while running"),
    "unknown_instruction": Param("warn", "for an instruction not trained on", choices=UNKNOWN_CHOICES),
    "camera_frozen_after_s": Param(1.0, "a picture the same for so long counts as dead; 0: never", 0.0, 60.0),
    "noise_scale": Param(
        -1.0, "of the noise a chunk begins with; 0: the same chunk for the same observation; -1: as trained",
        -1.0, 2.0, fixed=True,
    ),
    "seed": Param(-1, "seed of the policy's noise, for tests; -1: fresh noise each time", -1, 2**31 - 1),
    "autostart": Param(True, "configure and activate at the start, without a lifecycle manager", fixed=True),
}  # fmt: skip
CHANGEABLE = ("instruction", "unknown_instruction")


class PolicyNode(LifecycleNode):
    """Plumbing around an observer and a thinker."""

    def __init__(self, **node_arguments: Any) -> None:
        super().__init__("policy", **node_arguments)
        declare(self, PARAMETERS)
        self.spec: RobotSpec = load_spec(self._value("robot"))
        self.loaded: LoadedPolicy | None = None
        self.observer: Observer | None = None
        self.thinker: Thinker | None = None
        self.encode_s: float | None = None
        """Wall-clock time for one picture; None: nothing is encoded ahead."""
        self.instruction: Instruction | None = None
        self.active = False
        self.epoch = 0
        self.previous: ActionChunk | None = None
        self.due_ns = 0
        self.why_silent = "not active"
        self._report: tuple[Any, ...] = ()
        self._thoughts: list[Thought] = []
        self._delays_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._published = 0
        self._failed = 0
        self._time_factor = TimeFactor()
        self._publish_lock = threading.Lock()
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._chunk_out = self.create_publisher(JointTrajectory, "~/action_chunk", 10)
        self._alive_out = self.create_publisher(Header, "~/alive", 10)
        self._status_out = self.create_publisher(DiagnosticStatus, "~/status", LATCHED)
        self._diagnostics_out = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(String, "~/instruction", lambda m: self._wish(m.data, "topic"), 10)
        self.create_timer(TICK_S, self._tick, clock=steady)
        self._eager = self.create_timer(EAGER_TICK_S, self._tick, clock=steady, autostart=False)
        self.create_timer(ALIVE_S, self._say_alive, clock=steady)
        self.create_timer(DIAGNOSTICS_S, self._report_now, clock=steady)
        self.add_on_set_parameters_callback(self._on_parameters)
        threshold = JumpThreshold(
            min_forward=Duration(seconds=1), min_backward=Duration(nanoseconds=-1), on_clock_change=True
        )
        self._jump_handle = self.get_clock().create_jump_callback(threshold, post_callback=self._on_jump)

    # --- Lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self.loaded = load_policy(
                self.spec,
                self._value("checkpoint"),
                device=self._value("device") or None,
                log=self.get_logger().info,
                overrides=self._overrides(),
            )
            ears = Ears(f"{self.get_name()}_ears", self.get_namespace(), self.spec.inputs, self.context)
            self.observer = Observer(self.spec, ears, self._value("camera_frozen_after_s") or None)
            self._ears = ears
        except UserError as error:
            self.get_logger().error(f"cannot be configured: {error}")
            self._free()
            return TransitionCallbackReturn.FAILURE
        if self._value("instruction"):
            self._wish(self._value("instruction"), "parameter")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self.loaded is not None
        assert self.observer is not None
        self.thinker = Thinker(self.loaded.runner, self.observer, self._habits(self.loaded), self._on_thought)
        self.encode_s = self._time_to_encode(self.loaded)
        self._begin_anew()
        self.active = True
        self.get_logger().info("active: publishing action chunks on ~/action_chunk")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._rest()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._free()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._rest()
        self._free()
        return TransitionCallbackReturn.SUCCESS

    def _rest(self) -> None:
        self.active, self.why_silent = False, "not active"
        self.epoch += 1
        if self.thinker is not None and not self.thinker.close():
            self.get_logger().warning(
                "the thought under way did not end in time; its result will not be used"
            )
        self.thinker = None

    def _free(self) -> None:
        if self.observer is not None:
            self._ears.close()
        self.observer = None
        if self.loaded is not None:
            self.loaded.free()
        self.loaded = None

    def _time_to_encode(self, loaded: LoadedPolicy) -> float | None:
        """For one picture, where pictures are to be encoded ahead and that pays."""
        if not self._value("vision_ahead") or self._value("mode") != "realtime":
            return None
        encode_s = time_to_encode_s(loaded.runner, self.spec)
        log, period_s = self.get_logger(), camera_period_s(self.spec)
        if encode_s is None:
            log.info("pictures are not encoded ahead: the policy takes the plain path")
        elif encode_s > period_s:
            log.info(
                f"pictures are not encoded ahead: one takes {encode_s * 1e3:.0f} ms, and a camera sends the "
                f"next after {period_s * 1e3:.0f} ms"
            )
        else:
            log.info(f"pictures are encoded as they come in: one takes {encode_s * 1e3:.1f} ms")
            return encode_s
        return None

    def _overrides(self) -> dict[str, Any]:
        """What an operator has the policy do otherwise than its checkpoint says."""
        noise_scale = self._value("noise_scale")
        return {} if noise_scale < 0 else {"noise_scale": noise_scale}

    def _habits(self, loaded: LoadedPolicy) -> Habits:
        seed = self._value("seed")
        return Habits(
            names=self.spec.action_names,
            fingerprint=self.spec.fingerprint,
            fps=self.spec.fps,
            n_action_steps=self._value("n_action_steps") or loaded.n_action_steps,
            realtime=self._value("mode") == "realtime",
            execution_horizon=loaded.execution_horizon,
            now_ns=self._now_ns,
            time_factor=lambda: self._time_factor.value(),
            seed=None if seed < 0 else seed,
            spec=self.spec,
            first_latency_s=loaded.latency_s,
        )

    # --- Parameters and instruction

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            problem = refuse(PARAMETERS, parameter.name, parameter.value)
            ours = parameter.name in PARAMETERS and parameter.name not in CHANGEABLE
            if problem is None and ours and self.active:
                problem = f"{parameter.name} cannot change while active: deactivate first"
            if problem is None and parameter.name == "instruction" and self.loaded is not None:
                problem = self._wish(parameter.value, "parameter")
            if problem is not None:
                return SetParametersResult(successful=False, reason=problem)
        return SetParametersResult(successful=True)

    def _wish(self, text: str, source: str) -> str | None:
        """Take an instruction, or say why not."""
        if self.loaded is None:
            return "the policy is not configured yet"
        verdict = resolve(text, self.loaded.instructions, self._value("unknown_instruction"))
        if verdict.instruction is None:
            problem: str | None = verdict.remark
        else:
            problem = self.loaded.problem_with(verdict.instruction)
        if problem is not None or verdict.instruction is None:
            self.get_logger().error(f"instruction by {source} refused: {problem}", throttle_duration_sec=1.0)
            return problem
        if verdict.remark:
            self.get_logger().warning(verdict.remark, throttle_duration_sec=1.0)
        if verdict.instruction != self.instruction:
            self.instruction = verdict.instruction
            self._begin_anew()
            text = f"{verdict.instruction.task}: {verdict.instruction.sentence}"
            self.get_logger().info(text, throttle_duration_sec=0.2)
            self._tick()  # the arms still do what they were told before
        return None

    def _begin_anew(self) -> None:
        """What is being thought is for another task, or from before the clock was set: do not use it."""
        self.epoch += 1
        self.due_ns = 0
        self.previous = None

    # --- Seeing and thinking

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _on_jump(self, jump: Any) -> None:
        if self.observer is not None:
            self.observer.forget()
        self._time_factor = TimeFactor()
        self._begin_anew()
        self.get_logger().warning(f"the clock jumped by {jump.delta.nanoseconds / 1e9:+.3f} s: starting anew")

    def _tick(self) -> None:
        if self.observer is None:
            return
        now_ns = self._now_ns()
        if now_ns <= 0:
            self.why_silent = "no clock yet (use_sim_time is set and nothing is on /clock)"
            return
        self._time_factor.see(now_ns, time.monotonic())
        self.observer.listen(now_ns)
        self._handle_thoughts()
        idle = self.active and self.thinker is not None and not self.thinker.busy
        self._be_eager(idle and self._ask(now_ns))

    def _be_eager(self, eager: bool) -> None:
        if eager and self._eager.is_canceled():
            self._eager.reset()
        elif not eager and not self._eager.is_canceled():
            self._eager.cancel()

    def _ask(self, now_ns: int) -> bool:
        """Put the question if it is time for one; True while only the observation for it is to come."""
        assert self.observer is not None
        assert self.thinker is not None
        if self.instruction is None:
            self.why_silent = "no instruction: set the parameter or publish on ~/instruction"
            return False
        observation = self.observer.latest(now_ns)
        if isinstance(observation, NoObservation):
            self.why_silent = str(observation)
            return False
        if observation.t_ns < self.due_ns:
            self._look_ahead()
            return now_ns >= self.due_ns
        self.why_silent = ""
        # Until the answer is there, no other observation is due; a failed thought brings this forward again.
        self.due_ns = observation.t_ns + 1
        self.thinker.ask(Question(observation, self.instruction, self.epoch, self.previous))
        return False

    def _look_ahead(self) -> None:
        """While the next observation is to come: encode what is here of its pictures."""
        assert self.observer is not None
        assert self.thinker is not None
        if self.encode_s is None:
            return
        if self.thinker.ahead_fault is not None:
            self.get_logger().warning(f"pictures are no longer encoded ahead: {self.thinker.ahead_fault}")
            self.encode_s = None
        elif self.encode_s * self._time_factor.value() <= camera_period_s(self.spec):
            self.thinker.prepare(self.observer.pictures_ahead(self.due_ns))

    def _on_thought(self, thought: Thought) -> None:
        """In the thinker's thread: publish at once, the rest is done in the node's own."""
        with self._publish_lock:
            if thought.chunk is not None and self.active and thought.question.epoch == self.epoch:
                self._chunk_out.publish(to_message(thought.chunk))
                assert thought.seen is not None
                self._delays_s.append((self._now_ns() - thought.seen.newest_image_ns) / NS_PER_S)
            self._thoughts.append(thought)

    def _handle_thoughts(self) -> None:
        with self._publish_lock:
            thoughts, self._thoughts = self._thoughts, []
        for thought in thoughts:
            if thought.question.epoch != self.epoch:
                continue
            if thought.chunk is None:
                self._failed += 1
                self.why_silent = str(thought.error)
                self.get_logger().error(f"no chunk: {thought.error}", throttle_duration_sec=1.0)
                continue
            self._published += 1
            self.previous = thought.chunk
            self.due_ns = next_due_ns(thought.chunk, self._steps(), self.spec.fps)

    def _steps(self) -> int:
        assert self.loaded is not None
        return int(self._value("n_action_steps") or self.loaded.n_action_steps)

    def end(self) -> None:
        """Leave nothing running: the process is about to end."""
        self._rest()
        if self.observer is not None:
            self._ears.close()

    # --- Telling

    def _say_alive(self) -> None:
        if self.active:
            fields = {"frame_id": self.spec.fingerprint, **stamp_fields(max(0, self._now_ns()), "stamp")}
            self._alive_out.publish(build(Header, fields))
        task = self.instruction.task if self.instruction else ""
        report = (self.active, self.why_silent.split(":")[0], task)
        if report != self._report:
            self._report = report
            self._report_now()

    def _report_now(self) -> None:
        message = self._status()
        self._status_out.publish(message)
        array = build(DiagnosticArray, stamp_fields(max(0, self._now_ns())))
        array.status = [message]
        self._diagnostics_out.publish(array)

    def _status(self) -> DiagnosticStatus:
        latencies = sorted(self.thinker.latencies_s) if self.thinker is not None else []
        seen_ns = self.previous.stamp_ns if self.previous is not None else None
        values: dict[str, Any] = {
            "active": self.active,
            "task": self.instruction.task if self.instruction else "",
            "instruction": self.instruction.sentence if self.instruction else "",
            "checkpoint": self._value("checkpoint"),
            "fingerprint": self.spec.fingerprint,
            "mode": self._value("mode"),
            "chunks": self._published,
            "failures": self._failed,
            "chunk_age_s": seconds(None if seen_ns is None else self._now_ns() - seen_ns),
        }
        if self.thinker is not None:
            values |= {"encoded_ahead": self.thinker.encoded_ahead, "used_ahead": self.thinker.used_ahead}
        values |= quantiles("latency", latencies)
        values |= quantiles("picture_to_chunk", sorted(self._delays_s))
        if self.observer is not None:
            values |= stream_values(self.observer, self._now_ns())
        silent = self.why_silent
        level = Level.OK if not silent else Level.WARN if self.active else Level.STALE
        return status(f"{self.get_name()}: policy", level, silent or "publishing chunks", values)


def main(args: list[str] | None = None) -> int:
    # A signal must end loading too, which rclpy's handlers would let run on without a context.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    executor = SingleThreadedExecutor()
    node: PolicyNode | None = None
    code = 0
    try:
        node = PolicyNode()
        executor.add_node(node)
        if not node.get_parameter("autostart").value or _autostart(node):
            executor.spin()
        else:
            code = 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (UserError, ValueError) as error:
        print(f"policy_node: {error}", file=sys.stderr)
        code = 1
    if node is not None:
        node.end()
    executor.shutdown()
    rclpy.try_shutdown()
    _leave(code)
    return code


def _leave(code: int) -> None:
    """End the process now. All is closed, and taking torch apart would only take seconds more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # one is enough; a second must not disturb the clearing up
    raise KeyboardInterrupt


def _autostart(node: PolicyNode) -> bool:
    for step in (node.trigger_configure, node.trigger_activate):
        if step() != TransitionCallbackReturn.SUCCESS:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
