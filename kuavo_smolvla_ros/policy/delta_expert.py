"""The delta expert: from a chunk, what the base saw, and where the robot is now, to a better chunk.

It predicts a displacement: chunk plus displacement is the refined chunk. It reads the frozen keys and values
of pictures and language, of as many text layers as it has layers of its own, and projects none of them: what
the base has computed once serves any number of refinements. State enters through `action_context_encoder`
only, together with the action the chunk has for this moment and the chunk's age, so that a chunk can be
refined again from a later state while the pictures' part stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kuavo_smolvla_ros.policy.cls_masks import make_att_2d_masks_with_cls
from kuavo_smolvla_ros.policy.delta_network import DeltaNetwork
from kuavo_smolvla_ros.policy.expert import time_embedding
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


class Displacement(NamedTuple):
    """What is to be added to the chunk (B, C, A), and the suffix CLS tokens (B, n, width) where asked for."""

    value: Tensor
    cls: Tensor | None


def read_context(network: DeltaNetwork, context: KeyValues) -> KeyValues:
    """The layers of the context that the delta expert reads."""
    return KeyValues(
        tuple(context.keys[i] for i in network.read_layers),
        tuple(context.values[i] for i in network.read_layers),
        context.valid,
    )


def displacement(
    network: DeltaNetwork,
    context: KeyValues,
    chunk: Tensor,
    time: Tensor,
    state: Tensor,
    age: Tensor,
    num_action_context: int | None = None,
) -> Displacement:
    """One look at a chunk (B, C, padded width).

    `context` comes from `read_context`. `time` (B,) is 1 for the base's chunk and falls towards 0 as it is
    refined. `state` (B, padded width) is the robot's now, `age` (B,) how many steps of the chunk have passed
    since it was made. With `num_action_context` the CLS tokens that look at so many last actions are
    computed as well; nothing looks at them, so the displacement is the same.
    """
    sizes = network.architecture.text
    with_cls = num_action_context is not None
    tokens = _embed(network, chunk, time, state, age)
    behind = 0
    if with_cls:
        suffix = network.suf_cls_param.expand(len(chunk), -1, -1)
        tokens, behind = torch.cat((tokens, suffix), dim=1), suffix.shape[1]
    steps, seen = chunk.shape[1], context.valid.shape[1]
    mask = _mask(context.valid, steps, behind, num_action_context or 1)
    offset = context.valid.long().sum(1, keepdim=True)
    positions = offset + torch.arange(steps, device=chunk.device)
    # CLS tokens take no position: they are rotated by none.
    tables = rope_tables(F.pad(positions, (0, behind)), sizes.head_dim)
    folded = fold_mask(mask[:, None, seen:], sizes.heads // sizes.kv_heads)
    hidden = tokens.to(torch.float32)
    for layer, key, value in zip(network.delta_expert.layers, context.keys, context.values, strict=True):
        inner = layer.input_layernorm(hidden)
        attention = layer.self_attn
        own = rotate(split_heads(attention.k_proj(inner), sizes.head_dim), tables)
        keys = torch.cat((key.to(own.dtype), own), dim=2)
        own = split_heads(attention.v_proj(inner), sizes.head_dim)
        values = torch.cat((value.to(own.dtype), own), dim=2)
        queries = rotate(split_heads(attention.q_proj(inner), sizes.head_dim), tables)
        out = attend(queries, keys, values, folded)
        hidden = gated_mlp(layer, hidden + attention.o_proj(join_heads(out)))
    hidden = network.delta_expert.norm(hidden)
    value = in_single_precision(network.delta_action_out_proj, hidden[:, :steps])
    return Displacement(value, hidden[:, steps:] if with_cls else None)


def observe(network: DeltaNetwork, context: KeyValues) -> Tensor:
    """The prefix CLS tokens (B, n, text width) after all text layers; they see pictures and language.

    `context` is the whole one. The text layers are frozen, the tokens' gradient runs through them.
    """
    sizes = network.architecture.text
    tokens = network.pre_cls_param.expand(len(context.valid), -1, -1)
    count = tokens.shape[1]
    present = torch.ones_like(context.valid[:, :1]).expand(-1, count)
    pad = torch.cat((present, context.valid), dim=1)
    mask = make_att_2d_masks_with_cls(pad, torch.zeros_like(pad, dtype=torch.long), count, 0)
    folded = fold_mask(mask[:, None, :count], sizes.heads // sizes.kv_heads)
    hidden = tokens.to(torch.float32)
    for layer, key, value in zip(network.text.layers, context.keys, context.values, strict=True):
        inner = layer.input_layernorm(hidden)
        queries, own_key, own_value = (
            split_heads(project(inner), sizes.head_dim)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        keys = torch.cat((own_key, key.to(own_key.dtype)), dim=2)
        values = torch.cat((own_value, value.to(own_value.dtype)), dim=2)
        out = attend(queries, keys, values, folded)
        hidden = gated_mlp(layer, hidden + layer.self_attn.o_proj(join_heads(out)))
    return network.text.norm(hidden)


def refine(
    network: DeltaNetwork,
    context: KeyValues,
    chunk: Tensor,
    state: Tensor,
    age: Tensor,
    steps: int,
    movable: Tensor,
) -> Tensor:
    """The chunk (B, C, padded width) after so many refinements; only where `movable` is True does it change.

    Each goes its share of what is left of the way: all of it in the last, half of it in the one before.
    """
    for index in range(steps):
        time = torch.full((len(chunk),), 1.0 - index / steps, device=chunk.device)
        delta = displacement(network, context, chunk, time, state, age).value
        chunk = torch.where(movable, chunk + delta / (steps - index), chunk)
    return chunk


def _embed(network: DeltaNetwork, chunk: Tensor, time: Tensor, state: Tensor, age: Tensor) -> Tensor:
    embedded = network.delta_action_in_proj(chunk)
    moment = time_embedding(time, embedded.shape[-1]).to(embedded.dtype)
    joined = torch.cat((embedded, moment[:, None].expand_as(embedded)), dim=-1)
    tokens = network.delta_action_time_mlp_out(F.silu(network.delta_action_time_mlp_in(joined)))
    planned = chunk[torch.arange(len(chunk), device=chunk.device), age]
    share = (age / chunk.shape[1]).to(chunk.dtype)[:, None]
    return tokens + network.action_context_encoder(torch.cat((state, planned, share), dim=-1))[:, None]


def _mask(valid: Tensor, steps: int, behind: int, num_action_context: int) -> Tensor:
    """Over [context | actions | suffix CLS]; all actions see the context and each other."""
    present = torch.ones_like(valid[:, :1]).expand(-1, steps + behind)
    pad = torch.cat((valid, present), dim=1)
    blocks = torch.zeros_like(pad, dtype=torch.long)
    blocks[:, valid.shape[1]] = 1
    return make_att_2d_masks_with_cls(pad, blocks, 0, behind, num_action_context)
