"""One simulated episode: the robot in a task's scene, commanded in the vector's units.

Time advances in control periods of 10 ms (five physics steps). Between two commands nothing else moves the
robot, and all chance comes from the seed, so the same seed and commands give the same trajectory bit for
bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import Cameras, Size
from kuavo_smolvla_ros.sim.command import ARM_WIDTH, action_names, check_action, velocity_limits
from kuavo_smolvla_ros.sim.model import add_robot, new_spec
from kuavo_smolvla_ros.sim.scene import add_room
from kuavo_smolvla_ros.sim.task import Level, Score, Task

PHYSICS_PER_CONTROL = round(kuavo.CONTROL_PERIOD_S / kuavo.PHYSICS_PERIOD_S)
CONTROLS_PER_ACTION = round(kuavo.POLICY_PERIOD_S / kuavo.CONTROL_PERIOD_S)
SCORE_EVERY = 10
"""Control periods between two looks at the score: 10 Hz, as the contest does."""
COLOUR_SPREAD = {Level.EASY: 0.05, Level.CONTEST: 0.2}
"""Share by which each colour of the scene varies from episode to episode."""
HALF_OPENING_M = kuavo.GRIPPER_OPENING_M / 2
ARM_INDICES = np.r_[kuavo.ARM_SLICE["left"], kuavo.ARM_SLICE["right"]]

Array = NDArray[np.float64]


class Simulation:
    """A robot, a scene and a clock. Make it once per task; `reset` starts another episode."""

    def __init__(self, task: Task, cameras: Mapping[str, Size] | None = None) -> None:
        self.task = task
        spec = new_spec()
        add_room(spec)
        add_robot(spec, mobile=task.mobile, head_pitch_rad=task.head_pitch_rad)
        task.build(spec)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.cameras = Cameras(self.model, cameras or {})
        self._velocity = velocity_limits()
        self._arm_qpos, self._finger_qpos = self._joint_addresses()
        self._latency_periods = 0
        base = self.model.body("base").id
        self._robot_bodies = frozenset(np.flatnonzero(self.model.body_rootid == base).tolist())
        self._ready = task.ready_state()
        self._lights = self.model.light_diffuse.copy()
        self._painted = np.flatnonzero(self.model.body_rootid[self.model.geom_bodyid] != base)
        self._colours = self.model.geom_rgba[self._painted, :3].copy()
        self.reset(0)

    def _joint_addresses(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        def address(name: str) -> int:
            return int(self.model.joint(name).qposadr[0])

        arms = [address(name) for side in kuavo.SIDES for name in kuavo.arm_joint_names(side)]
        fingers = [address(f"{side}_finger_{letter}") for side in kuavo.SIDES for letter in "ab"]
        return np.array(arms), np.array(fingers).reshape(2, 2)

    # --- Episodes

    def reset(self, seed: int) -> None:
        """Start the episode of this seed: ready pose, scene placed, light and all counters as new."""
        mujoco.mj_resetData(self.model, self.data)
        rng = np.random.default_rng([self.task.number, seed])
        self.model.light_diffuse[:] = self._lights * rng.uniform(0.85, 1.15, size=(len(self._lights), 1))
        self._paint(np.random.default_rng([self.task.number, seed, 1]))
        ready = self._ready
        self._set_joints(ready)
        self._commanded = ready.copy()
        self._target = ready.copy()
        self._setpoint = ready.copy()
        self._base_target = np.zeros(3)
        self._base_setpoint = np.zeros(3)
        self._delayed: deque[tuple[int, Array]] = deque()
        self._periods = 0
        self._write_controls()
        self.task.place(self, rng)
        mujoco.mj_forward(self.model, self.data)
        self._best = dict.fromkeys(self.task.points(self), 0.0)
        self._succeeded_at_s: float | None = None
        self._look_at_score()

    def _paint(self, rng: np.random.Generator) -> None:
        """Everything but the robot in slightly other colours than last time."""
        spread = COLOUR_SPREAD[self.task.level]
        factors = rng.uniform(1 - spread, 1 + spread, size=(len(self._painted), 3))
        self.model.geom_rgba[self._painted, :3] = np.clip(self._colours * factors, 0.0, 1.0)

    def _set_joints(self, state: Array) -> None:
        qpos = self.data.qpos
        qpos[self._arm_qpos] = state[ARM_INDICES]
        for pair, side in zip(self._finger_qpos, kuavo.SIDES, strict=True):
            qpos[pair] = HALF_OPENING_M * (1 - state[kuavo.GRIPPER_INDEX[side]])

    # --- Commands

    @property
    def action_names(self) -> tuple[str, ...]:
        return action_names(self.task.mobile)

    @property
    def target(self) -> Array:
        """The last accepted arm and gripper command, 16 wide, whether or not latency has let it through
        yet."""
        return self._commanded.copy()

    @property
    def base_target(self) -> Array:
        """Where the base was last told to stand: x, y, yaw; a pose it can be told again.

        Told to turn the same way twice it goes on turning, and its own yaw leaves the range of commands.
        """
        x, y, yaw = self._base_target
        most = kuavo.BASE_RANGE[2]
        return np.array([x, y, np.clip(math.remainder(yaw, 2 * math.pi), -most, most)])

    def set_latency(self, latency_s: float) -> None:
        """Let every later command take effect this much later, in whole control periods."""
        if not (math.isfinite(latency_s) and latency_s >= 0):
            raise ValueError(f"latency_s must be a finite number >= 0, not {latency_s}")
        self._latency_periods = round(latency_s / kuavo.CONTROL_PERIOD_S)

    def command(self, action: ArrayLike) -> None:
        """Take a new target; a CommandError means it was refused and the last one still holds."""
        self._enqueue(check_action(action, mobile=self.task.mobile))

    def _enqueue(self, values: Array) -> None:
        if not self._walks(values):
            self._commanded = values[:ARM_WIDTH].copy()
        self._delayed.append((self._periods + self._latency_periods, values))

    def _walks(self, values: Array) -> bool:
        return self.task.mobile and bool(values[ARM_WIDTH + 3] > 0.5)

    def act(self, action: ArrayLike, watch: Callable[[], None] | None = None) -> None:
        """Execute one action of a 10 Hz policy: 0.1 s of commands at 100 Hz, straight from the last target
        to this one.

        Grippers and base are not interpolated, as on the robot. `watch` is called after each control
        period.
        """
        goal = check_action(action, mobile=self.task.mobile)
        start = self._commanded.copy()
        arms = ARM_INDICES
        command = goal.copy()
        for tick in range(1, CONTROLS_PER_ACTION + 1):
            command[arms] = start[arms] + (goal[arms] - start[arms]) * (tick / CONTROLS_PER_ACTION)
            self._enqueue(command.copy())
            self.step()
            if watch is not None:
                watch()

    def step(self, periods: int = 1) -> None:
        """Advance by control periods of 10 ms."""
        for _ in range(periods):
            self.begin_period()
            self.step_physics(PHYSICS_PER_CONTROL)
            self.end_period()

    def begin_period(self) -> None:
        """Bring commands that are due into effect and move the servos' setpoints, no faster than the
        motors can."""
        while self._delayed and self._delayed[0][0] <= self._periods:
            self._accept(self._delayed.popleft()[1])
        dt = kuavo.CONTROL_PERIOD_S
        self._setpoint += np.clip(self._target - self._setpoint, -self._velocity * dt, self._velocity * dt)
        if self.task.mobile:
            self._move_base_setpoint(dt)
        self._write_controls()

    def step_physics(self, steps: int = 1) -> None:
        """Advance by physics steps of 2 ms inside one control period."""
        mujoco.mj_step(self.model, self.data, nstep=steps)

    def end_period(self) -> None:
        self._periods += 1
        if self._periods % SCORE_EVERY == 0:
            self._look_at_score()

    def _accept(self, values: Array) -> None:
        if self._walks(values):
            # Walking: the pose command moves the base, the arms stay as they were told last.
            self._base_target = values[ARM_WIDTH : ARM_WIDTH + 3].copy()
            return
        self._target = values[:ARM_WIDTH].copy()
        # Standing: a walk that was under way ends where it is.
        self._base_target = self._base_setpoint.copy()

    def _move_base_setpoint(self, dt: float) -> None:
        """Walk at bounded speed in the robot's own axes, all of x, y and yaw arriving as they can."""
        error = self._base_target - self._base_setpoint
        error[2] = math.remainder(error[2], 2 * math.pi)
        yaw = self._base_setpoint[2]
        turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
        bound = np.array(kuavo.BASE_VELOCITY) * dt
        ahead = turn.T @ error[:2]
        shrink = min(1.0, *(bound[:2] / np.maximum(np.abs(ahead), 1e-12)))
        self._base_setpoint[:2] += turn @ (ahead * shrink)
        self._base_setpoint[2] += float(np.clip(error[2], -bound[2], bound[2]))

    def _write_controls(self) -> None:
        controls = self._setpoint.copy()
        for side in kuavo.SIDES:
            index = kuavo.GRIPPER_INDEX[side]
            controls[index] = HALF_OPENING_M * (1 - controls[index])
        self.data.ctrl[:ARM_WIDTH] = controls
        if self.task.mobile:
            self.data.ctrl[ARM_WIDTH:] = self._base_setpoint

    # --- What is seen

    @property
    def time_s(self) -> float:
        return float(self.data.time)

    def state(self) -> Array:
        """Measured arm angles (rad) and gripper closings (0 open .. 1 closed), 16 wide."""
        state = np.empty(ARM_WIDTH)
        state[ARM_INDICES] = self.data.qpos[self._arm_qpos]
        for pair, side in zip(self._finger_qpos, kuavo.SIDES, strict=True):
            closing = 1 - self.data.qpos[pair].mean() / HALF_OPENING_M
            state[kuavo.GRIPPER_INDEX[side]] = min(1.0, max(0.0, closing))
        return state

    def base_pose(self) -> Array:
        """Measured base x, y, yaw; zeros for a robot that stands."""
        return self.data.qpos[:3].copy() if self.task.mobile else np.zeros(3)

    def images(self) -> dict[str, NDArray[np.uint8]]:
        """One picture per camera the simulation was made with."""
        return self.cameras.render(self.data)

    def position(self, body: str) -> Array:
        return self.data.body(body).xpos.copy()

    def rotation(self, body: str) -> Array:
        return self.data.body(body).xmat.reshape(3, 3).copy()

    def speed(self, body: str) -> float:
        """Linear speed of a loose body, m/s."""
        return float(np.linalg.norm(self.data.joint(body).qvel[:3]))

    def pinch(self, side: str) -> tuple[Array, Array]:
        """Position and rotation of the point between a gripper's pads: x across the jaw, -z out of the
        hand."""
        site = self.data.site(f"{side}_pinch")
        return site.xpos.copy(), site.xmat.reshape(3, 3).copy()

    def held(self, body: str) -> bool:
        """Whether any part of either arm touches the body."""
        target = self.model.body(body).id
        robot = self._robot_bodies
        owner = self.model.geom_bodyid
        for pair in self.data.contact.geom[: self.data.ncon]:
            first, second = owner[pair[0]], owner[pair[1]]
            if (first == target and second in robot) or (second == target and first in robot):
                return True
        return False

    # --- What a task's `place` uses

    def put_loose(
        self, body: str, position: ArrayLike, yaw_rad: float = 0.0, quat: ArrayLike | None = None
    ) -> None:
        """Place a free body at rest."""
        joint = self.data.joint(body)
        turned = [math.cos(yaw_rad / 2), 0.0, 0.0, math.sin(yaw_rad / 2)] if quat is None else quat
        joint.qpos[:] = [*np.asarray(position, dtype=float), *np.asarray(turned, dtype=float)]
        joint.qvel[:] = 0

    def put_fixture(self, body: str, position: ArrayLike, yaw_rad: float = 0.0) -> None:
        """Place a marker or fixture (a mocap body)."""
        index = int(self.model.body(body).mocapid[0])
        self.data.mocap_pos[index] = position
        self.data.mocap_quat[index] = [math.cos(yaw_rad / 2), 0.0, 0.0, math.sin(yaw_rad / 2)]

    # --- Score

    def _look_at_score(self) -> None:
        for part, points in self.task.points(self).items():
            self._best[part] = max(self._best[part], points)
        if self._succeeded_at_s is None and self.task.succeeded(self, self._best):
            self._succeeded_at_s = self.time_s

    def score(self) -> Score:
        """Points so far; success once reached stays reached."""
        done = self._succeeded_at_s
        bonus = 0.0 if done is None else self.task.time_bonus.at(done)
        return Score(dict(self._best), bonus, done is not None)

    def close(self) -> None:
        self.cameras.close()
