"""The sizes of the network, read once from a backbone's `config.json` and stored with every checkpoint.

A checkpoint that carries its own sizes needs neither the backbone's folder nor a network to be loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UserError

EXPERT_MLP_MULTIPLE = 256


class ArchitectureError(UserError):
    """The backbone describes a network that this policy does not implement."""


@dataclass(frozen=True)
class VisionSizes:
    """SigLIP-style image encoder: square native image, `image_size / patch_size` patches per side."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    norm_eps: float


@dataclass(frozen=True)
class TextSizes:
    """Llama-style language model; `layers` counts only those that are used."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    norm_eps: float


@dataclass(frozen=True)
class Architecture:
    """Everything the network's shapes depend on, apart from the padded state and action widths."""

    vision: VisionSizes
    text: TextSizes
    shuffle: int
    expert_width: int
    expert_mlp_width: int
    self_attention_every: int
    initializer_std: float

    def is_self_attention(self, layer: int) -> bool:
        """Whether action tokens see each other in this expert layer (else they see the prefix only)."""
        return layer % self.self_attention_every == 0

    def image_tokens(self, height: int, width: int) -> int:
        """Prefix tokens one image of this size becomes."""
        side = self.vision.patch_size * self.shuffle
        if height % side or width % side:
            raise ArchitectureError(
                f"an image of {height}x{width} does not divide into patches: both sides must be multiples "
                f"of {side}"
            )
        return (height // side) * (width // side)


def expert_mlp_width(width: int) -> int:
    """Hidden width of the expert's gated MLP: 8/3 of its width, rounded up to a multiple of 256."""
    wanted = 4 * int(2 * width / 3)
    return EXPERT_MLP_MULTIPLE * -(-wanted // EXPERT_MLP_MULTIPLE)


def read_architecture(
    folder: Path,
    *,
    num_vlm_layers: int,
    expert_width_multiplier: float,
    self_attn_every_n_layers: int,
) -> Architecture:
    """Derive the sizes from the `config.json` of a backbone in Hugging Face layout."""
    file = folder / "config.json"
    if not file.is_file():
        raise ArchitectureError(f"{folder} holds no config.json, so it is not a model in Hugging Face layout")
    described = json.loads(file.read_text(encoding="utf-8"))
    if described.get("model_type") != "smolvlm":
        raise ArchitectureError(
            f"{file}: model_type is {described.get('model_type')!r}; this policy is built on 'smolvlm' models"
        )
    try:
        return _from_description(described, num_vlm_layers, expert_width_multiplier, self_attn_every_n_layers)
    except KeyError as missing:
        raise ArchitectureError(f"{file}: the entry {missing} is missing") from missing


def _from_description(
    described: dict[str, Any], num_vlm_layers: int, expert_width_multiplier: float, every: int
) -> Architecture:
    vision, text = described["vision_config"], described["text_config"]
    _require(vision, "vision_config", "hidden_act", "gelu_pytorch_tanh")
    _require(text, "text_config", "hidden_act", "silu")
    for part, name in ((vision, "vision_config"), (text, "text_config")):
        _require(part, name, "attention_dropout", 0.0)
    _require(text, "text_config", "attention_bias", False)
    _require(text, "text_config", "mlp_bias", False)

    available = int(text["num_hidden_layers"])
    layers = min(num_vlm_layers, available) if num_vlm_layers > 0 else available
    width, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    expert_width = int(width * expert_width_multiplier)
    if expert_width % 2:
        raise ArchitectureError(
            f"expert_width_multiplier {expert_width_multiplier} makes the expert {expert_width} wide; "
            "the width must be even because the time embedding is half sine, half cosine"
        )
    vision_width = int(vision.get("hidden_size", 1152))
    return Architecture(
        vision=VisionSizes(
            layers=int(vision.get("num_hidden_layers", 12)),
            width=vision_width,
            heads=int(vision.get("num_attention_heads", 16)),
            mlp_width=int(vision.get("intermediate_size", 3072)),
            image_size=int(vision["image_size"]),
            patch_size=int(vision["patch_size"]),
            norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
        ),
        text=TextSizes(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads", heads)),
            head_dim=int(text.get("head_dim") or width // heads),
            mlp_width=int(text["intermediate_size"]),
            vocabulary=int(text["vocab_size"]),
            norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        ),
        shuffle=int(described.get("scale_factor", 2)),
        expert_width=expert_width,
        expert_mlp_width=expert_mlp_width(expert_width),
        self_attention_every=every if every > 0 else layers + 1,
        initializer_std=float(text.get("initializer_range", 0.02)),
    )


def _require(part: dict[str, Any], where: str, key: str, expected: object) -> None:
    """The defaults of the published configuration classes equal what is implemented here."""
    value = part.get(key, expected)
    if value != expected:
        raise ArchitectureError(f"{where}.{key} is {value!r}; only {expected!r} is implemented")
