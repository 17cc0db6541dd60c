"""The simulator's own thread: physics at 500 Hz, commands at 100 Hz, at any speed against the wall clock.

Nothing here knows ROS. What happens is told to a `Listener`, which publishes it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kuavo_smolvla_ros.robot.messages import NS_PER_S
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.command import ARM_WIDTH, MOBILE_WIDTH, CommandError
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.simulation import ARM_INDICES, CONTROLS_PER_ACTION, PHYSICS_PER_CONTROL, Simulation
from kuavo_smolvla_ros.sim.tasks import make_task

PHYSICS_NS = round(kuavo.PHYSICS_PERIOD_S * NS_PER_S)
CONTROL_NS = round(kuavo.CONTROL_PERIOD_S * NS_PER_S)
FIRST_STAMP_NS = NS_PER_S  # a stamp of zero would read as "not filled in"
GIVE_UP_LAG_S = 0.5  # a simulation that is this late does not try to catch up


@dataclass(frozen=True)
class Scene:
    """What is simulated: chosen anew at each reset."""

    task: int
    level: str
    seed: int
    expert: bool


class Listener(Protocol):
    """What the loop tells while it runs; all calls come from the loop's thread."""

    def on_physics(self, stamp_ns: int, sim: Simulation) -> None:
        """After each physics step: time to publish joint states and to take pictures."""

    def on_control(self, stamp_ns: int, sim: Simulation) -> None:
        """After each control period: time to publish the clock and the score."""

    def on_expert_command(self, stamp_ns: int, action: np.ndarray) -> None:
        """The scripted expert moves the robot: what it commands is to be heard like any command."""

    def on_refused(self, error: CommandError) -> None:
        """A command was refused; the last target holds."""

    def on_reset(self, sim: Simulation, scene: Scene) -> None:
        """A new episode has begun."""

    def on_late(self, lag_s: float) -> None:
        """The simulation cannot keep up with the wall clock."""


class CommandSink:
    """Commands as they arrive, from any thread: each sets some entries of the action."""

    def __init__(self) -> None:
        self._pending: deque[dict[int, float]] = deque()

    def push(self, entries: dict[int, float]) -> None:
        self._pending.append(entries)

    def apply(self, sim: Simulation, action: np.ndarray, listener: Listener) -> np.ndarray:
        """The action after all that arrived; a refused command leaves no trace in it."""
        while self._pending:
            changed = action.copy()
            for index, value in self._pending.popleft().items():
                changed[index] = value
            try:
                sim.command(changed[: len(sim.action_names)])
            except CommandError as error:
                listener.on_refused(error)
            else:
                action = changed
        return action

    def clear(self) -> None:
        self._pending.clear()


class SimLoop:
    """Runs a `Simulation` in a thread of its own until `stop`."""

    def __init__(self, listener: Listener, commands: CommandSink, *, real_time_factor: float) -> None:
        self.real_time_factor = real_time_factor
        self._listener = listener
        self._commands = commands
        self._wanted: Scene | None = None
        self._wanted_lock = threading.Lock()
        self._reset_done = threading.Event()
        self._stop = threading.Event()
        self._jump_ns = 0
        self._thread = threading.Thread(target=self._run, name="simulation")
        self._sims: dict[tuple[int, str], Simulation] = {}
        self.failure: BaseException | None = None

    def start(self, scene: Scene) -> None:
        self._wanted = scene
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def reset(self, scene: Scene, timeout_s: float) -> bool:
        """Begin another episode; True once it has begun."""
        with self._wanted_lock:
            self._reset_done.clear()
            self._wanted = scene
        return self._reset_done.wait(timeout_s)

    def jump_clock(self, seconds: float) -> None:
        """Let the clock and all stamps jump, as a restarted simulator's do."""
        self._jump_ns = round(seconds * NS_PER_S)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # shown by the node, which ends with it
            self.failure = error
        finally:
            for sim in self._sims.values():
                sim.close()

    def _loop(self) -> None:
        sim, scene = self._begin()
        stamp_ns = FIRST_STAMP_NS
        due_s = time.monotonic()
        driver = _Driver(sim, scene)
        while not self._stop.is_set():
            if self._wanted is not None:
                sim, scene = self._begin()
                driver = _Driver(sim, scene)
            stamp_ns += self._take_jump(stamp_ns)
            if driver.expert is None:
                driver.action = self._commands.apply(sim, driver.action, self._listener)
            else:
                self._listener.on_expert_command(stamp_ns, driver.drive())
            sim.begin_period()
            for _ in range(PHYSICS_PER_CONTROL):
                sim.step_physics()
                stamp_ns += PHYSICS_NS
                self._listener.on_physics(stamp_ns, sim)
            sim.end_period()
            self._listener.on_control(stamp_ns, sim)
            due_s = self._wait(due_s)

    def _begin(self) -> tuple[Simulation, Scene]:
        with self._wanted_lock:
            scene, self._wanted = self._wanted, None
        assert scene is not None
        key = (scene.task, scene.level)
        if key not in self._sims:
            self._sims[key] = Simulation(make_task(scene.task, scene.level))
        sim = self._sims[key]
        sim.reset(scene.seed)
        self._commands.clear()
        self._listener.on_reset(sim, scene)
        self._reset_done.set()
        return sim, scene

    def _take_jump(self, stamp_ns: int) -> int:
        jump_ns, self._jump_ns = self._jump_ns, 0
        return max(jump_ns, FIRST_STAMP_NS - stamp_ns)

    def _wait(self, due_s: float) -> float:
        if self.real_time_factor <= 0:
            return time.monotonic()
        due_s += kuavo.CONTROL_PERIOD_S / self.real_time_factor
        lag_s = time.monotonic() - due_s
        if lag_s > GIVE_UP_LAG_S:
            self._listener.on_late(lag_s)
            return time.monotonic()
        if lag_s < 0:
            self._stop.wait(-lag_s)
        return due_s


class _Driver:
    """Where the next command comes from: what arrived, or the expert at 10 Hz drawn out to 100 Hz."""

    def __init__(self, sim: Simulation, scene: Scene) -> None:
        self.sim = sim
        self.expert = make_expert(sim, scene.seed) if scene.expert else None
        # Always 20 wide: what a standing robot has no use for is cut off where the command is given.
        self.action = np.concatenate([sim.target, np.zeros(MOBILE_WIDTH - ARM_WIDTH)])
        self._goal = self._start = self.action[: len(sim.action_names)]
        self._tick = 0

    def drive(self) -> np.ndarray:
        assert self.expert is not None
        if self._tick % CONTROLS_PER_ACTION == 0:
            self._start = np.concatenate([self.sim.target, np.zeros(len(self._goal) - ARM_WIDTH)])
            self._goal = np.asarray(self.expert.action(), dtype=np.float64)
        self._tick += 1
        share = ((self._tick - 1) % CONTROLS_PER_ACTION + 1) / CONTROLS_PER_ACTION
        command = self._goal.copy()
        command[ARM_INDICES] = self._start[ARM_INDICES] + share * (self._goal - self._start)[ARM_INDICES]
        self.sim.command(command)
        return command
