"""How an arm best points at a place: the hand continues the line from the shoulder."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.ik import UP

SHOULDER = {side: np.array(kuavo.ARMS[side][0].offset) + kuavo.STANDING_HEIGHT_M * UP for side in kuavo.SIDES}


def bearing(side: str, place: ArrayLike) -> float:
    """Yaw of the horizontal line from the shoulder to a place."""
    dx, dy, _ = np.asarray(place, dtype=float) - SHOULDER[side]
    return math.atan2(dy, dx)


def distance(side: str, place: ArrayLike) -> float:
    """Metres from the shoulder to a place; an arm reaches about 0.69."""
    return float(np.linalg.norm(np.asarray(place, dtype=float) - SHOULDER[side]))


def reachable_x(side: str, y: float, z: float, reach_m: float) -> float:
    """How far ahead a place at this y and z may be."""
    x0, y0, z0 = SHOULDER[side]
    return x0 + math.sqrt(max(0.0, reach_m**2 - (y - y0) ** 2 - (z - z0) ** 2))


def options(
    side: str, centre: ArrayLike, slack_m: float, yaw_offset_rad: float = 0.0
) -> list[tuple[NDArray[np.float64], float]]:
    """Places in a square of half side `slack_m` with a yaw of the hand there, the most wanted first.

    Wanted is the centre with the hand continuing the line from the shoulder; then places nearer to the
    shoulder, each with the hand turned more and more.
    """
    middle = np.asarray(centre, dtype=float)
    towards = np.clip(SHOULDER[side] - middle, -slack_m, slack_m) * [1, 1, 0]
    shares = np.linspace(0.0, 1.0, 5) if slack_m else [0.0]
    places = [middle + share * towards for share in shares]
    return [
        (place, bearing(side, place) + yaw_offset_rad + np.deg2rad(turn_deg))
        for place in places
        for turn_deg in (0, 10, -10, 20, -20)
    ]
