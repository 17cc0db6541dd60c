"""Images to prefix tokens: the vision encoder and the connector, all cameras in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kuavo_smolvla_ros.policy.network import SmolVLANetwork, VisionLayer
from kuavo_smolvla_ros.policy.numerics import attend, join_heads, split_heads

POSITION_ID_MODES = ("raster", "stock")


def position_ids(rows: int, columns: int, side: int, mode: str, device: torch.device) -> Tensor:
    """Which of the `side * side` learned positions each patch of a rows x columns grid takes.

    "raster" is the true row-major numbering (a grid smaller than the native one is spread over it), exact
    because it is computed in integers. "stock" repeats what transformers 4.57 does in single precision, where
    a factor of 1 - 1e-6 moves every boundary and the first two rows and columns share a number.
    """
    if mode == "raster":
        row = torch.arange(rows, device=device) * side // rows
        column = torch.arange(columns, device=device) * side // columns
    elif mode == "stock":
        boundaries = torch.arange(1 / side, 1.0, 1 / side, device=device)
        row, column = (
            torch.bucketize(
                torch.arange(n, device=device, dtype=torch.float32) / n * (1 - 1e-6), boundaries, right=True
            )
            for n in (rows, columns)
        )
    else:
        raise ValueError(f"vision_position_ids is {mode!r}; it is one of {', '.join(POSITION_ID_MODES)}")
    return (row[:, None] * side + column).flatten()


def vision_layer(layer: VisionLayer, hidden: Tensor, head_dim: int) -> Tensor:
    """One pre-norm encoder layer; every patch sees every patch."""
    inner = layer.layer_norm1(hidden)
    attention = layer.self_attn
    out = attend(
        split_heads(attention.q_proj(inner), head_dim),
        split_heads(attention.k_proj(inner), head_dim),
        split_heads(attention.v_proj(inner), head_dim),
        None,
    )
    hidden = hidden + attention.out_proj(join_heads(out))
    return hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(hidden)), approximate="tanh"))


def pixel_shuffle(x: Tensor, rows: int, columns: int, factor: int) -> Tensor:
    """Gather factor x factor neighbouring patches into one token: (N, rows*columns, W) -> (N, fewer,
    W*factor^2).
    """
    blocks = x.unflatten(1, (rows // factor, factor, columns // factor, factor))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def encode_images(network: SmolVLANetwork, pixels: Tensor, position_mode: str = "raster") -> Tensor:
    """(N, 3, height, width) in [-1, 1] -> (N, tokens, text width), before the prefix's own scaling."""
    layers = len(network.vision.encoder.layers)
    hidden = lower_layers(network, pixels, layers, position_mode)
    return upper_layers(network, hidden, layers, pixels.shape[-2:])


def lower_layers(
    network: SmolVLANetwork, pixels: Tensor, layers: int, position_mode: str = "raster"
) -> Tensor:
    """(N, 3, height, width) -> (N, patches, vision width): what the first encoder layers make of it."""
    sizes = network.architecture
    sizes.image_tokens(pixels.shape[-2], pixels.shape[-1])
    vision = network.vision
    patches = vision.embeddings.patch_embedding(pixels)
    rows, columns = patches.shape[-2:]
    side = sizes.vision.image_size // sizes.vision.patch_size
    ids = position_ids(rows, columns, side, position_mode, pixels.device)
    hidden = patches.flatten(2).transpose(1, 2) + vision.embeddings.position_embedding(ids)
    head_dim = sizes.vision.width // sizes.vision.heads
    for layer in vision.encoder.layers[:layers]:
        hidden = vision_layer(layer, hidden, head_dim)
    return hidden


def upper_layers(network: SmolVLANetwork, hidden: Tensor, layers: int, size: tuple[int, int]) -> Tensor:
    """The rest of the way for what `lower_layers` gave; `size` is the pictures' (height, width)."""
    sizes, vision = network.architecture, network.vision
    rows, columns = (side // sizes.vision.patch_size for side in size)
    head_dim = sizes.vision.width // sizes.vision.heads
    for layer in vision.encoder.layers[layers:]:
        hidden = vision_layer(layer, hidden, head_dim)
    hidden = vision.post_layernorm(hidden)
    return network.connector.modality_projection.proj(pixel_shuffle(hidden, rows, columns, sizes.shuffle))
