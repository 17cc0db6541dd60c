"""Task 3: bottles lie on the right of the table; each goes from hand to hand into the target square, label
up.

A bottle is never stood on its foot. As in the contest, what must point up is its label (-y of its frame), and
it counts at the height of one that lies flat. Three bottles lie in a row: two show their back and have to be
turned over on the way; the third, the front bottle, shows its label already. The contest ends a round with
success as soon as the front bottle lies in the square, whatever else lies there, so it must come last. Here
that reads: the front bottle earns nothing while one of the others is not in the square, and success takes all
of them.

At the easy level there is one bottle, with its back up, in the middle of the row; it starts in the middle
third of its range, its label may be 10 degrees off (contest: 5), and it earns the 90 points that three
bottles share in the contest.
"""

from __future__ import annotations

from collections.abc import Mapping

import mujoco
import numpy as np

from kuavo_smolvla_ros.sim import scene
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Level, Task, TimeBonus, draw, tilt_rad

TABLE_TOP_M = 0.67
SQUARE_CENTRE = (0.32, 0.4)
SQUARE_HALF_M = 0.18
BOTTLE_HALF_M = (0.028, 0.018, 0.065)
"""Half width, thickness and length of a bottle's body: x, y and z of its frame, the cap at +z, the label at
-y.
"""
CAP_RADIUS_M, CAP_HALF_M = 0.013, 0.014
BOTTLE_MASS_KG = 0.06
REST_HEIGHT_M = TABLE_TOP_M + BOTTLE_HALF_M[1]

BACKS = ("back_bottle_1", "back_bottle_2")
FRONT = "front_bottle"
BOTTLES = {Level.EASY: BACKS[:1], Level.CONTEST: (*BACKS, FRONT)}
START_X_M = (0.23, 0.28)
START_Y_M = ((-0.30, -0.27), (-0.17, -0.15), (-0.42, -0.40))
"""The row's places: the middle one first, because the easy level uses only that."""

HEIGHTS_M = {Level.EASY: (0.68, 0.70), Level.CONTEST: (0.685, 0.693)}
LABEL_UP_RAD = {Level.EASY: np.deg2rad(10.0), Level.CONTEST: np.deg2rad(5.0)}
POINTS = {
    Level.EASY: {BACKS[0]: (30.0, 60.0)},
    Level.CONTEST: {BACKS[0]: (10.0, 25.0), BACKS[1]: (10.0, 25.0), FRONT: (10.0, 10.0)},
}
"""Per bottle: for lying in the square, and for lying there with the label up."""
TIME_LIMIT_S = {Level.EASY: 20.0, Level.CONTEST: 60.0}

# The cap points away from the robot; the label down or up (w, x, y, z).
BACK_UP, LABEL_UP = (0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5)
GREEN, CAP_WHITE, PAPER, PRINT = (
    [0.2, 0.55, 0.4, 1],
    [0.9, 0.9, 0.88, 1],
    [0.96, 0.95, 0.9, 1],
    [0.75, 0.2, 0.3, 1],
)


class BottleRighting(Task):
    number = 3
    name = "task3_placement"
    instruction = (
        "Pick up a bottle from the cluttered daily chemical bottles, transfer it to the other hand, "
        "and place it in the specified pose with the label facing up"
    )
    time_bonus = TimeBonus(full=10.0, until_s=30.0, loss_per_s=1.0)

    def __init__(self, level: Level = Level.EASY) -> None:
        super().__init__(level)
        self.time_limit_s = TIME_LIMIT_S[self.level]

    @property
    def bottles(self) -> tuple[str, ...]:
        """The bodies of this level, in the order in which they have to be placed."""
        return BOTTLES[self.level]

    def build(self, spec: mujoco.MjSpec) -> None:
        scene.add_table(spec, "table", (0.5, 0.0, TABLE_TOP_M - 0.02), (0.40, 0.8, 0.02))
        scene.add_marker(spec, "square", 2 * SQUARE_HALF_M, [0.15, 0.25, 0.8, 1])
        for name in self.bottles:
            _add_bottle(spec, name)

    def place(self, sim: Simulation, rng: np.random.Generator) -> None:
        sim.put_fixture("square", [*SQUARE_CENTRE, TABLE_TOP_M])
        places = rng.permutation(len(self.bottles))
        for name, place in zip(self.bottles, places, strict=True):
            x, y = draw(rng, *START_X_M, self.level), draw(rng, *START_Y_M[place], self.level)
            sim.put_loose(name, [x, y, REST_HEIGHT_M], quat=LABEL_UP if name == FRONT else BACK_UP)

    def points(self, sim: Simulation) -> dict[str, float]:
        low, high = HEIGHTS_M[self.level]
        inside: dict[str, bool] = {}
        earned: dict[str, float] = {}
        for name, (position_points, label_points) in POINTS[self.level].items():
            at = sim.position(name)
            off = np.abs(at[:2] - SQUARE_CENTRE).max()
            inside[name] = bool(off <= SQUARE_HALF_M and low <= at[2] <= high)
            counts = all(inside.values()) if name == FRONT else inside[name]
            label_up = tilt_rad(-sim.rotation(name), axis=1) <= LABEL_UP_RAD[self.level]
            earned[f"{name}_position"] = position_points * counts
            earned[f"{name}_label"] = label_points * (counts and label_up)
        return earned

    def succeeded(self, sim: Simulation, best: Mapping[str, float]) -> bool:
        """Every bottle now lies in the square, label up, and no hand touches one."""
        return min(self.points(sim).values()) > 0 and all(
            not sim.held(name) and sim.speed(name) < 0.02 for name in self.bottles
        )


def _add_bottle(spec: mujoco.MjSpec, name: str) -> None:
    half_width, half_thickness, half_length = BOTTLE_HALF_M
    bottle = scene.add_loose(spec, name)
    bottle.add_geom(
        name=name,
        type=scene.BOX,
        size=list(BOTTLE_HALF_M),
        mass=0.9 * BOTTLE_MASS_KG,
        rgba=GREEN,
        friction=scene.SURFACE_FRICTION,
        **scene.SOLID,
    )
    bottle.add_geom(
        name=f"{name}_cap",
        type=scene.CYLINDER,
        pos=[0, 0, half_length + CAP_HALF_M],
        size=[CAP_RADIUS_M, CAP_HALF_M, 0],
        mass=0.1 * BOTTLE_MASS_KG,
        rgba=CAP_WHITE,
        friction=scene.SURFACE_FRICTION,
        **scene.SOLID,
    )
    for size, along, rgba in (
        ([0.85 * half_width, 0.0004, 0.75 * half_length], 0.0, PAPER),
        ([0.65 * half_width, 0.0006, 0.16 * half_length], 0.4 * half_length, PRINT),
        ([0.65 * half_width, 0.0006, 0.05 * half_length], 0.0, PRINT),
        ([0.65 * half_width, 0.0006, 0.05 * half_length], -0.25 * half_length, PRINT),
    ):
        bottle.add_geom(type=scene.BOX, pos=[0, -half_thickness, along], size=size, rgba=rgba, **scene.SHOWN)
