from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.policy.loss import first_values, flow_loss, masked_mean, valid_entries


def masks(batch, steps, width, seed):
    random = torch.Generator().manual_seed(seed)
    return (
        torch.rand(batch, steps, generator=random) < 0.4,
        torch.rand(batch, width, generator=random) < 0.4,
    )


def test_valid_entries_by_hand():
    valid = valid_entries(torch.tensor([[False, True]]), torch.tensor([[False, False, True]]))
    assert valid.tolist() == [[[True, True, False], [False, False, False]]]


def test_mean_by_hand():
    errors = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    valid = torch.tensor([[[True, False], [True, False]], [[True, True], [False, False]]])
    assert masked_mean(errors, valid).item() == (1 + 3 + 5 + 6) / 4
    assert masked_mean(errors, valid, "none").tolist() == [2.0, 5.5]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_equals_the_mean_of_the_selected_values(batch, steps, width, seed):
    step_is_pad, dim_is_pad = masks(batch, steps, width, seed)
    valid = valid_entries(step_is_pad, dim_is_pad)
    errors = torch.rand(batch, steps, width, dtype=torch.float64)
    selected = errors[valid]
    expected = selected.mean().item() if selected.numel() else 0.0
    assert masked_mean(errors, valid).item() == pytest.approx(expected)


@pytest.mark.parametrize("poison", [1e30, math.inf, math.nan])
def test_values_and_gradients_in_the_padding_do_not_matter(poison):
    valid = valid_entries(*masks(3, 5, 4, seed=1))
    velocity = torch.randn(3, 5, 4, requires_grad=True)
    target = torch.randn(3, 5, 4)
    clean = flow_loss(velocity, target, valid)
    (clean_gradient,) = torch.autograd.grad(clean, velocity)
    dirty = flow_loss(velocity, torch.where(valid, target, poison), valid)
    assert torch.equal(clean, dirty)
    finite = torch.autograd.grad(dirty, velocity)[0][valid]
    assert torch.equal(finite, clean_gradient[valid])


def test_padding_does_not_dilute():
    errors = torch.ones(1, 10, 4)
    valid = valid_entries(torch.arange(10)[None] >= 2, torch.arange(4)[None] >= 1)
    assert masked_mean(errors, valid).item() == 1.0


def test_a_sample_that_is_all_padding_contributes_nothing():
    errors = torch.stack((torch.full((2, 2), 4.0), torch.full((2, 2), 100.0)))
    valid = torch.stack((torch.ones(2, 2), torch.zeros(2, 2))).bool()
    assert masked_mean(errors, valid).item() == 4.0
    assert masked_mean(errors, valid, "none").tolist() == [4.0, 0.0]


def test_is_computed_in_single_precision():
    velocity = torch.full((1, 1, 1), 1.0078125, dtype=torch.bfloat16)
    loss = flow_loss(velocity, torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.0078125**2)


def test_of_the_first_values_only_those_count():
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    valid[0, 1] = False
    first = first_values(valid, 2)
    assert first[..., :2].equal(valid[..., :2])
    assert not first[..., 2:].any()
    assert first_values(valid, None) is valid
    assert first_values(valid, 9).equal(valid)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'sum'"):
        masked_mean(torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool), "sum")
