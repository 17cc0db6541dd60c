"""What the simulated robot accepts as a command. A refused command changes nothing: the arm keeps its
last target."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.sim import kuavo

# A target stored as float32 at a limit lands this far outside it; nothing larger is forgiven.
LIMIT_TOLERANCE = 1e-4
ARM_WIDTH = len(kuavo.STATE_NAMES)
MOBILE_WIDTH = ARM_WIDTH + len(kuavo.BASE_NAMES)


class CommandError(UserError):
    """A command that was refused, and why."""


def action_names(mobile: bool) -> tuple[str, ...]:
    return kuavo.STATE_NAMES + kuavo.BASE_NAMES if mobile else kuavo.STATE_NAMES


def action_limits(mobile: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bounds in vector order: rad, gripper 0 open .. 1 closed, base m, m, rad, flag 0..1."""
    lower: list[float] = []
    upper: list[float] = []
    for side in kuavo.SIDES:
        lower += [joint.lower for joint in kuavo.ARMS[side]] + [0.0]
        upper += [joint.upper for joint in kuavo.ARMS[side]] + [1.0]
    if mobile:
        lower += [-bound for bound in kuavo.BASE_RANGE] + [0.0]
        upper += [*kuavo.BASE_RANGE, 1.0]
    return np.array(lower), np.array(upper)


def velocity_limits() -> NDArray[np.float64]:
    """Fastest change of each of the 16 targets, per second; the motors cannot follow more."""
    limits: list[float] = []
    for side in kuavo.SIDES:
        limits += [joint.velocity for joint in kuavo.ARMS[side]] + [kuavo.GRIPPER_VELOCITY_PER_S]
    return np.array(limits)


def check_action(action: ArrayLike, *, mobile: bool) -> NDArray[np.float64]:
    """The action as float64 within limits, or a CommandError naming the joint."""
    names = action_names(mobile)
    try:
        values = np.asarray(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CommandError(f"command refused: not a vector of numbers ({error})") from error
    if values.shape != (len(names),):
        raise CommandError(f"command refused: shape {values.shape}, expected ({len(names)},)")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        joint = int(bad[0])
        raise CommandError(f"command refused: {names[joint]} is {values[joint]}")
    lower, upper = action_limits(mobile)
    excess = np.maximum(lower - values, values - upper)
    worst = int(np.argmax(excess))
    if excess[worst] > LIMIT_TOLERANCE:
        raise CommandError(
            f"command refused: {names[worst]} is {values[worst]:.4f}, "
            f"outside its limits {lower[worst]:.4f} .. {upper[worst]:.4f}"
        )
    return np.clip(values, lower, upper)
