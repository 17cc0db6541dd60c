"""Named choices of how many vision layers to train, by the amount of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kuavo_smolvla_ros.errors import UserError

# The encoder the presets were chosen on (SmolVLM2-500M); others take the same share of their layers.
REFERENCE_LAYERS = 12
DEFAULT_PRESET = "balanced"
EXPERT_ONLY = "expert_only"


@dataclass(frozen=True)
class FreezePreset:
    """Train the last `unfrozen_of_12` layers, with at least `min_episodes` episodes."""

    unfrozen_of_12: int
    min_episodes: int


# Ascending by episodes: a preset holds up to the next one's number.
FREEZE_PRESETS: Mapping[str, FreezePreset] = {
    "very_conservative": FreezePreset(4, 1),
    "conservative": FreezePreset(6, 500),
    "balanced_minus": FreezePreset(8, 1000),
    "balanced": FreezePreset(9, 1500),
    "aggressive": FreezePreset(10, 2500),
    "very_aggressive": FreezePreset(11, 4001),
}


def preset_for_episodes(episodes: int) -> str:
    """The preset for a data set of this many episodes."""
    if episodes < 1:
        raise UserError(f"{episodes} episodes: there is no freezing preset for a data set without episodes")
    return next(name for name in reversed(FREEZE_PRESETS) if episodes >= FREEZE_PRESETS[name].min_episodes)


def frozen_by_preset(name: str, num_vision_layers: int) -> int:
    """How many layers from the image on the preset freezes.

    The nearest whole layer to the share of 12, but never none (that would be no freezing) and never all
    (that would be no unfreezing); a single layer trains.
    """
    if name == EXPERT_ONLY:
        return num_vision_layers
    share = (REFERENCE_LAYERS - FREEZE_PRESETS[name].unfrozen_of_12) / REFERENCE_LAYERS
    nearest = int(share * num_vision_layers + 0.5)
    return max(min(nearest, num_vision_layers - 1), min(1, num_vision_layers - 1))
