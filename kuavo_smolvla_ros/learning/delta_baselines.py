"""What a delta expert has to be better than: doing nothing, smoothing, a linear map, a small network.

All see what it sees but the pictures: the base's chunk, the state, and which task it is. They learn from the
same samples, and are fitted to the difference between what was demonstrated and the base's chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGES = (1e-3, 1e-1, 1.0, 10.0, 100.0)
WINDOWS = (1, 3, 5, 7)


class Samples(NamedTuple):
    """Normalised, one row per sample; `group` tells episodes apart, `task` counts from 0."""

    chunk: Tensor  # (n, steps, width), the base's
    state: Tensor  # (n, width)
    demonstrated: Tensor  # (n, steps, width)
    valid: Tensor  # (n, steps)
    task: Tensor  # (n,)
    group: Tensor  # (n,)

    def rows(self, chosen: Tensor) -> Samples:
        return Samples(*(value[chosen] for value in self))


Refine = Callable[[Samples], Tensor]


def squared_error(samples: Samples, chunk: Tensor) -> float:
    """Mean over what was demonstrated."""
    errors = (chunk - samples.demonstrated).square()[samples.valid]
    return float(errors.mean())


def zero_residual(samples: Samples) -> Tensor:
    """The base's chunk as it is."""
    return samples.chunk


def fit_smoothing(samples: Samples) -> Refine:
    """A moving average over the chunk's steps, as wide as served the training samples best."""

    def smooth(given: Samples, window: int) -> Tensor:
        padded = F.pad(given.chunk.transpose(1, 2), (window // 2, window // 2), mode="replicate")
        return F.avg_pool1d(padded, window, stride=1).transpose(1, 2)

    best = min(WINDOWS, key=lambda window: squared_error(samples, smooth(samples, window)))
    return lambda given: smooth(given, best)


def fit_linear(samples: Samples, tasks: int) -> Refine:
    """Ridge regression for each step, its strength chosen on a fifth of the episodes."""
    held = samples.group % 5 == 0
    part, rest = samples.rows(~held), samples.rows(held)
    best = min(RIDGES, key=lambda ridge: squared_error(rest, _ridge(part, tasks, ridge)(rest)))
    return _ridge(samples, tasks, best)


def fit_mlp(samples: Samples, tasks: int, *, seed: int = 0, steps: int = 1500, width: int = 256) -> Refine:
    """Two hidden layers; stopped where a fifth of the episodes, kept apart, is served best."""
    torch.manual_seed(seed)
    held = samples.group % 5 == 0
    part, rest = samples.rows(~held), samples.rows(held)
    inputs, outputs = _features(part, tasks).shape[1], samples.chunk[0].numel()
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)

    @torch.no_grad()
    def refine(given: Samples) -> Tensor:
        return given.chunk + net(_features(given, tasks)).view_as(given.chunk)

    best, kept = squared_error(rest, rest.chunk), {n: p.clone() for n, p in net.state_dict().items()}
    for step in range(steps):
        batch = part.rows(torch.randint(len(part.state), (64,)))
        out = batch.chunk + net(_features(batch, tasks)).view_as(batch.chunk)
        loss = (out - batch.demonstrated).square()[batch.valid].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49 and (error := squared_error(rest, refine(rest))) < best:
            best, kept = error, {n: p.clone() for n, p in net.state_dict().items()}
    net.load_state_dict(kept)
    return refine


def _features(samples: Samples, tasks: int) -> Tensor:
    which = F.one_hot(samples.task, tasks).to(samples.chunk.dtype)
    return torch.cat((samples.chunk.flatten(1), samples.state, which), dim=1)


def _ridge(samples: Samples, tasks: int, ridge: float) -> Refine:
    x = _features(samples, tasks).double()
    mean = x.mean(0)
    x = F.pad(x - mean, (0, 1), value=1.0)
    difference = (samples.demonstrated - samples.chunk).double()
    penalty = ridge * torch.eye(x.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0.0
    weights = []
    for step in range(difference.shape[1]):
        rows = samples.valid[:, step]
        a, b = x[rows], difference[rows, step]
        weights.append(torch.linalg.solve(a.T @ a + penalty + 1e-9 * torch.eye(len(penalty)), a.T @ b))
    weight = torch.stack(weights)  # (steps, features, width)

    def refine(given: Samples) -> Tensor:
        own = F.pad(_features(given, tasks).double() - mean, (0, 1), value=1.0)
        return given.chunk + torch.einsum("nf,sfw->nsw", own, weight).to(given.chunk.dtype)

    return refine
