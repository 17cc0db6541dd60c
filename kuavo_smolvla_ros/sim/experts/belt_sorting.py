"""Expert for task 1: meet the part on the belt, carry it to marker 1, and from there with the other arm
to marker 2."""

from __future__ import annotations

import mink
import numpy as np

from kuavo_smolvla_ros.sim.expert import ARM_LAG_S, Arm, Array, Expert, Script, along_hand
from kuavo_smolvla_ros.sim.experts.reach import bearing, distance, options, reachable_x
from kuavo_smolvla_ros.sim.ik import UP, hand_pose
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks.belt_sorting import BELT_SPEED_M_S, REST_HEIGHT_M, TABLE_TOP_M

REACH_M = 0.64
LOOK_AHEAD_S = 0.1 + ARM_LAG_S
"""An action ends 0.1 s from now, and the arm is where it was told one lag later."""
BELT_VELOCITY = np.array([-BELT_SPEED_M_S, 0.0, 0.0])
APPROACH_S = 0.9
DROP_SLACK_M = 0.02
"""How far from a marker's middle a part is set down where the middle is a long reach."""


class BeltSortingExpert(Expert):
    def __init__(self, sim: Simulation, seed: int) -> None:
        super().__init__(sim, seed)
        self.handed_over = False
        self.grasp_height = {"left": self.rng.uniform(-0.01, 0.02), "right": self.rng.uniform(0.02, 0.05)}
        self.approach_offset = self.rng.uniform(-1, 1, size=3) * self.style.wobble_m * (1 - UP)

    def left(self, arm: Arm) -> Script:
        sim, style = self.sim, self.style
        rest = arm.target

        def part_soon() -> Array:
            return sim.position("part") + BELT_VELOCITY * LOOK_AHEAD_S

        height = sim.position("part")[2] + self.grasp_height["left"]
        y = sim.position("part")[1]
        meeting = np.array([reachable_x("left", y, height, REACH_M), y, sim.position("part")[2]])
        yaw = bearing("left", meeting) + style.hand_yaw_rad

        def hand_at(place: Array) -> mink.SE3:
            above = place + self.grasp_height["left"] * UP
            return hand_pose("left", above, yaw, style.hand_pitch_rad)

        wait = along_hand(hand_at(meeting + self.approach_offset), -style.approach_m)
        yield from arm.move(wait)
        yield from self.wait_for(lambda: part_soon()[0] - APPROACH_S * BELT_SPEED_M_S <= meeting[0])
        yield from arm.move(lambda: hand_at(part_soon()), duration_s=APPROACH_S)
        yield from arm.grip(1.0, goal=lambda: hand_at(part_soon()), duration_s=0.4)
        drop = self._drop_place()
        yield from self.carry(arm, "part", options("left", drop, 0.0, style.hand_yaw_rad))
        yield from arm.move(along_hand(arm.target, -0.1), speed=0.5)
        self.handed_over = True
        yield from arm.move(rest, arc_m=0.03)

    def right(self, arm: Arm) -> Script:
        sim, style = self.sim, self.style
        rest = arm.target

        def hand_at(place: Array) -> mink.SE3:
            above = place + self.grasp_height["right"] * UP
            return hand_pose(
                "right", above, bearing("right", place) - style.hand_yaw_rad, style.hand_pitch_rad
            )

        yield from self.wait_for(lambda: sim.position("part")[1] < 0.3)
        yield from arm.move(along_hand(hand_at(self._drop_place()), -0.2))
        yield from self.wait_for(lambda: self.handed_over)
        yield from arm.move(lambda: along_hand(hand_at(sim.position("part")), -0.5 * style.approach_m))
        yield from arm.move(lambda: hand_at(sim.position("part")), speed=0.2)
        yield from arm.grip(1.0, duration_s=0.4)
        goal = sim.position("marker2") + REST_HEIGHT_M * UP
        yield from self.carry(arm, "part", options("right", goal, DROP_SLACK_M, -style.hand_yaw_rad))
        yield from self.back_off(arm, rest)

    def _drop_place(self) -> Array:
        """On marker 1, or a little this side of it where the right arm would have to stretch."""
        marker = np.array([*self.sim.position("marker1")[:2], TABLE_TOP_M + REST_HEIGHT_M])
        places = [place for place, _ in options("right", marker, DROP_SLACK_M)]
        return next((place for place in places if distance("right", place) <= REACH_M), places[-1])
