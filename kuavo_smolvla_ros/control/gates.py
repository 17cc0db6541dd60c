"""Which values of a chunk are executed at all: a robot that walks is told nothing about its arms, and one
that stands nothing about its base. A value that is not executed must not reach the robot later either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.robot.limits import Limits

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class GatedJoint:
    """A joint that is commanded only while another's value lies above `above` and at most at `at_most`."""

    name: str
    by: str
    above: float
    at_most: float


class Gates:
    """The gates of `names`, for vectors in their order; a joint without one is always executed."""

    def __init__(self, names: Sequence[str], gated: Sequence[GatedJoint]) -> None:
        self.by = np.zeros(len(names), dtype=np.intp)
        self.above, self.at_most = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        self.gated: BoolArray = np.zeros(len(names), dtype=np.bool_)
        for gate in gated:
            if gate.name in names:
                at = names.index(gate.name)
                self.by[at], self.above[at], self.at_most[at] = (
                    names.index(gate.by),
                    gate.above,
                    gate.at_most,
                )
                self.gated[at] = True

    def open(self, values: FloatArray) -> BoolArray:
        """Which of these values are executed; rows are judged each by itself."""
        deciding = values[..., self.by]
        is_open: BoolArray = (deciding > self.above) & (deciding <= self.at_most)
        return is_open

    def executed(self, values: FloatArray, limits: Limits) -> FloatArray:
        """The rows of a chunk with nothing in them that is not executed.

        While its gate is closed a joint keeps its last executed value, and before that its first; so nothing
        is interpolated towards a value that nobody is to reach. A joint that is never executed in this chunk
        is brought into its limits, so that its size is no trouble.
        """
        is_open = self.open(values)
        if is_open.all():
            return values
        rows = np.arange(len(values))[:, None]
        last = np.maximum.accumulate(np.where(is_open, rows, -1), axis=0)
        source = np.where(last >= 0, last, is_open.argmax(axis=0))
        kept = np.take_along_axis(values, source, axis=0)
        never = ~is_open.any(axis=0)
        kept[:, never] = np.clip(values, limits.lower, limits.upper)[:, never]
        return kept
