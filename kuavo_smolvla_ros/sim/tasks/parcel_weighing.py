"""Task 2: the right arm takes a parcel from the belt to the scale; the left arm takes it from there to
the container."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mujoco
import numpy as np

from kuavo_smolvla_ros.sim import scene
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Level, Task, TimeBonus, draw, tilt_rad

TABLE_TOP_M = 0.87
BELT_TOP_M = 0.82
BELT_SPEED_M_S = 0.1
SCALE_TOP_M = 0.89
SCALE_SIDE_M = 0.14
PARCEL_HALF_M = (0.03, 0.03, 0.07)
CONTAINER_INNER_HALF_M = 0.085
CONTAINER_RIM_M = 0.02
CONTAINER_FLOOR_M = 0.003
UPRIGHT_RAD = math.radians(10.0)
SCALE_TOLERANCE_M = {Level.EASY: 0.07, Level.CONTEST: 0.07}
TARGET_TOLERANCE_M = {Level.EASY: 0.05, Level.CONTEST: 0.035}
SCALE_HEIGHTS_M, TARGET_HEIGHTS_M = (0.85, 1.02), (0.85, 0.98)
POSITION_POINTS, UPRIGHT_POINTS = 30.0, 10.0


class ParcelWeighing(Task):
    number = 2
    name = "task2_weighing"
    instruction = (
        "Pick up the package from the conveyor belt, weigh it on the electronic scale, then pick it up again "
        "and place it in the designated storage container"
    )
    time_limit_s = 25.0
    time_bonus = TimeBonus(full=20.0, until_s=12.0, loss_per_s=2.0)

    def build(self, spec: mujoco.MjSpec) -> None:
        scene.add_table(spec, "table", (0.6, 0.75, TABLE_TOP_M - 0.02), (0.40, 0.8, 0.02))
        # The belt ends at the table's edge, whose side stops a parcel that nobody took.
        scene.add_belt(
            spec, "belt", (0.6, -0.8, BELT_TOP_M - 0.02), (0.3, 0.745, 0.02), (0.0, BELT_SPEED_M_S, 0.0)
        )
        self._add_scale(spec)
        self._add_container(spec)
        parcel = scene.add_loose(spec, "parcel")
        parcel.add_geom(
            name="parcel",
            type=scene.BOX,
            size=list(PARCEL_HALF_M),
            mass=0.1,
            rgba=[0.72, 0.52, 0.3, 1],
            friction=scene.SURFACE_FRICTION,
            **scene.SOLID,
        )
        parcel.add_geom(
            type=scene.BOX,
            pos=[0, 0, PARCEL_HALF_M[2]],
            size=[0.02, 0.015, 0.0005],
            rgba=[0.95, 0.95, 0.92, 1],
            **scene.SHOWN,
        )

    @staticmethod
    def _add_scale(spec: mujoco.MjSpec) -> None:
        body = scene.add_fixture(spec, "scale")
        half_height = (SCALE_TOP_M - TABLE_TOP_M) / 2
        body.add_geom(
            name="scale",
            type=scene.BOX,
            pos=[0, 0, half_height],
            size=[SCALE_SIDE_M / 2, SCALE_SIDE_M / 2, half_height],
            rgba=[0.75, 0.78, 0.82, 1],
            friction=scene.SURFACE_FRICTION,
            **scene.SOLID,
        )
        body.add_geom(
            type=scene.BOX,
            pos=[-SCALE_SIDE_M / 2 - 0.001, 0, half_height],
            size=[0.001, 0.03, 0.006],
            rgba=[0.1, 0.5, 0.2, 1],
            **scene.SHOWN,
        )

    @staticmethod
    def _add_container(spec: mujoco.MjSpec) -> None:
        """A low tray; its rim is lower than the fingers that set the parcel down."""
        body = scene.add_fixture(spec, "container")
        blue, wall, inner = [0.15, 0.4, 0.7, 1], 0.004, CONTAINER_INNER_HALF_M
        body.add_geom(
            name="container_floor",
            type=scene.BOX,
            pos=[0, 0, CONTAINER_FLOOR_M / 2],
            size=[inner, inner, CONTAINER_FLOOR_M / 2],
            rgba=blue,
            friction=scene.SURFACE_FRICTION,
            **scene.SOLID,
        )
        for name, dx, dy in (("front", -1, 0), ("back", 1, 0), ("right", 0, -1), ("left", 0, 1)):
            half = [wall, inner + 2 * wall, CONTAINER_RIM_M / 2] if dx else [inner, wall, CONTAINER_RIM_M / 2]
            body.add_geom(
                name=f"container_{name}",
                type=scene.BOX,
                pos=[dx * (inner + wall), dy * (inner + wall), CONTAINER_RIM_M / 2],
                size=half,
                rgba=blue,
                **scene.SOLID,
            )

    def place(self, sim: Simulation, rng: np.random.Generator) -> None:
        level = self.level
        x, y = draw(rng, 0.35, 0.55, level), draw(rng, -0.8, -0.3, level)
        sim.put_loose("parcel", [x, y, BELT_TOP_M + PARCEL_HALF_M[2]], yaw_rad=draw(rng, -0.2, 0.2, level))
        scale = [draw(rng, 0.30, 0.50, level), draw(rng, 0.05, 0.25, level), TABLE_TOP_M]
        target = [draw(rng, 0.3, 0.5, level), draw(rng, 0.4, 0.7, level), TABLE_TOP_M]
        sim.put_fixture("scale", scale)
        sim.put_fixture("container", target)

    def points(self, sim: Simulation) -> dict[str, float]:
        at, upright = sim.position("parcel"), tilt_rad(sim.rotation("parcel")) <= UPRIGHT_RAD
        earned: dict[str, float] = {}
        for part, fixture, tolerance, (low, high) in (
            ("scale", "scale", SCALE_TOLERANCE_M[self.level], SCALE_HEIGHTS_M),
            ("target", "container", TARGET_TOLERANCE_M[self.level], TARGET_HEIGHTS_M),
        ):
            off = float(np.abs(at[:2] - sim.position(fixture)[:2]).max())
            inside = bool(off <= tolerance and low <= at[2] <= high)
            earned[f"{part}_position"] = POSITION_POINTS * inside
            earned[f"{part}_upright"] = UPRIGHT_POINTS * (inside and upright)
        return earned

    def succeeded(self, sim: Simulation, best: Mapping[str, float]) -> bool:
        """Weighed and delivered upright, and the parcel now stands free in the container."""
        now = self.points(sim)
        return (
            min(best["scale_upright"], best["target_upright"], now["target_upright"]) > 0
            and not sim.held("parcel")
            and sim.speed("parcel") < 0.02
        )
