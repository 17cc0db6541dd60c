"""Linear layers with 8-bit weights, for CPUs with 8-bit dot products: fast, and not exact.

Weights are rounded per output channel when the layer is made, activations per call over the range they have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kuavo_smolvla_ros.policy.sampler_linear import Gated, Linear


class Int8Linear:
    """x W^T + b with both factors in 8 bits; the result has the precision of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        weight = weight.to(torch.float32)
        self.scales = (weight.abs().amax(1) / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (weight / self.scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(whole, [rows, weight.shape[1]])
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if bias is None else bias.to(torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return self._product(x, "gelu", "tanh")

    def silu(self, x: Tensor) -> Tensor:
        return self._product(x, "swish")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._product(x, "none") + residual

    def _product(self, x: Tensor, after: str, algorithm: str = "") -> Tensor:
        whole, scale, zero = quantise(x)
        return torch.ops.onednn.qlinear_pointwise(
            whole, scale, zero, self.weight, self.scales, self.zeros, self.bias, 1.0, 0, x.dtype,
            after, [], algorithm,
        )  # fmt: skip


def quantise(x: Tensor) -> tuple[Tensor, float, int]:
    """Unsigned 8-bit numbers that stand for the range of x, always including zero, exactly."""
    lowest, highest = torch.aminmax(x)
    low, high = min(float(lowest), 0.0), max(float(highest), 0.0)
    scale = max((high - low) / 255.0, 1e-12)
    zero = round(-low / scale)
    whole = torch.quantize_per_tensor(x.to(torch.float32), scale, zero, torch.quint8)
    return whole.int_repr(), scale, zero


class Int8Gated:
    def __init__(self, gate: Tensor, up: Tensor, rows: int) -> None:
        self.both = Int8Linear(torch.cat((gate, up)), None, rows)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class Int8:
    name = "int8"

    def linear(self, weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
        return Int8Linear(weight, bias, rows)

    def gated(self, gate: Tensor, up: Tensor, rows: int) -> Gated:
        return Int8Gated(gate, up, rows)


def why_not_int8() -> str | None:
    """Why 8-bit products cannot be used here, or None; found out by doing one."""
    x = torch.linspace(-1.0, 1.0, 64).reshape(2, 32)
    weight = torch.eye(32)
    try:
        wrong = not torch.allclose(Int8Linear(weight, None, 2)(x), x, atol=0.02)
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN's 8-bit product does not run ({str(error).splitlines()[0]})"
    return "oneDNN's 8-bit product gives wrong results" if wrong else None
