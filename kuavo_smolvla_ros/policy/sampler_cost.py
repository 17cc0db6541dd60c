"""What a chunk costs at least: multiplications and additions, and weights that must be read.

Counted from the sizes alone, for the work the fast path does: nothing is computed twice. Held against what a
machine can do, it says how much of the machine is used.
"""

from __future__ import annotations

from typing import NamedTuple

from kuavo_smolvla_ros.policy.architecture import Architecture


class Cost(NamedTuple):
    """Floating-point operations (a multiplication and an addition are two), and weights read."""

    flops: int
    weights: int


def encode_cost(sizes: Architecture, height: int, width: int) -> Cost:
    """One camera's picture through vision encoder and connector."""
    vision = sizes.vision
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    patch = 3 * vision.patch_size**2 * vision.width
    layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
    attention = 4 * patches**2 * vision.width
    connector = sizes.shuffle**2 * vision.width * sizes.text.width
    tokens = sizes.image_tokens(height, width)
    return Cost(
        2 * patches * (patch + vision.layers * layer) + vision.layers * attention + 2 * tokens * connector,
        patch + vision.layers * layer + connector,
    )


def prefix_cost(sizes: Architecture, length: int) -> Cost:
    """A prefix of `length` tokens through the text layers, and its projections for the expert."""
    text = sizes.text
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    read = text.width * 2 * keys
    rest = text.width * 2 * queries + 3 * text.width * text.mlp_width
    whole = text.layers - 1  # of the last layer only keys and values are read
    cross = sum(2 * keys**2 for i in range(text.layers) if not sizes.is_self_attention(i))
    weights = text.layers * read + whole * rest + cross
    return Cost(2 * length * weights + whole * 4 * length**2 * queries, weights)


def step_cost(sizes: Architecture, length: int, chunk: int, action_dim: int) -> Cost:
    """One denoising step behind a prefix of `length` tokens."""
    text, width = sizes.text, sizes.expert_width
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    weights, attention = 2 * action_dim * width + width**2, 0
    for index in range(text.layers):
        weights += 2 * width * queries + 3 * width * sizes.expert_mlp_width
        seen = length
        if sizes.is_self_attention(index):
            weights += 2 * width * keys
            seen += chunk
        attention += 4 * chunk * seen * queries
    return Cost(2 * chunk * weights + attention, weights)
