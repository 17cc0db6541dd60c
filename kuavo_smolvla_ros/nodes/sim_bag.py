"""An expert's episode as a recording, without ROS: the messages of simulator and recorder, at their rates.

What `sim_node` would publish and `recorder_node` would write over ROS is written at once, as fast as this
machine draws. Only the way between two processes is missing: nothing is late and nothing lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata
from kuavo_smolvla_ros.data.synthetic_bags import blank
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.sim_faults import PixelNoise
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.messages import NS_PER_S, stamp_fields
from kuavo_smolvla_ros.robot.vectors import encode_action, encode_state
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.episode import Episode
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.simulation import ARM_INDICES, CONTROLS_PER_ACTION, PHYSICS_PER_CONTROL, Simulation

PHYSICS_NS = round(kuavo.PHYSICS_PERIOD_S * NS_PER_S)
AFTER_SUCCESS_S = 0.5  # what is done should be seen to stay done
JPEG_QUALITY = 90
NOISE_STD = 1.0  # grey levels, as the simulator node's


class SimBag:
    """A rosbag2 being written: each stream of the description in its own rhythm."""

    def __init__(self, folder: Path, spec: RobotSpec, sim: Simulation, seed: int) -> None:
        self.folder = folder
        self._spec, self._sim = spec, sim
        self._store = get_typestore(Stores.ROS2_JAZZY)
        self._noise, self._rng = PixelNoise(NOISE_STD), np.random.default_rng(seed)
        self._due_ns: dict[str, int] = {}
        self._phase_ns = {
            role: index * round(NS_PER_S / spec.streams[camera.stream].rate_hz) // len(spec.cameras)
            for index, (role, camera) in enumerate(spec.cameras.items())
        }
        for stream in spec.streams.values():
            if stream.type not in self._store.fielddefs:
                raise UserError(
                    f"{spec.name} carries {stream.name} as {stream.type}, a type of the robot's own; "
                    "record the simulator with a description of standard types, such as kuavo_sim"
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        told = RecordingMetadata.of(spec, sim.task.name, sim.task.instruction)
        for key, value in told.to_custom_data().items():
            self._writer.set_custom_data(key, value)
        self._writer.open()
        self._connections = {
            s.name: self._writer.add_connection(s.topic, s.type, typestore=self._store)
            for s in spec.streams.values()
        }

    def command(self, stamp_ns: int, action: np.ndarray) -> None:
        """The expert commands this."""
        wide = np.zeros(len(self._spec.action_names))
        wide[: len(action)] = action
        for name, fields in encode_action(self._spec, wide).items():
            if self._due(name, stamp_ns):
                self._write(name, stamp_ns, fields)

    def look(self, stamp_ns: int) -> None:
        """A physics step has passed: joint states and pictures that are due."""
        for name, fields in encode_state(self._spec, self._sim.state()).items():
            if self._due(name, stamp_ns):
                self._write(name, stamp_ns, fields)
        for role, camera in self._spec.cameras.items():
            if not self._due(camera.stream, stamp_ns, self._phase_ns[role]):
                continue
            size = (camera.height, camera.width)
            picture = self._sim.cameras.picture(self._sim.data, role, size)
            self._write(camera.stream, stamp_ns, self._picture(camera.stream, picture))

    def _due(self, stream: str, stamp_ns: int, phase_ns: int = 0) -> bool:
        period_ns = round(NS_PER_S / self._spec.streams[stream].rate_hz)
        due_ns = self._due_ns.setdefault(stream, stamp_ns + phase_ns)
        if stamp_ns < due_ns:
            return False
        self._due_ns[stream] = due_ns + period_ns
        return True

    def _picture(self, stream: str, picture: np.ndarray) -> dict[str, Any]:
        picture = self._noise.over(picture, self._rng)
        if self._spec.streams[stream].type.endswith("/CompressedImage"):
            return {"format": "rgb8; jpeg compressed bgr8", "data": encode_jpeg(picture, JPEG_QUALITY)}
        height, width, _ = picture.shape
        fields = {"encoding": "rgb8", "height": height, "width": width, "step": 3 * width}
        return {**fields, "data": picture.tobytes()}

    def _write(self, name: str, stamp_ns: int, fields: Mapping[str, Any]) -> None:
        stream = self._spec.streams[name]
        message = blank(self._store, stream.type)
        stamp = stamp_fields(stamp_ns) if stream.stamp == "header" else {}
        for dotted, value in {**stream.constants, **fields, **stamp}.items():
            *parents, last = dotted.split(".")
            target = message
            for parent in parents:
                target = getattr(target, parent)
            setattr(target, last, _as_declared(value, getattr(target, last)))
        data = self._store.serialize_cdr(message, stream.type)
        self._writer.write(self._connections[name], stamp_ns, data)

    def keep(self) -> None:
        self._writer.close()

    def discard(self) -> None:
        self._writer.close()
        shutil.rmtree(self.folder)


def _as_declared(value: Any, there: Any) -> Any:
    if not isinstance(there, np.ndarray):
        return value
    if isinstance(value, bytes):
        return np.frombuffer(value, there.dtype)
    return np.asarray(value, there.dtype)


def record_expert(sim: Simulation, seed: int, folder: Path, spec: RobotSpec) -> Episode:
    """An expert's episode from this seed; it is kept in `folder` only where it succeeds."""
    sim.reset(seed)
    expert = make_expert(sim, seed)
    bag = SimBag(folder, spec, sim, seed)
    try:
        end_s = _play(sim, expert, bag)
    except BaseException:
        bag.discard()
        raise
    score = sim.score()
    if score.success:
        bag.keep()
    else:
        bag.discard()
    return Episode(seed, score, end_s)


def _play(sim: Simulation, expert: Any, bag: SimBag) -> float:
    """Until success and a moment more, or to the end of the task's time; when it succeeded, or the end."""
    stamp_ns = NS_PER_S  # a stamp of zero would read as "not filled in"
    succeeded_s: float | None = None
    while sim.time_s < sim.task.time_limit_s - 0.5 * kuavo.POLICY_PERIOD_S:
        goal = np.asarray(expert.action(), dtype=np.float64)
        start = sim.target[ARM_INDICES]
        command = goal.copy()
        for tick in range(1, CONTROLS_PER_ACTION + 1):
            command[ARM_INDICES] = start + (goal[ARM_INDICES] - start) * (tick / CONTROLS_PER_ACTION)
            sim.command(command)
            bag.command(stamp_ns, command)
            sim.begin_period()
            for _ in range(PHYSICS_PER_CONTROL):
                sim.step_physics()
                stamp_ns += PHYSICS_NS
                bag.look(stamp_ns)
            sim.end_period()
        if succeeded_s is None and sim.score().success:
            succeeded_s = sim.time_s
        if succeeded_s is not None and sim.time_s >= succeeded_s + AFTER_SUCCESS_S:
            break
    return sim.time_s if succeeded_s is None else succeeded_s
