"""The action loss: the mean over what really was demonstrated.

Time steps past an episode's end and dimensions a robot does not have carry no loss, and do not dilute it
either.
"""

from __future__ import annotations

import torch
from torch import Tensor


def valid_entries(step_is_pad: Tensor, dim_is_pad: Tensor) -> Tensor:
    """(B, C) and (B, A) padding masks -> (B, C, A), True where there is a demonstrated value."""
    return ~step_is_pad[:, :, None] & ~dim_is_pad[:, None, :]


def first_values(valid: Tensor, counted: int | None) -> Tensor:
    """Of (B, C, A) valid entries only those of the first `counted` values of an action; None: all."""
    if counted is None:
        return valid
    return valid & (torch.arange(valid.shape[-1], device=valid.device) < counted)


def masked_mean(errors: Tensor, valid: Tensor, reduction: str = "mean") -> Tensor:
    """Mean of (B, C, A) errors over valid entries: one number, or with "none" one per sample.

    A sample without any valid entry contributes nothing (and is 0 under "none").
    """
    errors = torch.where(valid, errors, 0.0)
    if reduction == "mean":
        return errors.sum() / valid.sum().clamp_min(1)
    if reduction == "none":
        return errors.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp_min(1)
    raise ValueError(f"reduction is {reduction!r}; it is 'mean' or 'none'")


def flow_loss(velocity: Tensor, target: Tensor, valid: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error between predicted and true velocity, in single precision, over valid entries."""
    error = (velocity.to(torch.float32) - target.to(torch.float32)).square()
    return masked_mean(error, valid, reduction)
