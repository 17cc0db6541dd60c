"""The action expert: from a prefix, noisy actions and a time to a velocity.

Whatever stays the same over the denoising steps (projected prefix keys, masks, rotations) is made once by
`prepare_expert`; `velocity` is then a pure function of tensors with fixed shapes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kuavo_smolvla_ros.policy.network import SmolVLANetwork
from kuavo_smolvla_ros.policy.numerics import (
    attend,
    fold_mask,
    gated_mlp,
    in_single_precision,
    join_heads,
    rope_tables,
    rotate,
    split_heads,
)
from kuavo_smolvla_ros.policy.prefix import KeyValues

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


class ExpertCache(NamedTuple):
    """What every denoising step of one chunk shares.

    `keys` and `values` hold the prefix's own in layers where actions see each other, and the expert's
    projection of them in layers where actions see the prefix only. The two masks and the two rotations belong
    to these kinds.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    self_mask: Tensor
    cross_mask: Tensor
    self_rotation: tuple[Tensor, Tensor]
    cross_rotation: tuple[Tensor, Tensor]


def prepare_expert(network: SmolVLANetwork, prefix: KeyValues, chunk_size: int) -> ExpertCache:
    """Project the prefix for the expert and build masks and rotations for `chunk_size` action tokens."""
    sizes = network.architecture
    head_dim = sizes.text.head_dim
    keys, values = [], []
    for index, layer in enumerate(network.expert.layers):
        key, value = prefix.keys[index], prefix.values[index]
        if not sizes.is_self_attention(index):
            key = split_heads(layer.self_attn.k_proj(join_heads(key)), head_dim)
            value = split_heads(layer.self_attn.v_proj(join_heads(value)), head_dim)
        keys.append(key)
        values.append(value)
    device = prefix.valid.device
    steps = torch.arange(chunk_size, device=device)
    see_prefix = prefix.valid[:, None, None, :]
    earlier = (steps[None, :] <= steps[:, None])[None, None].expand(prefix.valid.shape[0], -1, -1, -1)
    offset = prefix.valid.long().sum(1, keepdim=True)
    return ExpertCache(
        keys=tuple(keys),
        values=tuple(values),
        self_mask=fold_mask(
            torch.cat((see_prefix.expand(-1, -1, chunk_size, -1), earlier), dim=-1),
            sizes.text.heads // sizes.text.kv_heads,
        ),
        cross_mask=see_prefix,
        self_rotation=rope_tables(offset + steps, head_dim),
        cross_rotation=rope_tables(steps[None], head_dim),
    )


def time_embedding(time: Tensor, width: int) -> Tensor:
    """Sine and cosine of (B,) times at geometrically spaced periods, (B, width), in double precision.

    The shortest period is 4 ms of a unit interval: in single precision the phase itself would be off by 1e-4.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    phase = (1.0 / period * 2 * math.pi)[None, :] * time.to(torch.float64)[:, None]
    return torch.cat((torch.sin(phase), torch.cos(phase)), dim=1)


def embed_actions(network: SmolVLANetwork, actions: Tensor, time: Tensor) -> Tensor:
    """Noisy actions (B, C, padded width) and times (B,) to expert tokens (B, C, expert width)."""
    embedded = network.action_in_proj(actions)
    moment = time_embedding(time, embedded.shape[-1]).to(embedded.dtype)
    joined = torch.cat((embedded, moment[:, None].expand_as(embedded)), dim=-1)
    return network.action_time_mlp_out(F.silu(network.action_time_mlp_in(joined)))


def run_expert(network: SmolVLANetwork, cache: ExpertCache, tokens: Tensor) -> Tensor:
    """All expert layers and the final norm over (B, C, expert width)."""
    sizes = network.architecture
    head_dim = sizes.text.head_dim
    hidden = tokens.to(torch.float32)
    for index, layer in enumerate(network.expert.layers):
        inner = layer.input_layernorm(hidden)
        attention = layer.self_attn
        queries = split_heads(attention.q_proj(inner), head_dim)
        keys, values = cache.keys[index], cache.values[index]
        if sizes.is_self_attention(index):
            own = rotate(split_heads(attention.k_proj(inner), head_dim), cache.self_rotation)
            keys = torch.cat((keys, own), dim=2)
            values = torch.cat((values, split_heads(attention.v_proj(inner), head_dim)), dim=2)
            out = attend(rotate(queries, cache.self_rotation), keys, values, cache.self_mask)
        else:
            out = attend(rotate(queries, cache.cross_rotation), keys, values, cache.cross_mask)
        hidden = gated_mlp(layer, hidden + attention.o_proj(join_heads(out)))
    return network.expert.norm(hidden)


def velocity(network: SmolVLANetwork, cache: ExpertCache, actions: Tensor, time: Tensor) -> Tensor:
    """d(actions)/d(time) at noisy actions (B, C, padded width) and times (B,); time 1 is noise, 0 is data."""
    tokens = embed_actions(network, actions, time)
    return in_single_precision(network.action_out_proj, run_expert(network, cache, tokens))
