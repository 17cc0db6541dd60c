"""Scripted experts: they see the simulation's state and answer with the action a 10 Hz policy would have to
give.

To write one, derive from `Expert` and give each arm that works a script: a generator that runs one `yield`
per action (0.1 s) and moves its `Arm` meanwhile:

    def left(self, arm: Arm) -> Script:
        yield from arm.move(hand_pose("left", [0.45, 0.5, 1.0], yaw_rad=0.2, pitch_rad=0.3))
        yield from arm.grip(1.0)

Scripts of both arms run side by side and wait for each other by `yield from self.wait_for(lambda: ...)`.
Poses are in the world of a robot that stands at the origin; with a moving base, give `Arm.move` poses
relative to the base. Set `self.base_goal` to (x, y, yaw) to walk there and to None to stand. All variety
must come from `self.rng`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import mink
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.ik import ArmIK, approach
from kuavo_smolvla_ros.sim.simulation import Simulation

Array = NDArray[np.float64]
Script = Iterator[None]
Goal = mink.SE3 | Callable[[], mink.SE3]

ARM_LAG_S = 0.1
"""How far an arm trails its target (damping over stiffness of its servos)."""
WITHIN_REACH_M = 0.004
SHORTEST_MOVE_S = 0.4
"""Shorter ones would start and stop too hard at 10 Hz."""
JOINT_SPEED, JOINT_ACCELERATION = 2.2, 9.0
"""rad/s and rad/s2, a little under the guard's default limits, so that a demonstration passes it
unchanged."""
SLOWER = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.12, 0.06)
"""Shares of a step to try until the joints can follow it."""


@dataclass(frozen=True)
class Style:
    """How this episode's expert moves; drawn from its seed so that no two demonstrations are alike."""

    speed: float
    turning: float
    arc_m: float
    hand_pitch_rad: float
    hand_yaw_rad: float
    approach_m: float
    wobble_m: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Style:
        return cls(
            speed=rng.uniform(0.30, 0.42),
            turning=rng.uniform(1.2, 1.8),
            arc_m=rng.uniform(0.02, 0.05),
            hand_pitch_rad=np.deg2rad(rng.uniform(12.0, 24.0)),
            hand_yaw_rad=np.deg2rad(rng.uniform(-6.0, 6.0)),
            approach_m=rng.uniform(0.08, 0.12),
            wobble_m=rng.uniform(0.0, 0.012),
        )


def ease(share: float) -> float:
    """From 0 to 1 with the least jerk."""
    return share**3 * (10 - 15 * share + 6 * share**2)


def hand_yaw(pose: mink.SE3) -> float:
    """The direction a hand points in, seen from above."""
    ahead = -pose.rotation().as_matrix()[:, 2]
    return math.atan2(ahead[1], ahead[0])


def raised(pose: mink.SE3, height_m: float, sideways: ArrayLike = (0.0, 0.0)) -> mink.SE3:
    """The same rotation, moved up and sideways in the world."""
    offset = np.array([*np.asarray(sideways, dtype=float), height_m])
    return mink.SE3.from_rotation_and_translation(pose.rotation(), pose.translation() + offset)


def along_hand(pose: mink.SE3, distance_m: float) -> mink.SE3:
    """The same rotation, moved ahead (or, negative, back) along the hand."""
    ahead = -pose.rotation().as_matrix()[:, 2]
    return mink.SE3.from_rotation_and_translation(pose.rotation(), pose.translation() + distance_m * ahead)


def joint_duration(start: Array, goal: Array) -> float:
    """Seconds an eased move between two sets of angles needs to keep the joints' speed and acceleration."""
    way = float(np.abs(goal - start).max())
    # Peak speed and acceleration of `ease` are 1.875 and 5.77 times the mean ones.
    return max(1.875 * way / JOINT_SPEED, math.sqrt(5.77 * way / JOINT_ACCELERATION))


class Arm:
    """One arm as a script sees it: where its pinch point is told to be, and how far its gripper is told
    to close."""

    def __init__(self, side: str, joints: ArrayLike, style: Style) -> None:
        self.side = side
        self.style = style
        self.closing = 0.0
        self._ik = ArmIK(side)
        self._ik.set_joints(joints)
        self._last_joints = self._ik.joints
        self._last_step = np.zeros(7)
        self.target = self._ik.pose()

    @property
    def joints(self) -> Array:
        return self._ik.joints

    def prefer(self, joints: ArrayLike) -> None:
        """The angles (rad) the arm leans to from now on where a pose leaves it the choice."""
        self._ik.prefer(joints)

    def _follow(self, pose: mink.SE3) -> bool:
        """Tell the arm to be at a pose; False when its joints would have to move or speed up too fast
        for that."""
        self._ik.set_joints(self._last_joints)
        self.target = pose
        self._ik.solve(pose)
        dt = kuavo.POLICY_PERIOD_S
        allowed = np.minimum(JOINT_SPEED * dt, np.abs(self._last_step) + JOINT_ACCELERATION * dt**2)
        return bool(np.all(np.abs(self._ik.joints - self._last_joints) <= allowed))

    def end_tick(self) -> None:
        """Note how the joints moved in this action; a pose out of reach must not make them leap."""
        most = JOINT_SPEED * kuavo.POLICY_PERIOD_S
        self._last_step = np.clip(self._ik.joints - self._last_joints, -most, most)
        self._last_joints = self._last_joints + self._last_step
        self._ik.set_joints(self._last_joints)

    def choose(self, goals: Iterable[mink.SE3]) -> int:
        """Which of the goals to take: the first this arm reaches from here, or the one it misses least."""
        misses = []
        for index, goal in enumerate(goals):
            misses.append(self._ik.probe(goal)[1])
            if misses[-1] < WITHIN_REACH_M:
                return index
        return int(np.argmin(misses))

    def duration(self, goal: mink.SE3, speed: float | None = None) -> float:
        """Seconds for a move at this episode's speed (or a given mean speed in m/s), as the joints allow."""
        way = float(np.linalg.norm(goal.translation() - self.target.translation()))
        turn = float(np.linalg.norm((self.target.rotation().inverse() @ goal.rotation()).log()))
        by_hand = max(way / (speed or self.style.speed), turn / self.style.turning)
        return max(by_hand, joint_duration(self.joints, self._ik.probe(goal)[0]), SHORTEST_MOVE_S)

    def move(
        self, goal: Goal, *, duration_s: float | None = None, speed: float | None = None, arc_m: float = 0.0
    ) -> Script:
        """Go to a pose along a straight line raised by an arc; a callable goal is asked again at every
        step."""
        ask = goal if callable(goal) else lambda: goal
        start, first = self.target, ask()
        seconds = self.duration(first, speed) if duration_s is None else duration_s
        step, progress = kuavo.POLICY_PERIOD_S / seconds, 0.0
        while progress < 1.0:
            now = ask()
            for slower in SLOWER:
                reached = min(1.0, progress + slower * step)
                share = ease(reached)
                if self._follow(raised(approach(start, first, now, share), arc_m * 4 * share * (1 - share))):
                    break
            progress = reached
            yield

    def follow(self, goal: Callable[[], mink.SE3], duration_s: float) -> Script:
        """Stay on a moving goal."""
        for _ in range(math.ceil(duration_s / kuavo.POLICY_PERIOD_S)):
            self._follow(goal())
            yield

    def grip(
        self, closing: float, *, duration_s: float = 0.6, goal: Callable[[], mink.SE3] | None = None
    ) -> Script:
        """Set the gripper and give it time, staying on a moving goal if one is given."""
        self.closing = closing
        for _ in range(math.ceil(duration_s / kuavo.POLICY_PERIOD_S)):
            if goal is not None:
                self._follow(goal())
            yield

    def hold(self, duration_s: float) -> Script:
        for _ in range(math.ceil(duration_s / kuavo.POLICY_PERIOD_S)):
            yield

    def move_joints(self, joints: ArrayLike, *, duration_s: float) -> Script:
        """Go to arm angles (rad) in joint space, for the ways no straight line of the hand can take."""
        start, goal = self.joints, np.asarray(joints, dtype=float)
        seconds = max(duration_s, joint_duration(start, goal))
        steps = max(1, math.ceil(seconds / kuavo.POLICY_PERIOD_S))
        for step in range(1, steps + 1):
            self._ik.set_joints(start + ease(step / steps) * (goal - start))
            self.target = self._ik.pose()
            yield


class Expert:
    """Runs the arms' scripts; `action()` gives the next action from the simulation's present state."""

    def __init__(self, sim: Simulation, seed: int) -> None:
        self.sim = sim
        self.rng = np.random.default_rng([77, sim.task.number, seed])
        self.style = Style.draw(self.rng)
        state = sim.state()
        self.arms = {side: Arm(side, state[kuavo.ARM_SLICE[side]], self.style) for side in kuavo.SIDES}
        self.base_goal: Array | None = None
        self._scripts = {
            side: script
            for side in kuavo.SIDES
            if (script := getattr(self, side)(self.arms[side])) is not None
        }

    def left(self, arm: Arm) -> Script | None:
        """The left arm's script; None leaves it where it is."""
        return None

    def right(self, arm: Arm) -> Script | None:
        """The right arm's script; None leaves it where it is."""
        return None

    def wait_for(self, condition: Callable[[], bool]) -> Script:
        while not condition():
            yield

    def carry(
        self, arm: Arm, body: str, options: Iterable[tuple[ArrayLike, float]], *, lift_m: float = 0.06
    ) -> Script:
        """Take a gripped body to where its middle shall come to rest, correcting once above the place, and
        let go.

        `options` are places with the hand's yaw there, best first; the first within reach is taken.
        """
        held = self._held_offset(arm, body)
        yield from arm.move(raised(arm.target, lift_m))
        choices = list(options)
        goals = [self._over(arm, held, place, yaw) for place, yaw in choices]
        chosen = arm.choose(goals)
        place, goal = choices[chosen][0], goals[chosen]
        yield from arm.move(raised(goal, lift_m), arc_m=self.style.arc_m)
        yield from arm.hold(ARM_LAG_S)
        error = np.asarray(place, dtype=float) - self.sim.position(body)
        corrected = raised(goal, 0.0, sideways=error[:2])
        yield from arm.move(raised(corrected, 0.002), speed=0.2)
        yield from arm.hold(ARM_LAG_S)
        yield from arm.grip(0.0, duration_s=0.4)

    def back_off(self, arm: Arm, rest: mink.SE3, distance_m: float = 0.1) -> Script:
        """Leave along the hand's own axis, then go to rest."""
        yield from arm.move(along_hand(arm.target, -distance_m), speed=0.5)
        yield from arm.move(rest, arc_m=0.03)

    def _held_offset(self, arm: Arm, body: str) -> Array:
        position, rotation = self.sim.pinch(arm.side)
        return rotation.T @ (self.sim.position(body) - position)

    @staticmethod
    def _over(arm: Arm, held: Array, place: ArrayLike, yaw_rad: float) -> mink.SE3:
        """The pinch pose that has the body at the place, with the tilt it was gripped at."""
        now = arm.target.rotation().as_matrix()
        turn = yaw_rad - hand_yaw(arm.target)
        cos, sin = math.cos(turn), math.sin(turn)
        rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ now
        position = np.asarray(place, dtype=float) - rotation @ held
        return mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position)

    @property
    def finished(self) -> bool:
        return not self._scripts

    def action(self) -> Array:
        """The next 0.1 s' joint targets, in the vector's order and units."""
        for side in list(self._scripts):
            if next(self._scripts[side], "ended") == "ended":
                del self._scripts[side]
        action = np.empty(len(kuavo.STATE_NAMES))
        for side, arm in self.arms.items():
            arm.end_tick()
            action[kuavo.ARM_SLICE[side]] = arm.joints
            action[kuavo.GRIPPER_INDEX[side]] = arm.closing
        if not self.sim.task.mobile:
            return action
        walking = self.base_goal is not None
        goal = self.base_goal if walking else self.sim.base_target
        return np.concatenate([action, goal, [float(walking)]])
