"""Taking pictures beside the simulation: a thread that owns OpenGL renders copies of the world."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np

from kuavo_smolvla_ros.robot.description import Camera
from kuavo_smolvla_ros.robot.messages import NS_PER_S
from kuavo_smolvla_ros.sim.simulation import Simulation

Deliver = Callable[[Camera, int, np.ndarray], None]


@dataclass(frozen=True)
class _Job:
    camera: Camera
    stamp_ns: int
    sim: Simulation
    world: mujoco.MjData
    spare: queue.SimpleQueue[mujoco.MjData]


class PictureTaker:
    """Each camera in its own rhythm, the cameras in turn rather than all at once.

    `lock_step`: the simulation waits for each picture. Otherwise a picture for which there is no time is left
    out and counted, as by a camera driver on a busy machine.
    """

    def __init__(
        self, cameras: dict[str, Camera], rate_hz: float, deliver: Deliver, *, lock_step: bool
    ) -> None:
        self.left_out = 0
        self.failure: BaseException | None = None
        self._cameras = cameras
        self._period_ns = round(NS_PER_S / rate_hz)
        self._phase_ns = {role: i * self._period_ns // len(cameras) for i, role in enumerate(cameras)}
        self._last_tick: dict[str, int] = {}
        self._deliver = deliver
        self._lock_step = lock_step
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=2 * len(cameras))
        self._spare_for: Simulation | None = None
        self._spare: queue.SimpleQueue[mujoco.MjData] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pictures")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.ident is None:
            return
        self._jobs.put(None)
        self._thread.join()

    def look(self, stamp_ns: int, sim: Simulation) -> None:
        """Called at each physics step: starts the pictures that are due."""
        for role, camera in self._cameras.items():
            tick = (stamp_ns + self._phase_ns[role]) // self._period_ns
            if self._last_tick.get(role) == tick or self.failure is not None:
                continue
            self._last_tick[role] = tick
            if not self._lock_step and self._jobs.full():
                self.left_out += 1
                continue
            world = self._copy(sim)
            self._jobs.put(_Job(camera, stamp_ns, sim, world, self._spare))
            if self._lock_step:
                self._jobs.join()

    def _copy(self, sim: Simulation) -> mujoco.MjData:
        """The world as it is now, in memory that an earlier picture has done with: to allocate costs more."""
        if self._spare_for is not sim:
            self._spare_for, self._spare = sim, queue.SimpleQueue()
        try:
            world = self._spare.get_nowait()
        except queue.Empty:
            world = mujoco.MjData(sim.model)
        mujoco.mj_copyData(world, sim.model, sim.data)
        return world

    def _run(self) -> None:
        used: set[Simulation] = set()
        while (job := self._jobs.get()) is not None:
            try:
                if self.failure is None:
                    used.add(job.sim)
                    size = (job.camera.height, job.camera.width)
                    picture = job.sim.cameras.picture(job.world, job.camera.name, size)
                    self._deliver(job.camera, job.stamp_ns, picture)
                    job.spare.put(job.world)
            except BaseException as error:  # shown by the node, which ends with it
                self.failure = error
            finally:
                self._jobs.task_done()
        for sim in used:  # a context is freed in the thread that made it
            sim.cameras.close()
