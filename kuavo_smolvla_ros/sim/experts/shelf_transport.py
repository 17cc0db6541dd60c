"""Expert for task 4: unfold the arms; then, per item, walk, pick, step back, turn while walking, and place.

One hand is enough for an item: it pinches the 40 mm side (the jaw opens 85 mm) and the item hangs within 8 cm
of the pads, so friction there carries both its weight and its turning moment. Two hands pressing on the
160 mm side would both have to reach the same item, which stands 0.30 m to one side of the robot.

The base and the arms never move together: while it walks, the arms keep their last targets.
"""

from __future__ import annotations

import math

import mink
import numpy as np

from kuavo_smolvla_ros.sim.expert import ARM_LAG_S, Arm, Array, Expert, Script, along_hand, raised
from kuavo_smolvla_ros.sim.ik import hand_pose
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks.shelf_transport import (
    BIN_Z_M,
    ITEM_HALF_M,
    SHEET_HALF_M,
    STOP_TOLERANCE_M,
    Errand,
    ShelfTransport,
)

CARRY_DEG = {"left": (30, 0, 0, -130, -85, 0, 0), "right": (30, 0, 0, -130, 85, 0, 0)}
"""Elbow beside the waist, hand ahead above the boards."""
HALF_TURN_RAD = 3.14
"""The base takes yaw within +-3.14."""
ARRIVED_M, ARRIVED_RAD = 0.005, 0.01
STOP_MARGIN_M, STOP_TURN_RAD = 0.012, 0.05
"""It stops anywhere that counts, less the margin, and not quite straight: so that a policy which walks less
exactly has seen the hand reach from where it will stand.
"""


class ShelfTransportExpert(Expert):
    def __init__(self, sim: Simulation, seed: int) -> None:
        assert isinstance(sim.task, ShelfTransport)
        super().__init__(sim, seed)
        self.task = sim.task
        rng = self.rng
        self.errands = {errand.side: errand for errand in self.task.errands}
        self.done: set[str] = set()
        self.unfolded: set[str] = set()
        self.pitch = math.radians(rng.uniform(22, 30))
        self.grip_back_m = rng.uniform(0.040, 0.055)
        self.grip_up_m = rng.uniform(0.040, 0.055)
        self.turn = rng.choice([-1.0, 1.0]) * HALF_TURN_RAD
        self.clear_x_m = rng.uniform(0.50, 0.60)
        within = np.array(STOP_TOLERANCE_M[self.task.level]) - STOP_MARGIN_M
        self.stop_offsets = rng.uniform(-1, 1, size=(2, 2, 3)) * [*within, STOP_TURN_RAD]
        self.stop_offsets[1, 0, 2] = 0.0  # from a half turn the base would go on round the other way

    def left(self, arm: Arm) -> Script:
        return self._arm(arm)

    def right(self, arm: Arm) -> Script:
        return self._arm(arm)

    def _arm(self, arm: Arm) -> Script:
        """Both arms that have work unfold together; then each waits for its turn."""
        if arm.side not in self.errands:
            return
        yield from arm.move_joints(np.deg2rad(CARRY_DEG[arm.side]), duration_s=2.0)
        self.unfolded.add(arm.side)
        yield from self.wait_for(lambda: self.unfolded >= set(self.errands))
        if arm.side == "left":
            yield from self.wait_for(lambda: "right" in self.done)
        yield from self._errand(arm, self.errands[arm.side])
        self.done.add(arm.side)

    def _errand(self, arm: Arm, errand: Errand) -> Script:
        number = list(self.errands).index(arm.side)
        carry = arm.target
        x, y, yaw = (*self.task.stop(self.sim, errand, "pick"), 0.0) + self.stop_offsets[number][0]
        if number:
            yield from self._walk(-self.clear_x_m, float(self.sim.base_pose()[1]), self.turn)
        yield from self._walk(x, y, yaw)
        yield from self._pick(arm, errand, carry)
        yield from self._walk(self.clear_x_m, y, 0.0)
        x, y, yaw = (*self.task.stop(self.sim, errand, "place"), self.turn) + self.stop_offsets[number][1]
        yield from self._walk(x, y, math.copysign(min(abs(yaw), HALF_TURN_RAD), yaw))
        yield from self._place(arm, errand, carry)

    def _walk(self, x: float, y: float, yaw: float) -> Script:
        goal = np.array([x, y, yaw])
        self.base_goal = goal

        def arrived() -> bool:
            off = self.sim.base_pose() - goal
            turned = abs(math.remainder(off[2], 2 * math.pi))
            return bool(np.abs(off[:2]).max() < ARRIVED_M and turned < ARRIVED_RAD)

        yield from self.wait_for(arrived)
        self.base_goal = None

    def _seen_from_base(self, position: Array, rotation: Array) -> mink.SE3:
        """A world pose in the frame the arms are told poses in: that of a robot at the origin."""
        x, y, yaw = self.sim.base_pose()
        base = mink.SE3.from_rotation_and_translation(mink.SO3.from_z_radians(yaw), np.array([x, y, 0.0]))
        pose = mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position)
        return base.inverse() @ pose

    def _item(self, errand: Errand) -> mink.SE3:
        return self._seen_from_base(self.sim.position(errand.item), self.sim.rotation(errand.item))

    def _pick(self, arm: Arm, errand: Errand, carry: mink.SE3) -> Script:
        def hand_at() -> mink.SE3:
            offset = np.array([-self.grip_back_m, 0.0, self.grip_up_m])
            return hand_pose(arm.side, self._item(errand).translation() + offset, 0.0, self.pitch)

        yield from arm.move(along_hand(hand_at(), -self.style.approach_m))
        yield from arm.move(hand_at, speed=0.2)
        yield from arm.grip(1.0, duration_s=0.5)
        yield from arm.move(raised(arm.target, 0.12))
        yield from arm.move(carry)

    def _place(self, arm: Arm, errand: Errand, carry: mink.SE3) -> Script:
        bin_at = self._seen_from_base(self.sim.position(errand.bin), np.eye(3)).translation()
        rest_z = BIN_Z_M + SHEET_HALF_M + ITEM_HALF_M[2]
        goal = mink.SE3.from_translation(np.array([*bin_at[:2], rest_z + 0.004]))
        item = self._item(errand)
        hand = self._seen_from_base(*self.sim.pinch(arm.side))
        hand_goal = goal @ item.inverse() @ hand
        yield from arm.move(raised(hand_goal, 0.14))
        yield from arm.hold(ARM_LAG_S)
        yield from arm.move(hand_goal, speed=0.25)
        yield from arm.hold(ARM_LAG_S)
        yield from arm.grip(0.0, duration_s=0.4)
        yield from arm.move(raised(along_hand(arm.target, -0.06), 0.10), speed=0.4)
        yield from arm.move(carry)
