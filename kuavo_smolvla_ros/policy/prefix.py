"""What the action expert looks at: keys and values of images, language and state in every text layer.

Images and language never look at the state or at the actions, so their part (`Context`) depends on pictures
and sentence alone. It is computed in a pass of its own: with a frozen backbone autograd then records nothing
for it, and it can be kept while only the state changes. The state is one more token that reads the context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kuavo_smolvla_ros.policy.network import DecoderLayer, SmolVLANetwork
from kuavo_smolvla_ros.policy.numerics import (
    attend,
    gated_mlp,
    join_heads,
    rope_tables,
    rotate,
    split_heads,
)
from kuavo_smolvla_ros.policy.vision import encode_images


class KeyValues(NamedTuple):
    """Per text layer rotated keys and values (B, key heads, T, head width), and which of the T tokens are
    real.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    valid: Tensor


def embed_images(network: SmolVLANetwork, pixels: Tensor, position_mode: str = "raster") -> Tensor:
    """(B, cameras, 3, height, width) -> (B, all image tokens, width), camera after camera, scaled."""
    batch, cameras = pixels.shape[:2]
    tokens = encode_images(network, pixels.flatten(0, 1), position_mode)
    return tokens.unflatten(0, (batch, cameras)).flatten(1, 2) * network.architecture.text.width**0.5


def embed_language(network: SmolVLANetwork, tokens: Tensor) -> Tensor:
    """(B, L) token ids -> (B, L, width), scaled."""
    return network.text.embed_tokens(tokens) * network.architecture.text.width**0.5


def context_embeddings(
    network: SmolVLANetwork, images: Tensor, language_tokens: Tensor, language_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Image tokens, then language tokens; with the mask of real ones."""
    language = embed_language(network, language_tokens)
    present = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
    return torch.cat((images, language), dim=1), torch.cat((present, language_mask), dim=1)


def run_context(network: SmolVLANetwork, embeddings: Tensor, valid: Tensor) -> KeyValues:
    """Run the text layers over (B, T, width); every token sees every valid token.

    Padding tokens may look (else their attention would be over nothing, hence NaN) but are never looked at.
    """
    sizes = network.architecture.text
    tables = rope_tables(valid.long().cumsum(1) - 1, sizes.head_dim)
    mask = valid[:, None, None, :]
    hidden = embeddings.to(torch.float32)
    keys, values = [], []
    last = sizes.layers - 1
    for index, layer in enumerate(network.text.layers):
        inner, key, value = _keys_values(layer, hidden, tables, sizes.head_dim)
        keys.append(key)
        values.append(value)
        if index == last:  # nothing reads what the last layer would go on to compute
            break
        hidden = _finish_layer(layer, hidden, inner, key, value, tables, mask, sizes.head_dim)
    return KeyValues(tuple(keys), tuple(values), valid)


def append_state(network: SmolVLANetwork, context: KeyValues, state: Tensor) -> KeyValues:
    """Add the state (B, padded width) as the last prefix token; it sees the context and itself."""
    sizes = network.architecture.text
    valid = torch.cat((context.valid, torch.ones_like(context.valid[:, :1])), dim=1)
    tables = rope_tables(context.valid.long().sum(1, keepdim=True), sizes.head_dim)
    mask = valid[:, None, None, :]
    hidden = network.state_proj(state)[:, None].to(torch.float32)
    keys, values = [], []
    last = sizes.layers - 1
    for index, layer in enumerate(network.text.layers):
        inner, key, value = _keys_values(layer, hidden, tables, sizes.head_dim)
        keys.append(torch.cat((context.keys[index], key), dim=2))
        values.append(torch.cat((context.values[index], value), dim=2))
        if index == last:
            break
        hidden = _finish_layer(layer, hidden, inner, keys[-1], values[-1], tables, mask, sizes.head_dim)
    return KeyValues(tuple(keys), tuple(values), valid)


def _keys_values(
    layer: DecoderLayer, hidden: Tensor, tables: tuple[Tensor, Tensor], head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    inner = layer.input_layernorm(hidden)
    key = rotate(split_heads(layer.self_attn.k_proj(inner), head_dim), tables)
    return inner, key, split_heads(layer.self_attn.v_proj(inner), head_dim)


def _finish_layer(
    layer: DecoderLayer,
    hidden: Tensor,
    inner: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor],
    mask: Tensor,
    head_dim: int,
) -> Tensor:
    queries = rotate(split_heads(layer.self_attn.q_proj(inner), head_dim), tables)
    return gated_mlp(layer, hidden + layer.self_attn.o_proj(join_heads(attend(queries, keys, values, mask))))
