"""Task 1: the left arm takes a part from the moving belt and sets it on the first marker; the right arm
moves it to the second."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mujoco
import numpy as np

from kuavo_smolvla_ros.sim import scene
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Level, Task, TimeBonus, draw, tilt_rad

TABLE_TOP_M = 0.87
BELT_TOP_M = 0.87
BELT_SPEED_M_S = 0.1
PART_RADIUS_M = 0.0235
PART_HALF_HEIGHT_M = 0.08
FOOT_SIDE_M = 0.12
FOOT_THICKNESS_M = 0.008
REST_HEIGHT_M = FOOT_THICKNESS_M + PART_HALF_HEIGHT_M
"""From the surface it stands on to the middle of the cylinder."""

MARKER_SIDE_M = 0.07
UPRIGHT_RAD = math.radians(10.0)
HEIGHTS_M = {"zone1": (0.9, 0.965), "zone2": (0.95, 0.965)}
TOLERANCE_M = {Level.EASY: 0.06, Level.CONTEST: 0.045}
POSITION_POINTS, UPRIGHT_POINTS = 30.0, 10.0


class BeltSorting(Task):
    number = 1
    name = "task1_moving_grasp"
    instruction = (
        "Pick up the moving object from the conveyor belt, place it on the table, "
        "and push it to the designated area"
    )
    time_limit_s = 25.0
    time_bonus = TimeBonus(full=20.0, until_s=13.0, loss_per_s=2.0)

    def build(self, spec: mujoco.MjSpec) -> None:
        scene.add_table(spec, "table", (0.62, -0.6, TABLE_TOP_M - 0.02), (0.40, 0.8, 0.02))
        scene.add_belt(
            spec, "belt", (0.75, 0.7, BELT_TOP_M - 0.02), (0.75, 0.3, 0.02), (-BELT_SPEED_M_S, 0.0, 0.0)
        )
        scene.add_marker(spec, "marker1", MARKER_SIDE_M, [0.85, 0.2, 0.2, 1])
        scene.add_marker(spec, "marker2", MARKER_SIDE_M, [0.2, 0.35, 0.85, 1])
        part = scene.add_loose(spec, "part")
        part.add_geom(
            name="part",
            type=scene.CYLINDER,
            size=[PART_RADIUS_M, PART_HALF_HEIGHT_M, 0],
            mass=0.012,
            rgba=[0.95, 0.75, 0.15, 1],
            friction=scene.SURFACE_FRICTION,
            **scene.SOLID,
        )
        part.add_geom(
            name="part_foot",
            type=scene.BOX,
            pos=[0, 0, -PART_HALF_HEIGHT_M - FOOT_THICKNESS_M / 2],
            size=[FOOT_SIDE_M / 2, FOOT_SIDE_M / 2, FOOT_THICKNESS_M / 2],
            mass=0.008,
            rgba=[0.9, 0.65, 0.1, 1],
            friction=scene.SURFACE_FRICTION,
            **scene.SOLID,
        )

    def place(self, sim: Simulation, rng: np.random.Generator) -> None:
        level = self.level
        x, y = draw(rng, 0.7, 0.9, level), draw(rng, 0.45, 0.65, level)
        sim.put_loose("part", [x, y, BELT_TOP_M + REST_HEIGHT_M], yaw_rad=draw(rng, -0.3, 0.3, level))
        marker1 = [draw(rng, 0.36, 0.52, level), draw(rng, -0.05, 0.08, level), TABLE_TOP_M]
        marker2 = [draw(rng, 0.35, 0.54, level), draw(rng, -0.56, -0.36, level), TABLE_TOP_M]
        sim.put_fixture("marker1", marker1)
        sim.put_fixture("marker2", marker2)

    def points(self, sim: Simulation) -> dict[str, float]:
        at, upright = sim.position("part"), tilt_rad(sim.rotation("part")) <= UPRIGHT_RAD
        earned: dict[str, float] = {}
        for zone, marker in (("zone1", "marker1"), ("zone2", "marker2")):
            low, high = HEIGHTS_M[zone]
            off = float(np.abs(at[:2] - sim.position(marker)[:2]).max())
            inside = bool(off <= TOLERANCE_M[self.level] and low <= at[2] <= high)
            earned[f"{zone}_position"] = POSITION_POINTS * inside
            earned[f"{zone}_upright"] = UPRIGHT_POINTS * (inside and upright)
        return earned

    def succeeded(self, sim: Simulation, best: Mapping[str, float]) -> bool:
        """Both zones in full, and the part now stands free on the second marker."""
        now = self.points(sim)
        return (
            min(best["zone1_upright"], best["zone2_upright"], now["zone2_upright"]) > 0
            and not sim.held("part")
            and sim.speed("part") < 0.02
        )
