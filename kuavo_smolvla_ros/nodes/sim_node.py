"""A simulated Kuavo behind the real robot's topics, with the contest's services and a clock of its own."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.message_types import message_class
from kuavo_smolvla_ros.nodes.parameters import Param, declare, refuse
from kuavo_smolvla_ros.nodes.sim_faults import ActiveFault, CameraQuality, Fault, PixelNoise
from kuavo_smolvla_ros.nodes.sim_loop import CommandSink, Scene, SimLoop
from kuavo_smolvla_ros.nodes.sim_pictures import PictureTaker
from kuavo_smolvla_ros.robot.description import Camera
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.messages import NS_PER_S, build, set_fields, stamp_fields
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.vectors import decode_block, encode_action, encode_state
from kuavo_smolvla_ros.sim.command import CommandError
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task

SCORE_NS = NS_PER_S // 10
RESET_TIMEOUT_S = 20.0


PARAMETERS = {
    "robot": Param("kuavo_mobile", "description whose topics are played; it also fits kuavo_sim", fixed=True),
    "task": Param(1, "task to simulate, from the next reset on", 1, 9999),
    "level": Param("easy", "how far things vary, from the next reset on", choices=("easy", "contest")),
    "seed": Param(0, "seed of the next reset; same seed, same start", 0, 2**31 - 1),
    "expert": Param(False, "let the scripted expert move the robot, from the next reset on"),
    "real_time_factor": Param(1.0, "simulated seconds per second; 0: as fast as possible", 0.0, 100.0),
    "handshake": Param(
        False, "play the contest's handshake: call /simulator/init, wait for start", fixed=True
    ),
    "cameras": Param(True, "publish pictures", fixed=True),
    "picture_height": Param(0, "height of the pictures; 0: as described", 0, 960, fixed=True),
    "picture_width": Param(0, "width of the pictures; 0: as described", 0, 1280, fixed=True),
    "jpeg_quality": Param(90, "quality of the jpegs", 1, 100),
    "command_latency_s": Param(0.0, "commands take effect this much later, from the next reset on", 0.0, 2.0),
    "camera_noise_std": Param(1.0, "noise of the pictures, in grey levels", 0.0, 128.0),
    "camera_latency_s": Param(0.0, "pictures are published this much later", 0.0, 2.0),
    "camera_jitter_s": Param(0.0, "standard deviation of that latency", 0.0, 1.0),
    "camera_drop_rate": Param(0.0, "share of pictures that are lost", 0.0, 1.0),
    "fault": Param("none", "a fault to play, for example camera_drop:head_cam_h (see sim_faults.py)"),
}


class SimNode(Node):
    """Publishers, subscriptions and services around the loop; called from its threads as its listener."""

    def __init__(self, **node_arguments: Any) -> None:
        super().__init__("kuavo_sim", **node_arguments)
        declare(self, PARAMETERS)
        self.spec = load_spec(self._value("robot"))
        self._fault = ActiveFault()
        self._quality = self._camera_quality({})
        self._noise = PixelNoise(self._quality.noise_std)
        self._left_out_told = 0
        self._rng = np.random.default_rng(0)
        self._frozen: dict[str, np.ndarray] = {}
        self._late: list[tuple[int, Any, Any]] = []
        self._late_lock = threading.Lock()
        self._running = not self._value("handshake")
        self._score_due_ns = 0
        self._state_due: dict[str, int] = {}
        self._command_due: dict[str, int] = {}
        self._jpeg_quality = self._value("jpeg_quality")
        self._commands = CommandSink()
        self._cameras = self._described_cameras() if self._value("cameras") else {}
        self._open_topics()
        factor = self._value("real_time_factor")
        self.loop = SimLoop(self, self._commands, real_time_factor=factor)
        rate_hz = max(
            (s.rate_hz for s in self.spec.inputs.values() if self._carries_pictures(s.name)), default=30.0
        )
        self.pictures = (
            PictureTaker(self._cameras, rate_hz, self._deliver, lock_step=factor == 0)
            if self._cameras
            else None
        )
        self._check_scene(self._scene())
        self.add_on_set_parameters_callback(self._on_parameters)
        self.create_timer(0.2, self._look_after, clock=rclpy.clock.Clock())

    def start(self) -> None:
        if self.pictures is not None:
            self.pictures.start()
        self.loop.start(self._scene())

    def stop(self) -> None:
        self.loop.stop()
        if self.pictures is not None:
            self.pictures.stop()

    # --- Set-up

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _scene(self, **changed: Any) -> Scene:
        values = {name: self._value(name) for name in ("task", "level", "seed", "expert")}
        return Scene(**(values | changed))

    def _check_scene(self, scene: Scene) -> None:
        make_task(scene.task, scene.level)

    def _carries_pictures(self, stream: str) -> bool:
        return any(c.stream == stream for c in self.spec.cameras.values())

    def _described_cameras(self) -> dict[str, Camera]:
        height, width = self._value("picture_height"), self._value("picture_width")
        return {
            role: Camera(role, camera.stream, height or camera.height, width or camera.width)
            for role, camera in self.spec.cameras.items()
        }

    def _open_topics(self) -> None:
        self._types = {s.name: message_class(s.type) for s in self.spec.streams.values()}
        self._robot_outs = {
            s.name: self.create_publisher(self._types[s.name], s.topic, qos_profile_sensor_data)
            for s in self.spec.inputs.values()
        }
        # A command topic has one owner: it is only opened for publishing once the expert is that owner.
        self._expert_publishers: dict[str, Any] = {}
        self._clock_out = self.create_publisher(Clock, "/clock", 10)
        self._success_out = self.create_publisher(Bool, "/simulator/success", 10)
        self._score_out = self.create_publisher(String, "/simulator/score", 10)
        for stream in self.spec.outputs.values():
            self.create_subscription(
                self._types[stream.name], stream.topic, self._on_command(stream.name), 10
            )
        self.create_service(Trigger, "/simulator/reset", self._on_reset_service)
        self.create_service(Trigger, "/simulator/start", self._on_start_service)
        self._init_client = self.create_client(Trigger, "/simulator/init")
        self._init_call: Any = None
        self._init_done = False

    # --- Commands and services (the ROS thread)

    def _on_command(self, stream: str) -> Callable[[Any], None]:
        blocks = [b for b in self.spec.action if b.stream == stream]
        index = {name: i for i, name in enumerate(self.spec.action_names)}
        gate = self.spec.streams[stream].gate
        flag = {} if gate is None else {index[gate.joint]: 1.0 if gate.above is not None else 0.0}

        def take(message: Any) -> None:
            try:
                entries = dict(flag)
                for block in blocks:
                    values = decode_block(block, message).tolist()
                    entries |= {index[name]: value for name, value in zip(block.joints, values, strict=True)}
            except UserError as error:
                self._warn(f"command refused: {error}")
                return
            self._commands.push(entries)

        return take

    def _warn(self, text: str) -> None:
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _on_reset_service(self, request: Any, response: Any) -> Any:
        scene = self._scene()
        self._running = not self._value("handshake")
        self._init_done = False
        response.success = self.loop.reset(scene, RESET_TIMEOUT_S)
        response.message = (
            f"task {scene.task}, {scene.level}, seed {scene.seed}" if response.success else "timed out"
        )
        return response

    def _on_start_service(self, request: Any, response: Any) -> Any:
        """Scoring starts, with the scene as new: what moved on a belt meanwhile lies at its start again."""
        response.success = self.loop.reset(self._scene(), RESET_TIMEOUT_S)
        self._running = response.success
        response.message = "started" if response.success else "timed out"
        return response

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        changed = {p.name: p.value for p in parameters}
        for name, value in changed.items():
            problem = refuse(PARAMETERS, name, value)
            if problem is not None:
                return SetParametersResult(successful=False, reason=problem)
        try:
            scene_names = ("task", "level", "seed", "expert")
            self._check_scene(self._scene(**{k: v for k, v in changed.items() if k in scene_names}))
            fault = ActiveFault.parse(changed["fault"], tuple(self._cameras)) if "fault" in changed else None
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if "real_time_factor" in changed:
            if (changed["real_time_factor"] == 0) != (self.loop.real_time_factor == 0):
                return SetParametersResult(
                    successful=False, reason="0 (lock-step) can only be chosen at the start"
                )
            self.loop.real_time_factor = changed["real_time_factor"]
        if fault is not None:
            self._fault = fault
            self._frozen.clear()
            if fault.clock_jump_s:
                self.loop.jump_clock(fault.clock_jump_s)
        self._quality = self._camera_quality(changed)
        if self._quality.noise_std != self._noise.std:
            self._noise = PixelNoise(self._quality.noise_std)
        self._jpeg_quality = changed.get("jpeg_quality", self._jpeg_quality)
        return SetParametersResult(successful=True)

    def _camera_quality(self, changed: dict[str, Any]) -> CameraQuality:
        names = ("noise_std", "latency_s", "jitter_s", "drop_rate")
        return CameraQuality(**{n: changed.get(f"camera_{n}", self._value(f"camera_{n}")) for n in names})

    def _look_after(self) -> None:
        """End with an error where a thread died; play the handshake's first part where it is asked for."""
        for part in (self.loop, self.pictures):
            if part is not None and part.failure is not None:
                raise part.failure
        if self.pictures is not None and self.pictures.left_out > self._left_out_told:
            self._left_out_told = self.pictures.left_out
            text = f"{self._left_out_told} pictures left out so far: this machine renders too slowly"
            self.get_logger().warning(text, throttle_duration_sec=10.0)
        if not self._value("handshake") or self._init_done or not self._init_client.service_is_ready():
            return
        if self._init_call is None:
            self._init_call = self._init_client.call_async(Trigger.Request())
        elif self._init_call.done():
            self._init_done = bool(self._init_call.result() and self._init_call.result().success)
            self._init_call = None

    # --- What the loop tells (its thread)

    def on_reset(self, sim: Simulation, scene: Scene) -> None:
        sim.set_latency(self._value("command_latency_s"))
        self._score_due_ns = 0
        if scene.expert and not self._expert_publishers:
            self._expert_publishers = {
                s.name: self.create_publisher(self._types[s.name], s.topic, 10)
                for s in self.spec.outputs.values()
            }
        elif not scene.expert:
            for publisher in self._expert_publishers.values():
                self.destroy_publisher(publisher)
            self._expert_publishers = {}
        self.get_logger().info(
            f"task {scene.task} ({sim.task.name}), {scene.level}, seed {scene.seed}: {sim.task.instruction}"
        )

    def on_refused(self, error: CommandError) -> None:
        self._warn(str(error))

    def on_late(self, lag_s: float) -> None:
        self._warn(f"the simulation is {lag_s:.1f} s late: this machine is too slow for the real-time factor")

    def on_expert_command(self, stamp_ns: int, action: np.ndarray) -> None:
        wide = np.zeros(len(self.spec.action_names))
        wide[: len(action)] = action
        for name, fields in encode_action(self.spec, wide).items():
            if not self._is_due(self._command_due, name, stamp_ns):
                continue
            if self.spec.streams[name].stamp == "header":
                fields = {**fields, **stamp_fields(stamp_ns)}
            self._expert_publishers[name].publish(build(self._types[name], fields))

    def on_physics(self, stamp_ns: int, sim: Simulation) -> None:
        self._publish_state(stamp_ns, sim)
        if self.pictures is not None:
            self.pictures.look(stamp_ns, sim)
        self._publish_late(stamp_ns)

    def on_control(self, stamp_ns: int, sim: Simulation) -> None:
        self._clock_out.publish(set_fields(Clock(), stamp_fields(stamp_ns, "clock")))
        if stamp_ns < self._score_due_ns:
            return
        self._score_due_ns = stamp_ns + SCORE_NS
        score = sim.score()
        self._success_out.publish(Bool(data=bool(self._running and score.success)))
        document = {
            "task": sim.task.name,
            "time_s": round(sim.time_s, 3),
            "running": self._running,
            "success": bool(score.success),
            "total": float(score.total),
            "parts": {k: float(v) for k, v in score.parts.items()},
        }
        self._score_out.publish(String(data=json.dumps(document)))

    def _publish_state(self, stamp_ns: int, sim: Simulation) -> None:
        if self._fault.strikes(Fault.STATE_DROP):
            return
        for name, fields in encode_state(self.spec, sim.state()).items():
            if not self._is_due(self._state_due, name, stamp_ns):
                continue
            message = build(self._types[name], {**self._spoil_state(fields), **stamp_fields(stamp_ns)})
            self._robot_outs[name].publish(message)

    def _is_due(self, due: dict[str, int], stream: str, stamp_ns: int) -> bool:
        """Whether a stream's next message is due at its described rate; a clock set back begins anew."""
        if stamp_ns < due.get(stream, 0) <= stamp_ns + NS_PER_S:
            return False
        due[stream] = stamp_ns + round(NS_PER_S / self.spec.streams[stream].rate_hz)
        return True

    def _spoil_state(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self._fault.strikes(Fault.STATE_NAN):
            return {**fields, "position": [float("nan"), *fields["position"][1:]]}
        if self._fault.strikes(Fault.STATE_REORDER):
            return {key: list(reversed(values)) for key, values in fields.items()}
        if self._fault.strikes(Fault.STATE_MISSING_JOINT):
            return {key: values[1:] for key, values in fields.items()}
        return fields

    # --- Pictures (the renderer's thread)

    def _deliver(self, camera: Camera, stamp_ns: int, picture: np.ndarray) -> None:
        fault, quality = self._fault, self._quality
        if fault.strikes(Fault.CAMERA_DROP, camera.name) or self._rng.random() < quality.drop_rate:
            return
        if fault.strikes(Fault.CAMERA_FREEZE, camera.name):
            picture = self._frozen.setdefault(camera.name, picture)
        else:
            picture = self._noise.over(picture, self._rng)
        publisher, kind = self._robot_outs[camera.stream], self._types[camera.stream]
        if kind.__name__ == "CompressedImage":
            data = encode_jpeg(picture, self._jpeg_quality)
            if fault.strikes(Fault.CAMERA_CORRUPT, camera.name):
                data = data[: len(data) // 2]
            fields: dict[str, Any] = {"format": "rgb8; jpeg compressed bgr8", "data": data}
        else:
            height, width, _ = picture.shape
            fields = {"encoding": "rgb8", "height": height, "width": width, "step": 3 * width}
            fields["data"] = picture.tobytes()
        fields |= {"header.frame_id": camera.name, **stamp_fields(stamp_ns)}
        message = build(kind, fields)
        delay_ns = round(quality.delay_s(self._rng) * NS_PER_S)
        if delay_ns == 0:
            publisher.publish(message)
            return
        with self._late_lock:
            self._late.append((stamp_ns + delay_ns, publisher, message))

    def _publish_late(self, stamp_ns: int) -> None:
        if not self._late:
            return
        with self._late_lock:
            due = [entry for entry in self._late if entry[0] <= stamp_ns]
            self._late = [entry for entry in self._late if entry[0] > stamp_ns]
        for _, publisher, message in due:
            publisher.publish(message)


def main(args: list[str] | None = None) -> int:
    rclpy.init(args=args)
    node = None
    try:
        node = SimNode()
        node.start()
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (UserError, ValueError) as error:
        print(f"sim_node: {error}", file=sys.stderr)
        return 1
    finally:
        if node is not None:
            node.stop()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
