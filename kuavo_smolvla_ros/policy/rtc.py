"""Real-time chunking: a new chunk that agrees with the one being executed while it was computed.

The guidance is lerobot's: each denoising step is pulled towards the not yet executed rest of the previous
chunk (the prefix), fully for the steps that will have passed when the new chunk arrives (`delay`), then less
and less until the execution horizon. The faults known there are settled here:

* how much of a chunk has been consumed follows from times, not from a latency estimate (`remaining_chunk`),
* a prefix shorter than the delay is continued by holding its last value, never by zeros, which after
  normalisation would be the mean of the data set,
* a delay beyond the horizon is an error, because steps that will be executed would not be guided,
* dimensions the robot does not have are not guided,
* the pull is bounded by the number of denoising steps: above it a step overshoots what it corrects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError

SCHEDULES = ("LINEAR", "EXP", "ONES", "ZEROS")


class RTCError(UserError):
    """A delay, prefix or horizon that cannot be honoured."""


@dataclass(frozen=True)
class Guidance:
    """The correction of a velocity: a `flow.Guide`, whose tensors a captured loop can take over.

    `target` (B, C, A) is the previous chunk, `weights` (broadcastable) how much each entry is pulled to it.
    """

    target: Tensor
    weights: Tensor
    maximum: float

    def __call__(self, velocity: Tensor, x: Tensor, time: float) -> Tensor:
        # lerobot differentiates x - time * v with v held constant, so its correction is this error itself.
        error = (self.target - (x - time * velocity)) * self.weights
        return velocity - guidance_weight(time, self.maximum) * error


@dataclass(frozen=True)
class RTCSettings:
    """How strongly and how far a new chunk follows the previous one; horizon and delays count steps."""

    execution_horizon: int = 10
    max_guidance_weight: float = 10.0
    schedule: str = "LINEAR"

    def __post_init__(self) -> None:
        if self.execution_horizon < 1:
            raise RTCError(f"the execution horizon is {self.execution_horizon} steps; it must be at least 1")
        if not self.max_guidance_weight > 0:
            raise RTCError(f"the maximal guidance weight is {self.max_guidance_weight}; it must be positive")
        if self.schedule not in SCHEDULES:
            raise RTCError(f"the schedule is {self.schedule!r}; it is one of {', '.join(SCHEDULES)}")


def delay_steps(latency_s: float, fps: float) -> int:
    """Steps that will have passed before a chunk asked for now can be executed."""
    if not (math.isfinite(latency_s) and latency_s >= 0):
        raise RTCError(f"a latency of {latency_s} s makes no sense")
    return math.ceil(latency_s * fps - 1e-9)


def remaining_chunk(
    previous: np.ndarray, previous_stamp_ns: int, stamp_ns: int, fps: float
) -> np.ndarray | None:
    """The part of a chunk from `stamp_ns` on, on the new chunk's grid, or None if it is over.

    Row i of `previous` is due at its stamp + i / fps. The new grid need not fall on the old one: values
    between two rows are interpolated.
    """
    begin = (stamp_ns - previous_stamp_ns) * 1e-9 * fps
    if begin < 0:
        raise RTCError("the new observation is older than the one the previous chunk was made from")
    last = len(previous) - 1
    count = math.floor(last - begin + 1e-6) + 1
    if count < 1:
        return None
    at = np.clip(begin + np.arange(count), 0.0, last)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, last)
    share = (at - low)[:, None]
    return (previous[low] * (1.0 - share) + previous[high] * share).astype(previous.dtype)


def prefix_weights(delay: int, horizon: int, total: int, schedule: str) -> Tensor:
    """(total,) weights: 1 up to the delay, then falling as the schedule says, 0 from the horizon on."""
    weights = torch.zeros(total)
    delay = min(delay, horizon)
    if schedule == "ZEROS":
        weights[:delay] = 1.0
        return weights
    if schedule == "ONES":
        weights[:horizon] = 1.0
        return weights
    falling = torch.linspace(1.0, 0.0, min(horizon, total) - delay + 2)[1:-1]
    if schedule == "EXP":
        falling = falling * torch.expm1(falling) / (math.e - 1)
    weights[:delay] = 1.0
    weights[delay : delay + len(falling)] = falling
    return weights


def guidance_weight(time: float, maximum: float) -> float:
    """Strength of the pull at a denoising time in (0, 1]; grows towards both ends, bounded."""
    product = time * (1.0 - time)
    if product <= 0.0:
        return maximum
    return min((time**2 + (1.0 - time) ** 2) / product, maximum)


def hold_to(prefix: Tensor, steps: int) -> Tensor:
    """(B, P, A) made `steps` long: cut, or continued with its last row."""
    if prefix.shape[1] >= steps:
        return prefix[:, :steps]
    return torch.cat((prefix, prefix[:, -1:].expand(-1, steps - prefix.shape[1], -1)), dim=1)


def make_guide(
    prefix: Tensor,
    delay: int,
    settings: RTCSettings,
    *,
    chunk_size: int,
    padded_width: int,
    num_steps: int,
    execution_horizon: int | None = None,
) -> Guidance:
    """The correction of the velocity for a prefix (B, P, A) in normalised units that begins at the new
    chunk's step 0.
    """
    horizon = settings.execution_horizon if execution_horizon is None else execution_horizon
    if prefix.ndim != 3 or prefix.shape[1] < 1:
        raise RTCError(
            f"a prefix is (batch, steps, dimensions) with at least one step, not {tuple(prefix.shape)}"
        )
    if delay < 0:
        raise RTCError(f"the delay is {delay} steps; it cannot be negative")
    if horizon > chunk_size:
        raise RTCError(f"the execution horizon of {horizon} steps is longer than a chunk ({chunk_size})")
    if delay > horizon:
        raise RTCError(
            f"a delay of {delay} steps exceeds the execution horizon of {horizon}: the steps between would "
            f"be executed "
            "without following the previous chunk. Raise rtc_execution_horizon, or make inference faster"
        )
    # Beyond the previous chunk's end there is nothing to agree with, except while the arms hold its last
    # value.
    horizon = min(horizon, max(prefix.shape[1], delay))
    real = prefix.shape[2]
    if real > padded_width:
        raise RTCError(f"the prefix is {real} wide; the network's actions are {padded_width}")
    target = torch.nn.functional.pad(hold_to(prefix, chunk_size), (0, padded_width - real)).to(torch.float32)
    weights = prefix_weights(delay, horizon, chunk_size, settings.schedule).to(prefix.device)[None, :, None]
    weights = weights * (torch.arange(padded_width, device=prefix.device) < real)
    maximum = min(settings.max_guidance_weight, float(num_steps))
    return Guidance(target, weights, maximum)
