"""Flow matching: noise and time, the straight line between noise and data, and the Euler walk along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Time is drawn from Beta(1.5, 1), leaning towards noise, and kept off zero.
TIME_EXPONENT = 1.0 / 1.5
TIME_FLOOR = 0.001

Velocity = Callable[[Tensor, Tensor], Tensor]
Guide = Callable[[Tensor, Tensor, float], Tensor]


class FlowSample(NamedTuple):
    """A point on the line from data (time 0) to noise (time 1), and the constant velocity along it."""

    noisy: Tensor
    target: Tensor


def sample_noise(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal noise; with a generator it is drawn on the generator's device, hence the same
    everywhere.
    """
    source = device if generator is None else generator.device
    return torch.randn(shape, dtype=torch.float32, device=source, generator=generator).to(device)


def sample_time(batch: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """(batch,) times; Beta(a, 1) is a power of a uniform number, which needs no check on the host."""
    source = device if generator is None else generator.device
    uniform = torch.rand(batch, dtype=torch.float32, device=source, generator=generator).to(device)
    return uniform**TIME_EXPONENT * (1.0 - TIME_FLOOR) + TIME_FLOOR


def mix(actions: Tensor, noise: Tensor, time: Tensor) -> FlowSample:
    """Where each sample of (B, C, A) is at its time (B,), and where it should go."""
    t = time[:, None, None]
    return FlowSample(noisy=t * noise + (1.0 - t) * actions, target=noise - actions)


def euler(
    velocity: Velocity, noise: Tensor, steps: int, *, guide: Guide | None = None, free: Tensor | None = None
) -> Tensor:
    """Walk from noise at time 1 to data at time 0 in equal steps.

    `guide(velocity, x, time)` may correct each velocity (real-time chunking). `free` (broadcastable to the
    noise) marks the dimensions the network decides; the others, which carry no loss in training, follow the
    straight line to zero on which training has always shown them.
    """
    x = noise
    step = 1.0 / steps
    for index in range(steps):
        now = 1.0 - index * step
        v = velocity(x, torch.full((noise.shape[0],), now, dtype=torch.float32, device=noise.device))
        if guide is not None:
            v = guide(v, x, now)
        if free is not None:
            v = torch.where(free, v, noise)
        x = x - step * v
    return x
