"""Linear layers in the forms the fast path uses: dense, packed for oneDNN, and (`quantized.py`) int8.

A form knows what usually follows a product (an activation, a residual, a gate), so that one that can do it on
the way does so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """x W^T + b, and what follows it."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def gelu(self, x: Tensor) -> Tensor: ...
    def plus(self, x: Tensor, residual: Tensor) -> Tensor: ...


class Gated(Protocol):
    """silu(x Wg^T) * (x Wu^T)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseLinear:
    """torch's own product; on a GPU the right one, because a captured graph costs nothing per call."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x), approximate="tanh")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.bias is not None:
            return self(x) + residual
        rows = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), self.weight.t())
        return rows.view(residual.shape)


class DenseGated:
    """Gate and value in one product."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.both = DenseLinear(torch.cat((gate, up)))

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class OneDnnLinear:
    """Weights laid out once as oneDNN's kernels want them; activations are done in its epilogue.

    These are the operations that torch's own compiler emits for a CPU; calling them needs no compiler on the
    robot. Sums and products with a second tensor are not among them: as an epilogue they make the whole up to
    twice as slow, and small ones ten times.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


class OneDnnGated:
    def __init__(self, gate: Tensor, up: Tensor, rows: int) -> None:
        self.gate, self.up = OneDnnLinear(gate, None, rows), OneDnnLinear(up, None, rows)

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(x).mul_(self.gate.silu(x))


class LinearForms(Protocol):
    """Makes the layers of one network in one form; `rows` is how many vectors usually pass at a time."""

    name: str

    def linear(self, weight: Tensor, bias: Tensor | None, rows: int) -> Linear: ...
    def gated(self, gate: Tensor, up: Tensor, rows: int) -> Gated: ...


class Dense:
    name = "dense"

    def linear(self, weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
        return DenseLinear(weight, bias)

    def gated(self, gate: Tensor, up: Tensor, rows: int) -> Gated:
        return DenseGated(gate, up)


class OneDnn:
    name = "oneDNN"

    def linear(self, weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
        return OneDnnLinear(weight, bias, rows)

    def gated(self, gate: Tensor, up: Tensor, rows: int) -> Gated:
        return OneDnnGated(gate, up, rows)


def why_not_onednn(dtype: torch.dtype) -> str | None:
    """Why oneDNN's packed products cannot be used here, or None; found out by doing one."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    weight, x = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
    try:
        layer = OneDnnLinear(weight, None, 2)
        results = [layer(x), layer.silu(x), layer.gelu(x), layer.plus(x, x)]
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN's packed product does not run ({str(error).splitlines()[0]})"
    expected: list[Callable[[Tensor], Tensor]] = [
        lambda a: a,
        F.silu,
        lambda a: F.gelu(a, approximate="tanh"),
        lambda a: a + a,
    ]
    wrong = any(not torch.allclose(got, f(x), atol=2e-2) for got, f in zip(results, expected, strict=True))
    return "oneDNN's packed product gives wrong results" if wrong else None
