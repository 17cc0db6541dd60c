"""Presets by name and by the number of episodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.freeze_presets import (
    DEFAULT_PRESET,
    EXPERT_ONLY,
    FREEZE_PRESETS,
    frozen_by_preset,
    preset_for_episodes,
)


@pytest.mark.parametrize(
    ("name", "unfrozen"),
    [
        ("very_conservative", 4),
        ("conservative", 6),
        ("balanced_minus", 8),
        ("balanced", 9),
        ("aggressive", 10),
        ("very_aggressive", 11),
        ("expert_only", 0),
    ],
)
def test_layers_of_twelve(name: str, unfrozen: int) -> None:
    assert 12 - frozen_by_preset(name, 12) == unfrozen


@pytest.mark.parametrize(
    ("episodes", "name"),
    [
        (1, "very_conservative"),
        (499, "very_conservative"),
        (500, "conservative"),
        (999, "conservative"),
        (1000, "balanced_minus"),
        (1499, "balanced_minus"),
        (1500, "balanced"),
        (2000, "balanced"),
        (2499, "balanced"),
        (2500, "aggressive"),
        (4000, "aggressive"),
        (4001, "very_aggressive"),
        (10**9, "very_aggressive"),
    ],
)
def test_preset_by_episodes(episodes: int, name: str) -> None:
    assert preset_for_episodes(episodes) == name


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_preset_without_episodes(episodes: int) -> None:
    with pytest.raises(UserError, match=f"{episodes} episodes"):
        preset_for_episodes(episodes)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_data_never_trains_fewer_layers(a: int, b: int) -> None:
    few, many = sorted((a, b))
    assert frozen_by_preset(preset_for_episodes(few), 12) >= frozen_by_preset(preset_for_episodes(many), 12)


@given(st.sampled_from(sorted(FREEZE_PRESETS)), st.integers(2, 60))
def test_on_any_encoder_a_preset_freezes_some_layers_and_trains_some(name: str, count: int) -> None:
    frozen = frozen_by_preset(name, count)
    assert 1 <= frozen <= count - 1
    share = (12 - FREEZE_PRESETS[name].unfrozen_of_12) / 12
    assert abs(frozen - share * count) <= 0.5 or frozen in (1, count - 1)


@pytest.mark.parametrize("name", sorted(FREEZE_PRESETS))
def test_a_single_layer_trains(name: str) -> None:
    assert frozen_by_preset(name, 1) == 0


def test_the_default_is_a_preset_and_expert_only_is_apart() -> None:
    assert DEFAULT_PRESET in FREEZE_PRESETS
    assert EXPERT_ONLY not in FREEZE_PRESETS
