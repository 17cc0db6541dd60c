"""Limits of joints as arrays in vector order: what the guard, the simulator and the reports all read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Limits:
    """Position in the vector's units, velocity and acceleration in them per s and s2; `inf` is no bound."""

    names: tuple[str, ...]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]

    def __post_init__(self) -> None:
        for field in ("lower", "upper", "velocity", "acceleration"):
            values = np.asarray(getattr(self, field), dtype=np.float64).copy()
            if values.shape != (len(self.names),):
                raise ValueError(f"limits: {field} has shape {values.shape} for {len(self.names)} joints")
            values.setflags(write=False)
            object.__setattr__(self, field, values)
        if not np.all(self.lower < self.upper):
            worst = self.names[int(np.argmin(self.upper - self.lower))]
            raise ValueError(f"limits: {worst} has lower >= upper")
        if not (np.all(self.velocity > 0) and np.all(self.acceleration > 0)):
            raise ValueError("limits: velocity and acceleration must be above zero")

    def __len__(self) -> int:
        return len(self.names)
