"""The operations that vision, prefix and expert share, in terms of torch alone.

Shapes: B batch, H query heads, K key heads, L queries, T keys, D head width. Masks are boolean, True = may
look.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kuavo_smolvla_ros.policy.network import DecoderLayer

ROPE_WAVELENGTH = 10_000.0


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, L, H*D) -> (B, H, L, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H*D)."""
    return x.transpose(1, 2).flatten(2)


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of shape (B, 1, L, D/2) for integer positions (B, L), in single precision.

    The wavelength is SmolVLA's own 10 000, not the language model's.
    """
    half = head_dim // 2
    exponent = (2.0 / head_dim) * torch.arange(half, dtype=torch.float32, device=positions.device)
    radians = positions.to(torch.float32)[:, None, :, None] / (ROPE_WAVELENGTH**exponent)
    return torch.cos(radians), torch.sin(radians)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, L, D) by the tables, half against half, computed in single precision."""
    cos, sin = tables
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def fold_mask(mask: Tensor, groups: int) -> Tensor:
    """A mask (B, 1, L, T) for `attend` where `groups` query heads share a key head: (B, 1, groups*L, T)."""
    return mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, H, L, D) over (B, K, T, D), H a multiple of K.

    Query heads that share a key head are laid along the length, so that keys are never copied and every
    backend of torch accepts the mask; it is the same for all queries, (B, 1, 1, T), or folded by `fold_mask`.
    """
    batch, heads, length, width = queries.shape
    groups = heads // keys.shape[1]
    folded = queries.reshape(batch, keys.shape[1], groups * length, width)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return out.reshape(batch, heads, length, width)


def gated_mlp(layer: DecoderLayer, hidden: Tensor) -> Tensor:
    """The second half of a decoder layer, residual included."""
    inner = layer.post_attention_layernorm(hidden)
    return hidden + layer.mlp.down_proj(gated(layer.mlp.gate_proj(inner), layer.mlp.up_proj(inner)))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`; for a backward pass only the two factors are kept, not silu's own result."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up)
    return F.silu(gate) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


def in_single_precision(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module outside any autocast: used where rounding would go straight into the result."""
    with torch.autocast(x.device.type, enabled=False):
        return module(x.to(torch.float32))
