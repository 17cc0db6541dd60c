"""The learning rate over one stage: a linear warm-up, then a cosine down to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kuavo_smolvla_ros.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Lengths in optimizer steps; `decay_steps` counts from the first step, the warm-up included."""

    warmup_steps: int
    decay_steps: int
    decay_lr: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise UserError(
                f"schedule.warmup_steps is {self.warmup_steps}; it must be at least 0 and below decay_steps "
                f"({self.decay_steps})"
            )
        if not self.decay_lr >= 0:
            raise UserError(f"schedule.decay_lr is {self.decay_lr}; it must not be negative")

    def for_steps(self, steps: int) -> Schedule:
        """The schedule of a stage of this many steps.

        A shorter stage gets the whole curve, compressed; else it would end at a high rate. A longer one stays
        at the floor.
        """
        if steps < 1:
            raise UserError(f"a stage of {steps} steps has no schedule")
        if steps >= self.decay_steps:
            return self
        return replace(self, warmup_steps=self.warmup_steps * steps // self.decay_steps, decay_steps=steps)

    def factor(self, step: int, peak_lr: float) -> float:
        """What the learning rates are multiplied by at this step (from 0).

        One factor for all parameter groups: the ratio between their rates stays the same, and it is
        `peak_lr`, the rate of the largest group, that ends at `decay_lr`.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        floor = min(self.decay_lr / peak_lr, 1.0)
        progress = min((step - self.warmup_steps) / (self.decay_steps - self.warmup_steps), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
