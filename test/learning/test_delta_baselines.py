"""The baselines find what they can find, and the drifting tasks are what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.learning.delta_baselines import (
    Samples,
    fit_linear,
    fit_mlp,
    fit_smoothing,
    squared_error,
    zero_residual,
)
from kuavo_smolvla_ros.learning.delta_synthetic import ARMS, KEPT, LEAN, drifting_tasks
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING


def samples(kind: str, n: int = 400, seed: int = 0) -> Samples:
    random = torch.Generator().manual_seed(seed)
    truth = torch.cumsum(0.1 * torch.randn(n, 8, 3, generator=random), 1)
    # From anywhere, so that the chunk alone does not show its error.
    truth = truth + 3 * torch.randn(n, 1, 3, generator=random)
    state = torch.randn(n, 3, generator=random)
    error = {
        "none": torch.zeros(n, 8, 3),
        "noise": 0.5 * torch.randn(n, 8, 3, generator=random),
        "linear": 0.5 * state[:, None].expand(-1, 8, -1),
        "product": (state * state.roll(1, 1))[:, None].expand(-1, 8, -1),
    }[kind]
    valid = torch.rand(n, 8, generator=random) > 0.1
    task = torch.arange(n) % 2
    return Samples(truth + error, state, truth, valid, task, torch.arange(n) // 8)


def left(kind: str, refine: object, held: Samples) -> float:
    """Of the base's squared error."""
    return squared_error(held, refine(held)) / squared_error(held, held.chunk)  # type: ignore[operator]


def test_doing_nothing_leaves_everything() -> None:
    held = samples("linear", seed=1)
    assert left("linear", zero_residual, held) == 1.0


def test_smoothing_takes_noise_away_and_harms_nothing() -> None:
    assert left("noise", fit_smoothing(samples("noise")), samples("noise", seed=1)) < 0.6
    smooth = fit_smoothing(samples("none"))
    held = samples("none", seed=1)
    assert torch.equal(smooth(held), held.chunk)


def test_a_linear_error_is_found_by_the_linear_map_and_the_network() -> None:
    train, held = samples("linear"), samples("linear", seed=1)
    assert left("linear", fit_linear(train, 2), held) < 0.01
    assert left("linear", fit_mlp(train, 2, steps=400), held) < 0.3


def test_a_product_only_by_the_network() -> None:
    train, held = samples("product", 1200), samples("product", seed=1)
    assert left("product", fit_linear(train, 2), held) > 0.8
    assert left("product", fit_mlp(train, 2, steps=400), held) < 0.6


def test_padded_steps_do_not_matter() -> None:
    train = samples("linear")
    poisoned = train._replace(
        demonstrated=torch.where(train.valid[..., None], train.demonstrated, torch.tensor(1e6))
    )
    held = samples("linear", seed=1)
    assert torch.allclose(fit_linear(train, 2)(held), fit_linear(poisoned, 2)(held), atol=1e-4)


class TestDrift:
    def test_frames_of_an_episode_speak_of_the_same_actions(self) -> None:
        source = drifting_tasks(["task1"], episodes=2, length=12)["task1"]
        for frame, age in ((0, 3), (12, 5), (15, 1)):
            one, later = source.frames[frame], source.frames[frame + age]
            known = ~one[ACTION_STEP_PADDING][age:]
            assert torch.equal(one["action"][age:][known], later["action"][: 8 - age][known])

    def test_the_state_shows_what_the_demonstrator_leans_against(self) -> None:
        source = drifting_tasks(["task1", "task2"], episodes=30)["task2"]
        state = torch.stack([source.frames[i]["observation.state"] for i in range(len(source.frames))])
        first = torch.stack([source.frames[i]["action"][0] for i in range(len(source.frames))])
        arm = ARMS.index(True)
        slope = np.polyfit(state[:, arm], first[:, arm], 1)[0]
        assert slope == pytest.approx(-LEAN, abs=0.02)
        grippers = [i for i, is_arm in enumerate(ARMS) if not is_arm]
        assert first[:, grippers].std(0).max() == 0
        offsets = source.frames.offsets(0)  # type: ignore[attr-defined]
        assert offsets.shape == (20, 6)
        assert 0 < KEPT < 1
