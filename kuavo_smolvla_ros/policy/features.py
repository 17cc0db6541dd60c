"""What frozen vision layers make of a picture: the same in every epoch, so it can be computed once and kept.

Where the whole tower and the connector are frozen, it is the picture's prefix tokens (64 of 960 numbers for
SmolVLM2-500M at 512 pixels); where upper layers train, it is the hidden state below the first that does
(1024 of 768).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kuavo_smolvla_ros.policy.freeze_plan import CONNECTOR, FreezePlan
from kuavo_smolvla_ros.policy.network import SmolVLANetwork
from kuavo_smolvla_ros.policy.vision import lower_layers, upper_layers


@dataclass(frozen=True)
class Cut:
    """Up to where the tower is frozen: so many encoder layers, and whether to the prefix tokens."""

    layers: int
    to_tokens: bool

    @classmethod
    def of(cls, plan: FreezePlan) -> Cut | None:
        """Where a plan allows to cut; None where everything trains."""
        first = plan.first_trained_layer
        if first is not None:
            return cls(first, False) if first else None
        return cls(plan.num_vision_layers, not plan.trains(CONNECTOR))


def frozen_features(network: SmolVLANetwork, pixels: Tensor, cut: Cut, position_mode: str) -> Tensor:
    """(B, cameras, 3, height, width) -> (B, cameras, tokens or patches, width)."""
    hidden = lower_layers(network, pixels.flatten(0, 1), cut.layers, position_mode)
    if cut.to_tokens:
        hidden = upper_layers(network, hidden, cut.layers, pixels.shape[-2:])
    return hidden.unflatten(0, pixels.shape[:2])


def embed_features(
    network: SmolVLANetwork, features: Tensor, plan: FreezePlan, image_size: tuple[int, int]
) -> Tensor:
    """What `frozen_features` gave -> (B, all image tokens, width), as `prefix.embed_images` gives."""
    cut = Cut.of(plan)
    assert cut is not None
    tokens = features.flatten(0, 1)
    if not cut.to_tokens:
        width, height = image_size
        tokens = upper_layers(network, tokens, cut.layers, (height, width))
    return tokens.unflatten(0, features.shape[:2]).flatten(1, 2) * network.architecture.text.width**0.5


def parameters_below(cut: Cut) -> tuple[str, ...]:
    """Beginnings of the names of all parameters that features depend on."""
    vlm = "vlm_with_expert.vlm.model."
    layers = [f"{vlm}vision_model.encoder.layers.{i}." for i in range(cut.layers)]
    rest = [f"{vlm}vision_model.post_layernorm.", f"{vlm}connector."] if cut.to_tokens else []
    return (f"{vlm}vision_model.embeddings.", *layers, *rest)
