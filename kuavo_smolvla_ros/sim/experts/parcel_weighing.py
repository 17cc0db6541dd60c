"""Expert for task 2: right arm from belt to scale, left arm from scale to container."""

from __future__ import annotations

import math

import mink
import numpy as np

from kuavo_smolvla_ros.sim.expert import ARM_LAG_S, Arm, Array, Expert, Script, along_hand
from kuavo_smolvla_ros.sim.experts.reach import bearing, options
from kuavo_smolvla_ros.sim.ik import UP, hand_pose
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks.parcel_weighing import (
    BELT_SPEED_M_S,
    CONTAINER_FLOOR_M,
    PARCEL_HALF_M,
    SCALE_TOP_M,
)

LOOK_AHEAD_S = 0.1 + ARM_LAG_S
BELT_VELOCITY = np.array([0.0, BELT_SPEED_M_S, 0.0])
SCALE_SLACK_M = 0.06
"""The far corner of where the scale may stand is beyond the arm's reach; its near side mostly is not."""
GRASP_SHORT_M = 0.01
"""The jaw takes the parcel this far before its middle, which lengthens the arm by as much."""
CONTAINER_SLACK_M = 0.015
"""How far from the middle a parcel is set down where the middle is too far to reach."""
BELT_MEETING_Y_M = -0.33
"""Where on the belt the hand waits: across from its shoulder."""
UNFOLD_DEG = (60, 0, 0, -140, -88, 0, 0)
"""On the way up from hanging straight down, past the table's edge."""


def box_yaw(yaw_rad: float, wanted_rad: float) -> float:
    """The yaw of a square box's side nearest to the one wanted."""
    quarter = math.pi / 2
    return yaw_rad + quarter * round((wanted_rad - yaw_rad) / quarter)


class ParcelWeighingExpert(Expert):
    def __init__(self, sim: Simulation, seed: int) -> None:
        super().__init__(sim, seed)
        self.weighed = False
        self.grasp_height = PARCEL_HALF_M[2] - self.rng.uniform(0.012, 0.02)
        self.approach_offset = self.rng.uniform(-1, 1, size=3) * self.style.wobble_m * (1 - UP)

    def _parcel_yaw(self) -> float:
        rotation = self.sim.rotation("parcel")
        return math.atan2(rotation[1, 0], rotation[0, 0])

    def _hand_at(self, side: str, place: Array, yaw: float) -> mink.SE3:
        pose = hand_pose(side, place + self.grasp_height * UP, yaw, self.style.hand_pitch_rad)
        return along_hand(pose, -GRASP_SHORT_M)

    def right(self, arm: Arm) -> Script:
        sim, style = self.sim, self.style
        rest = arm.target

        def parcel_soon() -> Array:
            moving = sim.speed("parcel") > 0.5 * BELT_SPEED_M_S
            return sim.position("parcel") + moving * BELT_VELOCITY * LOOK_AHEAD_S

        def hand_at(place: Array) -> mink.SE3:
            yaw = box_yaw(self._parcel_yaw(), bearing("right", place))
            return self._hand_at("right", place, yaw)

        def behind() -> mink.SE3:
            return along_hand(hand_at(parcel_soon()), -style.approach_m)

        start = sim.position("parcel")
        meeting = np.array([start[0], max(BELT_MEETING_Y_M, start[1] + 0.08), start[2]])
        wait = along_hand(hand_at(meeting + self.approach_offset), -style.approach_m)
        yield from arm.move(wait)
        yield from self.wait_for(lambda: parcel_soon()[1] + 0.3 * BELT_SPEED_M_S >= meeting[1])
        # First beside the parcel, then ahead: the jaw is only 25 mm wider than the box.
        yield from arm.move(behind, duration_s=0.5)
        yield from arm.follow(behind, duration_s=0.2)
        yield from arm.move(lambda: hand_at(parcel_soon()), duration_s=0.6)
        yield from arm.grip(1.0, goal=lambda: hand_at(parcel_soon()), duration_s=0.5)
        yield from self.carry(arm, "parcel", options("right", self._on_scale(), SCALE_SLACK_M), lift_m=0.1)
        yield from arm.move(along_hand(arm.target, -0.1), speed=0.5)
        self.weighed = True
        yield from arm.move(rest, arc_m=0.03)

    def left(self, arm: Arm) -> Script:
        sim, style = self.sim, self.style

        def hand_at(place: Array) -> mink.SE3:
            return self._hand_at("left", place, box_yaw(self._parcel_yaw(), bearing("left", place)))

        yield from arm.hold(self.rng.uniform(0.0, 0.5))
        yield from arm.move_joints(np.deg2rad(UNFOLD_DEG), duration_s=2.0)
        ready = hand_pose("left", [0.25, 0.32, 1.05], bearing("left", self._on_scale()), style.hand_pitch_rad)
        yield from arm.move(ready)
        yield from self.wait_for(lambda: self.weighed)
        yield from arm.move(lambda: along_hand(hand_at(sim.position("parcel")), -style.approach_m))
        yield from arm.move(lambda: hand_at(sim.position("parcel")), speed=0.2)
        yield from arm.grip(1.0, duration_s=0.5)
        goal = sim.position("container") + (CONTAINER_FLOOR_M + PARCEL_HALF_M[2]) * UP
        yield from self.carry(arm, "parcel", options("left", goal, CONTAINER_SLACK_M))
        yield from self.back_off(arm, ready)

    def _on_scale(self) -> Array:
        """Where a parcel's middle is when it stands in the middle of the scale."""
        return np.array([*self.sim.position("scale")[:2], SCALE_TOP_M + PARCEL_HALF_M[2]])
