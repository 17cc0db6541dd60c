"""Numbers of the steps since the last look, kept on the device: looking waits for it, adding does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Reading:
    """Means since the last reading, and the first step whose loss or gradient was not finite."""

    loss: float
    grad_norm: float
    loss_sum_by_task: list[float]
    bad_step: int | None
    bad_places: Tensor  # (devices, accumulation, per device): which samples' losses were not finite in it
    # What else the policy has said of itself, by name.
    numbers: dict[str, float] = field(default_factory=dict)


class Meters:
    """Accumulates on one device; `read` brings all devices' numbers together and starts anew."""

    def __init__(self, tasks: int, accumulation: int, per_device: int, device: torch.device) -> None:
        self._sums = torch.zeros(2 + tasks, dtype=torch.float64, device=device)
        self._bad_step = torch.full((), NONE, dtype=torch.int64, device=device)
        self._bad_places = torch.zeros(accumulation, per_device, dtype=torch.bool, device=device)
        self._losses: list[Tensor] = []
        self._numbers: dict[str, Tensor] = {}
        self._parts = 0
        self._steps = 0

    def add_losses(self, losses: Tensor, tasks: Tensor) -> None:
        """One accumulation step: a loss per sample, and the index of the task each belongs to."""
        losses = losses.detach()
        self._losses.append(losses)
        self._sums[2:].index_add_(0, tasks, losses.double())

    def add_numbers(self, numbers: Mapping[str, Tensor]) -> None:
        """What the policy says of one accumulation step beside its loss; always the same names."""
        for name, value in numbers.items():
            self._numbers[name] = self._numbers.get(name, 0.0) + value.detach().double()
        self._parts += 1

    def end_step(self, step: int, grad_norm: Tensor) -> None:
        """One optimizer step is complete."""
        losses = torch.stack(self._losses)
        self._losses = []
        mean = losses.mean()
        self._sums[0] += mean
        self._sums[1] += grad_norm
        bad = ~(torch.isfinite(mean) & torch.isfinite(grad_norm)) & (self._bad_step == NONE)
        self._bad_step = torch.where(bad, step, self._bad_step)
        self._bad_places = torch.where(bad, ~torch.isfinite(losses), self._bad_places)
        self._steps += 1

    def read(self, accelerator: Any) -> Reading:
        """Wait for the device once, and fetch everything."""
        sums = accelerator.gather(self._sums[None]).cpu()
        steps = accelerator.gather(self._bad_step[None]).cpu()
        first = int(steps.min())
        places = (
            accelerator.gather(self._bad_places[None].to(torch.uint8)).cpu().bool()
            & (steps == first)[:, None, None]
        )
        names = sorted(self._numbers)
        means = []
        if names:
            own = torch.stack([self._numbers[name] for name in names]) / self._parts
            means = accelerator.gather(own[None]).mean(0).tolist()
        self._numbers, self._parts = {}, 0
        count = max(self._steps, 1)
        self._sums = torch.zeros_like(self._sums)
        self._steps = 0
        return Reading(
            loss=float(sums[:, 0].mean()) / count,
            grad_norm=float(sums[:, 1].mean()) / count,
            loss_sum_by_task=sums[:, 2:].sum(0).tolist(),
            bad_step=None if first == NONE else first,
            bad_places=places,
            numbers=dict(zip(names, means, strict=True)),
        )
