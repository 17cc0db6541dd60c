"""Units on the wire against units of the vector: `wire = vector * scale + offset`, always invertible."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """One linear translation; `vector_unit` says what the vector holds after decoding."""

    name: str
    vector_unit: str
    scale: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.offset)) or self.scale == 0.0:
            raise ValueError(f"unit {self.name}: scale must be finite and not 0, offset finite")

    def to_vector(self, wire: FloatArray) -> FloatArray:
        return (wire - self.offset) / self.scale

    def to_wire(self, vector: FloatArray) -> FloatArray:
        return vector * self.scale + self.offset


# Of a joint that says whether others move (a base that walks): 0 or 1, and 0 on a robot without them.
FLAG = "flag"
VECTOR_UNITS = ("rad", "fraction", "m", FLAG)

UNITS = {
    unit.name: unit
    for unit in (
        Unit("rad", "rad", 1.0),
        Unit("deg", "rad", 180.0 / math.pi),
        Unit("fraction", "fraction", 1.0),
        Unit("percent", "fraction", 100.0),
        Unit("byte", "fraction", 255.0),
        Unit("m", "m", 1.0),
        Unit("mm", "m", 1000.0),
        Unit(FLAG, FLAG, 1.0),
    )
}
