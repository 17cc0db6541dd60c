"""Picking a part off a belt that changes its mind: the task, the trouble and the policy of closed_loop.py.

The scene is task 1's at the contest's level; done is what holds the part 6 cm above the belt. The belt
changes its speed at random moments and now and then jerks sideways, both known to nobody before they happen:
a plan made from an old observation then aims beside the part.

The policy is a script that stands for a perfect one. Of an observation it knows exactly where the arm and the
part are and how fast the belt runs, and it answers with a chunk: the roll-out of a rule (come up behind the
part, line up, move in, close, lift; back off where that failed) on the belt as it runs now. It remembers
nothing between observations, as SmolVLA does not, and its next chunk continues the steps that are executed
meanwhile, as real-time chunking makes it do. Nothing in it is learned, and it sees without noise: what its
success loses with latency is what latency alone costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mink
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.expert import ARM_LAG_S, JOINT_SPEED
from kuavo_smolvla_ros.sim.experts.reach import bearing, distance, reachable_x
from kuavo_smolvla_ros.sim.ik import ArmIK, hand_pose
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks.belt_sorting import BELT_TOP_M, PART_RADIUS_M, REST_HEIGHT_M

Array = NDArray[np.float64]

STEP_S = kuavo.POLICY_PERIOD_S
SIDE = "left"
PITCH_RAD = np.deg2rad(18.0)
REACH_M = 0.64
CLOSEST_X_M = 0.27
"""Nearer to the body than this the arm cannot point at the part any more."""
GRASP_HEIGHT_M = 0.01
BEHIND_M = 0.10
"""How far behind the part the hand lines up: its fingers are then clear of it."""
CLEAR_M = 0.07
ALIGNED_M = 0.012
INSIDE_M = 0.014
SPEED_M_S, IN_SPEED_M_S, ACCELERATION_M_S2 = 0.40, 0.25, 2.0
GRIP_STALLS_AT = 1.0 - 2 * PART_RADIUS_M / kuavo.GRIPPER_OPENING_M
GRIPPED = GRIP_STALLS_AT - 0.08
TURN_RAD_S, TURNED_RAD = 1.5, 0.1
LIFT_M, LIFT_SPEED_M_S = 0.12, 0.25
DONE_ABOVE_M = 0.06
HELD_FOR_S = 0.3
TIME_LIMIT_S = 15.0


@dataclass(frozen=True)
class Trouble:
    """The belt's velocity over time, drawn from a seed: `changes` are (time, along, sideways) in m/s."""

    changes: tuple[tuple[float, float, float], ...]

    @classmethod
    def draw(
        cls,
        seed: int,
        *,
        slowest: float = 0.04,
        fastest: float = 0.14,
        every_s: float = 1.2,
        jerk_every_s: float = 2.5,
        jerk_m_s: float = 0.10,
        jerk_s: float = 0.3,
    ) -> Trouble:
        """A new speed `every_s` on average, a jerk sideways `jerk_every_s`; `every_s` inf: the plain belt."""
        rng = np.random.default_rng([1234, seed])
        speeds, jerks = [(0.0, 0.1)], []
        time = 0.0
        while np.isfinite(every_s) and (time := time + rng.exponential(every_s)) < TIME_LIMIT_S:
            speeds.append((time, rng.uniform(slowest, fastest)))
        time = 0.0
        while np.isfinite(jerk_every_s) and (time := time + rng.exponential(jerk_every_s)) < TIME_LIMIT_S:
            jerks.append((time, rng.choice([-1.0, 1.0]) * jerk_m_s))
            time += jerk_s
        moments = sorted({t for t, _ in speeds} | {t for t, _ in jerks} | {t + jerk_s for t, _ in jerks})

        def along(at: float) -> float:
            return next(speed for t, speed in reversed(speeds) if t <= at)

        def sideways(at: float) -> float:
            return sum(speed for t, speed in jerks if t <= at < t + jerk_s)

        return cls(tuple((t, along(t), sideways(t)) for t in moments))

    def at(self, time_s: float) -> tuple[float, float]:
        """Velocity along (towards the robot) and sideways."""
        found = (0.0, 0.0)
        for moment, along, sideways in self.changes:
            if moment > time_s:
                break
            found = (along, sideways)
        return found

    def apply(self, sim: Simulation) -> None:
        along, sideways = self.at(sim.time_s)
        sim.model.geom_surfacevel[sim.model.geom("belt").id][:2] = [-along, sideways]


@dataclass(frozen=True)
class Observation:
    """What the policy knows of the moment it looks at."""

    joints: Array
    """The arm's seven angles as measured, and how far the gripper is closed."""
    rates: Array
    part: Array
    belt_m_s: float

    @classmethod
    def of(cls, sim: Simulation, trouble: Trouble) -> Observation:
        arm = kuavo.ARM_SLICE[SIDE]
        rates = np.array([sim.data.joint(name).qvel[0] for name in kuavo.arm_joint_names(SIDE)])
        state = sim.state()
        return cls(
            joints=np.append(state[arm], state[kuavo.GRIPPER_INDEX[SIDE]]),
            rates=rates,
            part=sim.position("part"),
            belt_m_s=trouble.at(sim.time_s)[0],
        )


@dataclass
class _World:
    """The kinematic picture of the scene in which a chunk is rolled out."""

    hand: Array
    turned: mink.SO3
    speed: Array
    closing: float
    part: Array
    held: bool = False
    closed: bool = field(default=False)
    """What the gripper was told last."""


class Picker:
    """Observation to chunk. Holds what is the same for all episodes, and the pose a chunk must begin from."""

    def __init__(self, ready: Array) -> None:
        self._ready = ready
        self._ik = ArmIK(SIDE)

    def chunk(self, seen: Observation, steps: int, prefix: Array | None = None, delay: int = 0) -> Array:
        """Targets (steps, 16) for 0, 0.1 s, 0.2 s.. after the observation; the first `delay` rows are those
        of the `prefix`, which will have been executed.
        """
        rows = np.tile(self._ready, (steps, 1))
        done = 0 if prefix is None else min(delay, len(prefix), steps)
        # An arm trails its target by its lag: the target is where it will be one lag later.
        joints = seen.joints[:7] + ARM_LAG_S * seen.rates
        if prefix is not None and done == 0:
            joints = prefix[0, kuavo.ARM_SLICE[SIDE]]
        self._ik.set_joints(joints)
        pose = self._ik.pose()
        world = _World(
            pose.translation(), pose.rotation(), np.zeros(3), float(seen.joints[7]), seen.part.copy()
        )
        rotation = self._rotation(seen.part)
        world.held = self._grips(world, rotation)
        world.closed = world.held
        for row in range(steps):
            if prefix is not None and row < done:
                self._follow(world, prefix[row], seen.belt_m_s)
                rows[row] = prefix[row]
                continue
            self._decide(world, rotation, seen.belt_m_s)
            rows[row, kuavo.ARM_SLICE[SIDE]] = self._reach(world)
            rows[row, kuavo.GRIPPER_INDEX[SIDE]] = float(world.closed)
        return rows

    def _reach(self, world: _World) -> Array:
        """The angles for the hand's place, as far as the joints get in one step."""
        before, most = self._ik.joints, JOINT_SPEED * STEP_S
        self._ik.solve(mink.SE3.from_rotation_and_translation(world.turned, world.hand))
        self._ik.set_joints(before + np.clip(self._ik.joints - before, -most, most))
        return self._ik.joints

    def _rotation(self, part: Array) -> Array:
        """The hand points from the shoulder to where the part can be met."""
        x = min(part[0], reachable_x(SIDE, part[1], part[2], REACH_M))
        meeting = np.array([x, part[1], part[2]])
        return hand_pose(SIDE, meeting, bearing(SIDE, meeting), PITCH_RAD).rotation().as_matrix()

    def _offset(self, world: _World, rotation: Array, ahead_s: float = ARM_LAG_S, belt: float = 0.0) -> Array:
        """The hand from the part in the hand's axes: ahead of it (negative: behind), across, above."""
        part = world.part + np.array([-belt * ahead_s, 0.0, GRASP_HEIGHT_M])
        ahead = -rotation[:, 2]
        level = np.array([ahead[0], ahead[1], 0.0]) / np.hypot(ahead[0], ahead[1])
        across = np.array([-level[1], level[0], 0.0])
        gap = world.hand - part
        return np.array([gap @ level, gap @ across, gap[2]])

    def _grips(self, world: _World, rotation: Array) -> bool:
        off = self._offset(world, rotation)
        near = abs(off[0]) < 2 * INSIDE_M and abs(off[1]) < INSIDE_M and abs(off[2]) < 0.05
        return bool(GRIPPED <= world.closing <= GRIP_STALLS_AT + 0.06 and near)

    def _follow(self, world: _World, row: Array, belt: float) -> None:
        """One step that is carried out anyway."""
        self._ik.set_joints(row[kuavo.ARM_SLICE[SIDE]])
        before, pose = world.hand, self._ik.pose()
        world.hand, world.turned = pose.translation(), pose.rotation()
        world.speed = (world.hand - before) / STEP_S
        world.closed = bool(row[kuavo.GRIPPER_INDEX[SIDE]] > 0.5)
        self._advance(world, belt, world.hand - before)

    def _advance(self, world: _World, belt: float, moved: Array) -> None:
        """The part and the gripper, one step on."""
        way = kuavo.GRIPPER_VELOCITY_PER_S * STEP_S
        if not world.closed:
            world.closing, world.held = max(0.0, world.closing - way), False
        else:
            world.closing = min(1.0, world.closing + way)
        if world.held:
            world.part = world.part + moved
            world.closing = min(world.closing, GRIP_STALLS_AT)
        else:
            world.part = world.part - [belt * STEP_S, 0.0, 0.0]

    def _decide(self, world: _World, rotation: Array, belt: float) -> None:
        """The rule: one step of the hand and the gripper."""
        along, across, above = self._offset(world, rotation, belt=belt)
        ahead = -rotation[:, 2]
        level = np.array([ahead[0], ahead[1], 0.0]) / np.hypot(ahead[0], ahead[1])
        sideways = np.array([-level[1], level[0], 0.0])
        drift = np.array([-belt, 0.0, 0.0])
        left = (world.turned.inverse() @ mink.SO3.from_matrix(rotation)).log()
        turn = float(np.linalg.norm(left))
        world.turned = world.turned @ mink.SO3.exp(left * min(1.0, TURN_RAD_S * STEP_S / max(turn, 1e-9)))
        lined_up = abs(across) < ALIGNED_M and abs(above) < ALIGNED_M and turn < TURNED_RAD
        inside = abs(along) < INSIDE_M and abs(across) < 1.5 * INSIDE_M and abs(above) < 0.03
        if world.held:
            wish = np.array([0.0, 0.0, LIFT_SPEED_M_S])
            if world.part[2] > BELT_TOP_M + REST_HEIGHT_M + LIFT_M:
                wish = np.zeros(3)
        elif inside:
            # Close around the part, going with it.
            world.closed = True
            wish = drift + (-along * level - across * sideways - [0, 0, above]) * 2.0
        else:
            world.closed = False
            out_of_reach = distance(SIDE, world.part + np.array([0, 0, GRASP_HEIGHT_M])) > REACH_M + 0.02
            may_enter = lined_up and world.closing < 0.1 and not out_of_reach
            goal_along = 0.0 if may_enter else -BEHIND_M
            clear = along < -CLEAR_M or abs(across) > 0.09
            push = np.clip((goal_along - along) / STEP_S, -SPEED_M_S, IN_SPEED_M_S) * level
            side = np.clip(-across / STEP_S, -SPEED_M_S, SPEED_M_S) * sideways
            rise = np.array([0.0, 0.0, np.clip(-above / STEP_S, -SPEED_M_S, SPEED_M_S)])
            wish = push + (side + rise if clear or lined_up else 0.0) + drift
            if out_of_reach:
                wish = self._towards_waiting(world, level)
        change = np.clip(wish - world.speed, -ACCELERATION_M_S2 * STEP_S, ACCELERATION_M_S2 * STEP_S)
        world.speed = world.speed + change
        moved = world.speed * STEP_S
        world.hand = world.hand + moved
        self._advance(world, belt, moved)
        if not world.held and world.closed and self._grips(world, rotation):
            world.held = True

    def _towards_waiting(self, world: _World, level: Array) -> Array:
        """Wait where the part will come within reach."""
        y, z = world.part[1], world.part[2] + GRASP_HEIGHT_M
        place = np.array([reachable_x(SIDE, y, z, REACH_M), y, z]) - (BEHIND_M + 0.02) * level
        return np.clip((place - world.hand) / STEP_S, -SPEED_M_S, SPEED_M_S)


@dataclass(frozen=True)
class Outcome:
    """How an episode ended; `time_s` is the end's."""

    success: bool
    time_s: float
    how: str
    thoughts: int


class Judge:
    """Looks at the part ten times a second."""

    def __init__(self) -> None:
        self._held_since: float | None = None

    def verdict(self, sim: Simulation) -> str | None:
        """How the episode has ended, or None."""
        part, upright = sim.position("part"), sim.rotation("part")[2, 2]
        high = part[2] > BELT_TOP_M + REST_HEIGHT_M + DONE_ABOVE_M and sim.held("part")
        if not high:
            self._held_since = None
        elif self._held_since is None:
            self._held_since = sim.time_s
        elif sim.time_s - self._held_since >= HELD_FOR_S:
            return "lifted"
        if part[2] < BELT_TOP_M:
            return "fell off the belt"
        if not high and upright < 0.7:
            return "knocked over"
        if not high and part[0] < CLOSEST_X_M:
            return "passed by"
        return "too late" if sim.time_s >= TIME_LIMIT_S else None
