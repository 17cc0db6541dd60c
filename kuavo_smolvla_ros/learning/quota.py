"""How many samples of each task stand in each batch: whole numbers whose mix is exactly the shares.

A batch of 64 with shares 0.2 and 0.8 would need 12.8 and 51.2 samples. Every batch gets 12 and 51, and the
one sample left over goes round so that five batches together hold exactly 64 and 256.

The seats left over are dealt by systematic selection: each task owns an arc of a circle as long as its
remainder, and a comb of teeth one apart, turned to another of finitely many places in every batch, picks
the arcs it hits. An arc is shorter than the comb's pitch, so a task gets at most one seat per batch; over
one turn the comb takes every place once, so each task gets exactly its due.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UserError

MAX_PERIOD = 100_000
_GOLDEN = (math.sqrt(5) - 1) / 2
_NEAR = 500


class Quotas:
    """Counts per task for every step, as functions of the step alone."""

    def __init__(self, shares: Sequence[Fraction], batch_size: int) -> None:
        if sum(shares) != 1 or min(shares) < 0:
            raise UserError(f"shares must be at least 0 and sum to 1, they are {[str(s) for s in shares]}")
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} samples cannot be divided among tasks")
        self.batch_size = batch_size
        due = [share * batch_size for share in shares]
        self.period = math.lcm(*(d.denominator for d in due))
        """Every run of this many batches, wherever it begins, holds the shares exactly."""
        if self.period > MAX_PERIOD:
            raise UserError(
                f"the shares {', '.join(f'{float(s):g}' for s in shares)} only come out even after "
                f"{self.period} batches; use rounder numbers"
            )
        whole = np.array([math.floor(d) for d in due], np.int64)
        arcs = np.array([int((d - math.floor(d)) * self.period) for d in due], np.int64)
        ends = np.cumsum(arcs)
        offset = np.arange(self.period, dtype=np.int64)[:, None] * _stride(self.period) % self.period
        teeth_below = -((offset - ends) // self.period)  # teeth at offset, offset + period, ... below an end
        seats = np.diff(teeth_below, axis=1, prepend=-((offset - 0) // self.period))
        self._counts = whole + seats
        self._before = np.concatenate([np.zeros((1, len(due)), np.int64), np.cumsum(self._counts, axis=0)])

    def counts(self, step: int) -> NDArray[np.int64]:
        """Samples of each task in the batch of this step."""
        return self._counts[step % self.period]

    def before(self, step: int) -> NDArray[np.int64]:
        """Samples of each task in all batches before this step."""
        turns, rest = divmod(step, self.period)
        return turns * self._before[-1] + self._before[rest]


def _stride(period: int) -> int:
    """How far the comb turns: visits every place once, and goes round as evenly as a whole number can.

    Most even is the golden section, whose continued fraction has the smallest terms; of the numbers near
    it, the one whose own terms are smallest.
    """
    middle = round(_GOLDEN * period)
    near = range(max(middle - _NEAR, 1), min(middle + _NEAR, period) + 1)
    return min((n for n in near if math.gcd(n, period) == 1), key=lambda n: (_unevenness(n, period), n))


def _unevenness(a: int, b: int) -> int:
    """The sum of the terms of the continued fraction of a / b: bounds how far a task can fall behind."""
    terms = 0
    while a:
        terms, (a, b) = terms + b // a, (b % a, a)
    return terms
