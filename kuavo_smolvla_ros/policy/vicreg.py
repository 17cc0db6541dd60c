"""VICReg: two views of the same samples should agree, vary from sample to sample, and not repeat themselves.

The convention is that of the published code (facebookresearch/vicreg), with which 25, 25 and 1 were found:

* invariance: mean over samples *and* features of (z1 - z2)^2. (The paper's formula does not divide by the
  features.)
* variance: mean over features of max(0, gamma - sqrt(variance + eps)), averaged over the two views. (The
  paper adds the views, so its 25 is 12.5 of the code's.) The variance is unbiased; eps stands inside the
  root, without which the gradient at zero spread is infinite. It acts on the deviation, not on the variance,
  whose gradient would vanish where it is needed.
* covariance: sum over pairs of different features of their unbiased covariance, squared, divided by the
  number of features; the two views added.

With one rank or several the batch is the same: samples of all ranks are gathered, with gradient. Everything
is computed in at least single precision, outside any autocast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kuavo_smolvla_ros.errors import UsageError

EPS = 1e-4
LAMBDA, MU, NU, GAMMA = 25.0, 25.0, 1.0, 1.0


class VICRegTerms(NamedTuple):
    """The three terms before their weights, and what the covariance term cannot fall below.

    `covariance_floor`: with n samples the covariance matrix has rank n - 1 at most, so features that vary as
    much as these do must have some covariance once there are more than n - 1 of them. A covariance term is
    to be read by its excess over this floor.
    """

    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    covariance_floor: Tensor

    def weighted(self, lambda_param: float, mu_param: float, nu_param: float) -> Tensor:
        return lambda_param * self.invariance + mu_param * self.variance + nu_param * self.covariance


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    lambda_param: float = LAMBDA,
    mu_param: float = MU,
    nu_param: float = NU,
    gamma: float = GAMMA,
) -> Tensor:
    """The loss of two views (n, d) of n samples; all ranks' samples count, n of them together at least 2."""
    return vicreg_terms(z1, z2, gamma).weighted(lambda_param, mu_param, nu_param)


def vicreg_terms(z1: Tensor, z2: Tensor, gamma: float = GAMMA) -> VICRegTerms:
    """The terms of two views (n, d), gathered over all ranks."""
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise UsageError(
            f"VICReg compares two views of the same shape (samples, features), not {tuple(z1.shape)} and "
            f"{tuple(z2.shape)}"
        )
    with torch.autocast(z1.device.type, enabled=False):
        # float64 stays float64: references and gradient checks run in it.
        z1, z2 = (gather_samples(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z1, z2))
        n = z1.shape[0]
        if n < 2:
            raise UsageError(
                "VICReg needs at least 2 samples, because the spread of one is not defined: raise the batch "
                "size (32 or more), or set use_cls_head to false"
            )
        views = [_view_terms(z, gamma) for z in (z1, z2)]
        variance, covariance, floor = (torch.stack(term).sum() for term in zip(*views, strict=True))
        return VICRegTerms((z1 - z2).square().mean(), variance / 2, covariance, floor.detach())


def _view_terms(z: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Variance and covariance term of one view, and the latter's floor."""
    n, d = z.shape
    centred = z - z.mean(0)
    squares = centred.square().sum(0) / (n - 1)
    variance = torch.relu(gamma - torch.sqrt(squares + EPS)).mean()
    matrix = centred.T @ centred / (n - 1)
    diagonal = squares.square().sum()
    covariance = (matrix.square().sum() - diagonal) / d
    # A matrix of rank r with trace t has a squared norm of at least t^2 / r.
    floor = ((squares.sum().square() / min(n - 1, d) - diagonal) / d).clamp_min(0.0)
    return variance, covariance, floor


def gather_samples(x: Tensor) -> Tensor:
    """The rows of all ranks, this rank's gradient included; the input itself where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """All ranks' rows in the order of ranks.

    Each rank's loss depends on every rank's rows, so the gradient of a row is the sum of what all ranks say
    of it; averaged over ranks, as distributed training does, this is the gradient that one process with all
    samples would have.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sizes = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
        counts = [int(size) for size in sizes]
        if len(set(counts)) > 1:
            raise UsageError(
                f"VICReg gathers as many samples from every process, they have {counts}: use batches of one "
                "size (drop the last, shorter one)"
            )
        rows = [torch.empty_like(x) for _ in counts]
        dist.all_gather(rows, x.contiguous())
        ctx.own = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[ctx.own]
