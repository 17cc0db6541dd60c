"""Expert for task 3: the right hand picks a bottle, the left takes it over and lays it down, label up.

Both hands pinch a bottle across its width. The right hand comes from the side that looks up at the start, the
left from the side that shall look up at the end, each slanting down and along the bottle. In between,
the bottle is held on edge and the jaws are vertical, so that either hand comes from behind its own side:

- a bottle to be turned over points ahead, label to the left; the right hand holds its rear part, the left
  hand its front part from the label's side. Each hand has turned it by a quarter.
- the front bottle lies across, label to the chest; the hands hold its right and its left part. Each hand
  turns it by a quarter and back, and it comes to lie with the cap towards the robot.
"""

from __future__ import annotations

import math
from functools import partial

import mink
import numpy as np
from numpy.typing import ArrayLike

from kuavo_smolvla_ros.sim.expert import ARM_LAG_S, Arm, Array, Expert, Script, along_hand, raised
from kuavo_smolvla_ros.sim.ik import hand_pose
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks.bottle_righting import FRONT, REST_HEIGHT_M, BottleRighting

GRIP_ABOVE_CENTRE_M = 0.008
"""At this height fingertips that slant down keep off the table."""
SLANT_DEG, FRONT_SLANT_DEG = (47.0, 53.0), (37.0, 41.0)
"""How far below the horizontal a hand points at a lying bottle. To hold the front bottle, the wrists are
turned the other way round, where they bend down less.
"""
MEETING = (0.43, 0.0, 1.03)
PLACES = {1: ((0.255, 0.36),), 3: ((0.235, 0.455), (0.25, 0.35), (0.26, 0.245))}
"""Where one or three bottles go: the farthest to the left first, so that the hand passes over no other."""
PLACE_SPREAD_M = (0.012, 0.006)
NEAR_MEETING_DEG = (-15, -12, -14, -95, -5, -34, 15)
"""The left arm's angles near the meeting place: its wrist starts half a turn from there."""
LEAN_DEG = {
    "left": {False: (-10, 15, 25, -95, -80, 10, 0), True: (0, 5, 0, -80, 85, 0, 0)},
    "right": {False: (10, -30, 30, -80, 85, 10, -20), True: (10, -30, 30, -80, -85, -10, 20)},
}
"""What the elbow's freedom is used for, by whether it is the front bottle: the wrist turned the right way."""
INWARD_RAD = math.radians(14)
"""How far the right hand points to the left at the bottle nearest to the middle: that keeps the forearm off
the chest, and the closing jaw turns the bottle to fit.
"""


def bottle_pose(position: ArrayLike, cap_yaw_rad: float, label: str) -> mink.SE3:
    """A lying bottle by the direction its cap points in and where its label looks: "up" or "down"."""
    cap = np.array([math.cos(cap_yaw_rad), math.sin(cap_yaw_rad), 0.0])
    return _pose(position, cap, np.array([0.0, 0.0, 1.0 if label == "up" else -1.0]))


def _pose(position: ArrayLike, cap: Array, label: Array) -> mink.SE3:
    rotation = np.stack([np.cross(-label, cap), -label, cap], axis=1)
    return mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), np.asarray(position, float))


class BottleRightingExpert(Expert):
    def __init__(self, sim: Simulation, seed: int) -> None:
        assert isinstance(sim.task, BottleRighting)
        super().__init__(sim, seed)
        rng = self.rng
        backs = [name for name in sim.task.bottles if name != FRONT]
        rng.shuffle(backs)
        self.order = [*backs, *(name for name in sim.task.bottles if name == FRONT)]
        slants = {name: FRONT_SLANT_DEG if name == FRONT else SLANT_DEG for name in self.order}
        self.slant = {name: math.radians(rng.uniform(*slants[name])) for name in self.order}
        self.right_grip_m = rng.uniform(-0.042, -0.032)
        self.left_grip_m = rng.uniform(0.032, 0.042)
        spread = rng.uniform(-1, 1, size=(len(self.order), 2)) * PLACE_SPREAD_M
        self.places = dict(zip(self.order, PLACES[len(self.order)] + spread, strict=True))
        self.place_yaw = rng.uniform(0.0, 0.2)
        self.clearance_m = rng.uniform(0.10, 0.14)
        self.meetings = {bottle: self._draw_meeting(bottle) for bottle in self.order}
        self.offered = self.taken = ""

    def _draw_meeting(self, bottle: str) -> mink.SE3:
        """Where and how a bottle changes hands: tilted forward a little, as the wrists like it."""
        position = np.array(MEETING) + self.rng.uniform(-0.012, 0.012, size=3)
        tilt = self.rng.uniform(0.0, 0.1)
        ahead, left = np.array([math.cos(tilt), 0.0, -math.sin(tilt)]), np.array([0.0, 1.0, 0.0])
        return _pose(position, left, -ahead) if bottle == FRONT else _pose(position, ahead, left)

    def _gripping(self, bottle: str, grip: mink.SE3) -> mink.SE3:
        return self._pose_of(bottle) @ grip

    def _pose_of(self, bottle: str) -> mink.SE3:
        rotation = mink.SO3.from_matrix(self.sim.rotation(bottle))
        return mink.SE3.from_rotation_and_translation(rotation, self.sim.position(bottle))

    def _right_grip(self, bottle: str) -> mink.SE3:
        """The right hand in the frame of a bottle, as it lies at the start."""
        front = bottle == FRONT
        lying = bottle_pose((0, 0, 0), 0.0, "up" if front else "down")
        inward = INWARD_RAD * float(np.clip((self.sim.position(bottle)[1] + 0.25) / 0.08, 0.0, 1.0))
        return lying.inverse() @ self._hand_on("right", bottle, self.right_grip_m, inward)

    def _left_grip(self, bottle: str) -> mink.SE3:
        """The left hand in the frame of a bottle, as it shall lie at the end."""
        front = bottle == FRONT
        lying = bottle_pose((0, 0, 0), math.pi if front else 0.0, "up")
        return lying.inverse() @ self._hand_on(
            "left", bottle, -self.left_grip_m if front else self.left_grip_m
        )

    def _hand_on(self, side: str, bottle: str, ahead_m: float, yaw_rad: float = 0.0) -> mink.SE3:
        """A hand that points ahead and down at a bottle lying lengthwise at the origin."""
        roll = -math.pi if bottle == FRONT else 0.0
        return hand_pose(side, [ahead_m, 0.0, GRIP_ABOVE_CENTRE_M], yaw_rad, self.slant[bottle], roll)

    def _hand_for(self, arm: Arm, bottle: str, goal: mink.SE3) -> mink.SE3:
        """Where the hand that holds a bottle has to be for the bottle to be at a goal."""
        position, rotation = self.sim.pinch(arm.side)
        hand = mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position)
        return goal @ self._pose_of(bottle).inverse() @ hand

    def right(self, arm: Arm) -> Script:
        rest = arm.joints
        for bottle in self.order:
            hand_at = partial(self._gripping, bottle, self._right_grip(bottle))
            arm.prefer(np.deg2rad(LEAN_DEG["right"][bottle == FRONT]))
            # The wrist turns above the row, clear of the bottles; farther back the palm touches the chest.
            yield from arm.move(raised(along_hand(hand_at(), -0.02), self.clearance_m))
            yield from arm.move(hand_at, speed=0.22)
            yield from arm.grip(1.0, duration_s=0.5)
            yield from arm.move(raised(arm.target, 0.1))
            yield from self.wait_for(lambda: not self.taken)
            yield from arm.move(partial(self._hand_for, arm, bottle, self.meetings[bottle]))
            yield from arm.hold(ARM_LAG_S)
            self.offered = bottle
            yield from self.wait_for(lambda: bool(self.taken))
            yield from arm.grip(0.0, duration_s=0.3)
            yield from arm.move(along_hand(arm.target, -0.12), speed=0.4)
            self.offered = ""
        yield from arm.move_joints(rest, duration_s=1.5)

    def left(self, arm: Arm) -> Script:
        rest = arm.joints
        yield from arm.hold(self.rng.uniform(0.0, 0.5))
        yield from arm.move_joints(np.deg2rad(NEAR_MEETING_DEG), duration_s=1.5)
        for bottle in self.order:
            grip = self._left_grip(bottle)
            hand_at = partial(self._gripping, bottle, grip)
            arm.prefer(np.deg2rad(LEAN_DEG["left"][bottle == FRONT]))
            yield from arm.move(along_hand(self.meetings[bottle] @ grip, -0.15))
            yield from self.wait_for(partial(self._is_offered, bottle))
            yield from arm.move(along_hand(hand_at(), -0.05))
            yield from arm.move(hand_at, speed=0.2)
            yield from arm.grip(1.0, duration_s=0.5)
            self.taken = bottle
            yield from self.wait_for(lambda: not self.offered)
            yield from self._lay_down(arm, bottle)
            self.taken = ""
        yield from arm.move_joints(rest, duration_s=1.5)

    def _is_offered(self, bottle: str) -> bool:
        return self.offered == bottle

    def _lay_down(self, arm: Arm, bottle: str) -> Script:
        yaw = self.place_yaw + (math.pi if bottle == FRONT else 0.0)
        goal = bottle_pose([*self.places[bottle], REST_HEIGHT_M + 0.002], yaw, "up")
        yield from arm.move(raised(self._hand_for(arm, bottle, goal), 0.08), arc_m=self.style.arc_m)
        yield from arm.hold(ARM_LAG_S)
        yield from arm.move(self._hand_for(arm, bottle, goal), speed=0.2)
        yield from arm.hold(ARM_LAG_S)
        yield from arm.grip(0.0, duration_s=0.4)
        yield from arm.move(along_hand(arm.target, -0.12), speed=0.5)
