"""The fast path's computations: the same as in `vision.py`, `prefix.py` and `expert.py`, on packed weights.

Here context and state pass through the text layers together, each denoising step writes its keys behind the
prefix's in one buffer, and everything that depends on shapes and padding alone (`Layout`) is an argument.
Nothing here reads a value back from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kuavo_smolvla_ros.policy.architecture import Architecture
from kuavo_smolvla_ros.policy.numerics import rope_tables
from kuavo_smolvla_ros.policy.sampler_attention import attend_grouped, attend_patches
from kuavo_smolvla_ros.policy.sampler_pack import FastLayer, FastVisionLayer, Pack
from kuavo_smolvla_ros.policy.vision import pixel_shuffle


class Layout(NamedTuple):
    """Masks (additive, or None where everything may be seen) and rotations of one shape and padding.

    Rotations are unit complex numbers (B, L, 1, head width / 2).
    """

    prefix_mask: Tensor | None
    self_mask: Tensor
    cross_mask: Tensor | None
    prefix_turn: Tensor
    self_turn: Tensor
    cross_turn: Tensor


def make_layout(valid: Tensor, chunk: int, sizes: Architecture, dtype: torch.dtype, *, full: bool) -> Layout:
    """For a prefix (B, T) whose last token is the state; `full`: nothing in it is padding."""
    batch, length = valid.shape
    groups = sizes.text.heads // sizes.text.kv_heads
    device = valid.device
    steps = torch.arange(chunk, device=device)
    # The state, last, is seen by itself only.
    seen = valid[:, None, :].expand(-1, length, -1).clone()
    seen[:, :-1, -1] = False
    earlier = (steps[None, :] <= steps[:, None]).expand(batch, -1, -1)
    on_prefix = valid[:, None, :].expand(-1, chunk, -1)
    offset = valid.long().sum(1, keepdim=True)
    head_dim = sizes.text.head_dim
    return Layout(
        prefix_mask=_additive(seen, groups, dtype),
        self_mask=_additive(torch.cat((on_prefix, earlier), dim=2), groups, dtype),
        cross_mask=None if full else _additive(on_prefix, groups, dtype),
        prefix_turn=_turn(valid.long().cumsum(1) - 1, head_dim),
        self_turn=_turn(offset + steps, head_dim),
        cross_turn=_turn(steps[None], head_dim),
    )


def _additive(seen: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, L, T) booleans to (B, 1, groups * L, T) of 0 and -inf, for query heads laid along the length."""
    folded = seen[:, None].expand(-1, groups, -1, -1).flatten(1, 2)[:, None]
    # Rows begin at multiples of 16 elements, as the fused kernels of GPUs want them.
    wide = folded.new_zeros(*folded.shape[:3], -(-folded.shape[3] // 16) * 16, dtype=dtype)
    return wide[..., : folded.shape[3]].masked_fill_(~folded, float("-inf"))


def _turn(positions: Tensor, head_dim: int) -> Tensor:
    cos, sin = rope_tables(positions, head_dim)
    return torch.complex(cos, sin).transpose(1, 2)


def rotated(heads: Tensor, turn: Tensor) -> Tensor:
    """(B, L, H, D), partners side by side, turned in single precision; the result is in single precision."""
    pairs = torch.view_as_complex(heads.to(torch.float32).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


class Buffers(NamedTuple):
    """What the denoising steps read, per expert layer: keys and values (B, key heads, S, D).

    In layers where actions see each other, S is the prefix and, behind it, the chunk.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def make_buffers(
    batch: int, length: int, chunk: int, sizes: Architecture, dtype: torch.dtype, device: torch.device
) -> Buffers:
    def one(index: int) -> Tensor:
        slots = length + chunk if sizes.is_self_attention(index) else length
        return torch.zeros(batch, sizes.text.kv_heads, slots, sizes.text.head_dim, dtype=dtype, device=device)

    layers = range(sizes.text.layers)
    return Buffers(tuple(one(i) for i in layers), tuple(one(i) for i in layers))


class Steps:
    """The three stages on one pack."""

    def __init__(
        self, pack: Pack, sizes: Architecture, dtype: torch.dtype, chunk: int, *, onednn: bool
    ) -> None:
        self.pack, self.sizes, self.dtype, self.chunk = pack, sizes, dtype, chunk
        self.onednn = onednn
        self._eps = torch.tensor(sizes.text.norm_eps)

    # Vision

    def encode(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """(N, 3, height, width) in [-1, 1] and the place of each patch -> (N, tokens, text width), scaled."""
        pack, sizes = self.pack, self.sizes
        patches = F.conv2d(pixels.to(self.dtype), *pack.patch, stride=sizes.vision.patch_size)
        rows, columns = patches.shape[-2:]
        hidden = patches.flatten(2).transpose(1, 2) + pack.positions[ids]
        for layer in pack.vision:
            hidden = self._vision_layer(layer, hidden)
        hidden = _layer_norm(hidden, pack.vision_norm, sizes.vision.norm_eps)
        return pack.connector(pixel_shuffle(hidden, rows, columns, sizes.shuffle))

    def _vision_layer(self, layer: FastVisionLayer, hidden: Tensor) -> Tensor:
        eps, heads = self.sizes.vision.norm_eps, self.sizes.vision.heads
        qkv = layer.qkv(_layer_norm(hidden, layer.norm1, eps)).unflatten(-1, (3, heads, -1))
        hidden = layer.out.plus(attend_patches(*qkv.unbind(2), onednn=self.onednn), hidden)
        return layer.fc2.plus(layer.fc1.gelu(_layer_norm(hidden, layer.norm2, eps)), hidden)

    # Prefix

    def prefix(
        self, images: Tensor, language: Tensor, state: Tensor, layout: Layout, buffers: Buffers
    ) -> list[tuple[Tensor, Tensor]]:
        """Image tokens (B, T, width), token ids and padded state to the buffers' contents.

        Returns each layer's keys and values (B, T, key heads, D) as they are before the expert projects any.
        """
        pack, sizes = self.pack, self.sizes
        words = F.embedding(language, pack.embedding).to(self.dtype) * sizes.text.width**0.5
        hidden = torch.cat((images, words, pack.state(state)[:, None].to(self.dtype)), dim=1)
        length = hidden.shape[1]
        heads, kv_heads = sizes.text.heads, sizes.text.kv_heads
        kept = []
        for index, layer in enumerate(pack.text):
            both = layer.project(self._rms(hidden)).unflatten(-1, (-1, sizes.text.head_dim))
            turned = rotated(both[:, :, :-kv_heads], layout.prefix_turn).to(self.dtype)
            keys, values = turned[:, :, -kv_heads:], both[:, :, -kv_heads:]
            kept.append((keys, values))
            cross = pack.expert[index].cross
            if cross is None:
                own = slice(0, length)
                buffers.keys[index][:, :, own] = keys.transpose(1, 2)
                buffers.values[index][:, :, own] = values.transpose(1, 2)
            else:
                for project, source, target in zip(
                    cross, (keys, values), (buffers.keys[index], buffers.values[index]), strict=True
                ):
                    projected = project(source.flatten(2)).unflatten(-1, (kv_heads, -1))
                    target.copy_(projected.transpose(1, 2))
            if layer.out is not None:
                out = attend_grouped(
                    turned[:, :, :heads], keys.transpose(1, 2), values.transpose(1, 2), layout.prefix_mask
                )
                hidden = self._finish(layer, hidden, out)
        return kept

    # Denoising

    def velocity(self, x: Tensor, moment: Tensor, layout: Layout, buffers: Buffers) -> Tensor:
        """d(actions)/d(time) at noisy actions (B, C, padded width); `moment` is the pack's for the step."""
        pack, sizes = self.pack, self.sizes
        kv_heads, begin = sizes.text.kv_heads, -self.chunk
        hidden = F.silu(F.linear(x, pack.action_in, moment))
        hidden = pack.action_mlp(hidden.to(self.dtype))
        for layer, keys, values in zip(pack.expert, buffers.keys, buffers.values, strict=True):
            both = layer.project(self._rms(hidden)).unflatten(-1, (-1, sizes.text.head_dim))
            if layer.cross is None:
                turned = rotated(both[:, :, :-kv_heads], layout.self_turn)
                keys[:, :, begin:] = turned[:, :, -kv_heads:].transpose(1, 2)
                values[:, :, begin:] = both[:, :, -kv_heads:].transpose(1, 2)
                queries, mask = turned[:, :, :-kv_heads], layout.self_mask
            else:
                queries, mask = rotated(both, layout.cross_turn), layout.cross_mask
            out = attend_grouped(queries.to(self.dtype), keys, values, mask)
            hidden = self._finish(layer, hidden, out)
        return pack.action_out(self._rms(hidden.to(torch.float32)))

    def _finish(self, layer: FastLayer, hidden: Tensor, attended: Tensor) -> Tensor:
        assert layer.out is not None
        assert layer.gated is not None
        assert layer.down is not None
        hidden = layer.out.plus(attended, hidden)
        return layer.down.plus(layer.gated(self._rms(hidden)), hidden)

    def _rms(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], None, self.sizes.text.norm_eps)
        # torch's own is eight calls on a CPU; this is four, and half of its time.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self._eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()


def _layer_norm(x: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, eps)
