"""Task 4: walk to the rack ahead, take an item, turn round, set it into its bin on the rack behind; twice.

The robot starts between two racks. On the one ahead, items stand in a sloping trough: the right hand takes
item 1, which goes to bin A; the left hand takes item 2, which goes to bin B. At each rack there is a place to
stand: 0.30 m beside the item or bin, so that it is across from the hand that works.

The base follows pose commands on slides at the walking speeds of the robot's interface; legs, gait and the
sway of walking are not simulated, and the rack's posts and top boards are only to look at. The bins stand
still.

The contest counts the four stops in order. Here points depend on the present state alone, and the items tell
the order: the first stop counts while item 1 is in the trough, the second once it has left the trough, and so
on; so whoever walks on without the item earns no more stops. The item's part is earned by lying in the bin.

At the easy level there are one item and one bin, in the middle third of their ranges; a stop may be 4 cm off
ahead and 10 cm sideways (contest: 2 and 7.5), and stops and item share the 90 points that the contest gives
for two of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from kuavo_smolvla_ros.sim import scene
from kuavo_smolvla_ros.sim.simulation import Array, Simulation
from kuavo_smolvla_ros.sim.task import Level, Task, TimeBonus, draw

RACK_X_M = 1.7
RACK_HALF_M = (0.55, 1.0, 0.01)
BOARD_Z_M = (0.25, 0.75, 1.6)
LIP_HALF_M = 0.02
SLOPE_RAD = 0.05
"""The rack ahead slopes towards the robot."""
TROUGH_X_M, TROUGH_Z_M = 1.33, 0.75
TROUGH_HALF_M = (0.16, 0.90)
TROUGH_RIM_M = 0.08
BIN_X_M, BIN_Z_M = -1.35, 0.765
BIN_HALF_M = (0.14, 0.12)
BIN_RIM_M = 0.10
SHEET_HALF_M = 0.005
ITEM_HALF_M = (0.08, 0.02, 0.08)
ITEM_MASS_KG = 0.15

BESIDE_M = 0.30
"""How far beside the item or bin the robot stands."""
STOP_X_M = {"pick": 0.85, "place": -0.82}
STOP_TOLERANCE_M = {Level.EASY: (0.04, 0.10), Level.CONTEST: (0.02, 0.075)}
IN_BIN_M = (0.12, 0.14)
IN_BIN_HEIGHTS_M = (0.76, 0.90)
POINTS = {Level.EASY: (20.0, 50.0), Level.CONTEST: (10.0, 25.0)}
"""For each stop and for each item."""
TIME_LIMIT_S = {Level.EASY: 40.0, Level.CONTEST: 100.0}
WHITE, BLACK = (0.95, 0.95, 0.93, 1.0), (0.12, 0.12, 0.13, 1.0)
BLUE, BOARD = [0.2, 0.5, 0.9, 1], [0.88, 0.88, 0.86, 1]


@dataclass(frozen=True)
class Errand:
    """One item, where it goes, and the hand it is meant for."""

    item: str
    bin: str
    side: str
    item_y_m: tuple[float, float]
    bin_y_m: tuple[float, float]
    rgba: tuple[float, ...]

    @property
    def beside(self) -> float:
        """Sideways from the item to the place to stand at the rack ahead; at the one behind it is the
        opposite.
        """
        return BESIDE_M if self.side == "right" else -BESIDE_M


FIRST = Errand("item1", "bin_a", "right", (-0.6, -0.1), (0.15, 0.6), WHITE)
SECOND = Errand("item2", "bin_b", "left", (0.1, 0.6), (-0.6, -0.15), BLACK)


class ShelfTransport(Task):
    number = 4
    name = "task4_sorting"
    instruction = (
        "Move from the starting point to the rack, pick up the workpiece, turn around, "
        "move to the placement rack, and place it in the designated position"
    )
    time_bonus = TimeBonus(full=10.0, until_s=65.0, loss_per_s=1.0)
    head_pitch_rad = math.radians(5.0)
    mobile = True

    def __init__(self, level: Level = Level.EASY) -> None:
        super().__init__(level)
        self.time_limit_s = TIME_LIMIT_S[self.level]

    @property
    def errands(self) -> tuple[Errand, ...]:
        return (FIRST,) if self.level is Level.EASY else (FIRST, SECOND)

    def build(self, spec: mujoco.MjSpec) -> None:
        _add_rack(spec, "rack_ahead", RACK_X_M, SLOPE_RAD)
        _add_rack(spec, "rack_behind", -RACK_X_M, 0.0)
        trough = spec.worldbody.add_body(
            name="trough", pos=[TROUGH_X_M, 0, TROUGH_Z_M], quat=_sloping(SLOPE_RAD)
        )
        _add_tray(trough, "trough", TROUGH_HALF_M, TROUGH_RIM_M)
        for errand in self.errands:
            _add_tray(scene.add_fixture(spec, errand.bin), errand.bin, BIN_HALF_M, BIN_RIM_M)
            scene.add_loose(spec, errand.item).add_geom(
                name=errand.item,
                type=scene.BOX,
                size=list(ITEM_HALF_M),
                mass=ITEM_MASS_KG,
                rgba=list(errand.rgba),
                friction=scene.SURFACE_FRICTION,
                **scene.SOLID,
            )
        for x in STOP_X_M.values():
            _add_floor_frame(spec, math.copysign(0.725, x))

    def place(self, sim: Simulation, rng: np.random.Generator) -> None:
        for errand in self.errands:
            x, y = draw(rng, 1.28, 1.38, self.level), draw(rng, *errand.item_y_m, self.level)
            height = SHEET_HALF_M + ITEM_HALF_M[2]
            z = TROUGH_Z_M + SLOPE_RAD * (x - TROUGH_X_M) + height
            sim.put_loose(errand.item, [x, y, z], quat=_sloping(SLOPE_RAD))
            sim.put_fixture(errand.bin, [BIN_X_M, draw(rng, *errand.bin_y_m, self.level), BIN_Z_M])

    def stop(self, sim: Simulation, errand: Errand, which: str) -> tuple[float, float]:
        """Where the robot shall stand to "pick" or to "place"; at the rack behind it faces the other way."""
        if which == "pick":
            return STOP_X_M[which], float(sim.position(errand.item)[1]) + errand.beside
        return STOP_X_M[which], float(sim.position(errand.bin)[1]) - errand.beside

    def points(self, sim: Simulation) -> dict[str, float]:
        stop_points, item_points = POINTS[self.level]
        base = sim.base_pose()
        earned: dict[str, float] = {}
        items_before_are_gone = True
        for errand in self.errands:
            in_trough = _in_trough(sim.position(errand.item))
            at_pick, at_place = (self._stands_at(sim, base, errand, which) for which in ("pick", "place"))
            earned[f"{errand.item}_pick_stop"] = stop_points * (
                at_pick and in_trough and items_before_are_gone
            )
            earned[f"{errand.item}_place_stop"] = stop_points * (at_place and not in_trough)
            earned[f"{errand.item}_in_bin"] = item_points * _in_bin(sim, errand)
            items_before_are_gone = not in_trough
        return earned

    def _stands_at(self, sim: Simulation, base: Array, errand: Errand, which: str) -> bool:
        off = np.abs(base[:2] - self.stop(sim, errand, which))
        return bool(np.all(off <= STOP_TOLERANCE_M[self.level]))

    def succeeded(self, sim: Simulation, best: Mapping[str, float]) -> bool:
        """Every item now lies in its bin and no hand touches it."""
        return all(
            _in_bin(sim, errand) and not sim.held(errand.item) and sim.speed(errand.item) < 0.02
            for errand in self.errands
        )


def _in_trough(at: Array) -> bool:
    """Whether an item is at the rack ahead, in the trough or in a hand above it."""
    return bool(abs(at[0] - TROUGH_X_M) <= TROUGH_HALF_M[0] and at[2] > TROUGH_Z_M)


def _in_bin(sim: Simulation, errand: Errand) -> bool:
    at = sim.position(errand.item)
    off = np.abs(at[:2] - sim.position(errand.bin)[:2])
    low, high = IN_BIN_HEIGHTS_M
    return bool(np.all(off <= IN_BIN_M) and low <= at[2] <= high)


def _sloping(slope_rad: float) -> list[float]:
    """The rotation of a board whose far side (+x) is higher."""
    return [math.cos(slope_rad / 2), 0.0, -math.sin(slope_rad / 2), 0.0]


def _add_rack(spec: mujoco.MjSpec, name: str, x: float, slope_rad: float) -> None:
    """Three boards with lips on four posts; only the middle board is within reach and so only that can be
    touched.
    """
    half_x, half_y, half_z = RACK_HALF_M
    for level, z in enumerate(BOARD_Z_M):
        board = spec.worldbody.add_body(name=f"{name}_board{level}", pos=[x, 0, z], quat=_sloping(slope_rad))
        bits = scene.SOLID if level == 1 else scene.SHOWN
        board.add_geom(type=scene.BOX, size=list(RACK_HALF_M), rgba=BOARD, **bits)
        for sign in (-1, 1):
            at = [sign * (half_x - 0.01), 0, half_z + LIP_HALF_M]
            board.add_geom(type=scene.BOX, pos=at, size=[0.01, half_y, LIP_HALF_M], rgba=scene.STEEL, **bits)
    for sx in (-1, 1):
        for sy in (-1, 1):
            spec.worldbody.add_geom(
                type=scene.BOX,
                pos=[x + sx * half_x, sy * half_y, 0.9],
                size=[0.02, 0.02, 0.9],
                rgba=scene.STEEL,
                **scene.SHOWN,
            )


def _add_tray(body: mujoco.MjsBody, name: str, half: tuple[float, float], rim_m: float) -> None:
    """A floor sheet around the body's origin and four walls on it."""
    half_x, half_y = half
    body.add_geom(
        name=name,
        type=scene.BOX,
        size=[half_x, half_y, SHEET_HALF_M],
        rgba=BLUE,
        friction=scene.SURFACE_FRICTION,
        **scene.SOLID,
    )
    for sign in (-1, 1):
        for at, size in (
            ([sign * (half_x + SHEET_HALF_M), 0, rim_m / 2], [SHEET_HALF_M, half_y, rim_m / 2]),
            ([0, sign * (half_y + SHEET_HALF_M), rim_m / 2], [half_x, SHEET_HALF_M, rim_m / 2]),
        ):
            body.add_geom(type=scene.BOX, pos=at, size=size, rgba=BLUE, **scene.SOLID)


def _add_floor_frame(spec: mujoco.MjSpec, x: float) -> None:
    """Yellow tape on the floor around the places to stand in front of a rack."""
    half_x, half_y, tape = 0.275, 0.5, 0.01
    for sign in (-1, 1):
        for at, size in (
            ([x + sign * half_x, 0, 0.001], [tape, half_y, 0.001]),
            ([x, sign * (half_y - tape), 0.001], [half_x, tape, 0.001]),
        ):
            spec.worldbody.add_geom(type=scene.BOX, pos=at, size=size, rgba=[0.9, 0.8, 0.1, 1], **scene.SHOWN)
