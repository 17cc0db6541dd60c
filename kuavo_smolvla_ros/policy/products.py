"""Linear layers whose products oneDNN computes where torch's own are slower: in float32 on a CPU.

torch multiplies float32 with a BLAS that does not use the vector width of processors of other makers than its
own; oneDNN reaches twice as much there, forwards and backwards. Modules, parameters and their names are those
of `nn.Linear`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

WORTH_IT = 2**20
"""Multiplications of a product below which the calls cost more than they save."""


class Linear(nn.Linear):
    """`nn.Linear`, by oneDNN where that pays; everywhere else torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if pays(input, self.weight):
            return _Product.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product is to be preferred for these."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= WORTH_IT
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and ONEDNN
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; either may be a transposed view, which oneDNN reads as it stands."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multiplies_right() -> bool:
    """Whether this torch's oneDNN does all three products of a layer; found out by doing them."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, generator=generator) for n in ((8, 16), (4, 16), (4,)))
    gradient = torch.randn(8, 4, generator=generator)
    try:
        pairs = (
            (_product(x, weight, bias), F.linear(x, weight, bias)),
            (_product(gradient, weight.t()), gradient @ weight),
            (_product(gradient.t(), x.t()), gradient.t() @ x),
        )
    except (RuntimeError, AttributeError):
        return False
    return all(torch.allclose(got, expected, atol=1e-4) for got, expected in pairs)


# Found out at once: a first layer may be run by something that only traces.
ONEDNN = multiplies_right()


def _operations(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """What torch's counter of operations does not know of itself."""
    return 2 * math.prod(x) * weight[0]


if ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = for_weight = for_bias = None
        if weight is not None:
            for_x = _product(rows, weight.t()).view(*gradient.shape[:-1], -1)
        if x is not None:
            for_weight = _product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias
