"""Refining goes through the fast path as through the plain one."""

from __future__ import annotations

import pytest
import torch

from kuavo_smolvla_ros.policy.delta_policy import refine_rest
from kuavo_smolvla_ros.policy.sampler import Sampler


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_refined_chunk_equals_the_plain_paths(make_policy, make_batch, batch_size):
    policy = make_policy(train_delta_expert=True, delta_refine_steps=2, delta_max_age=3)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if name.startswith("delta_"):  # it begins as one that changes nothing
                weight.normal_(std=0.05)
    batch, sampler = make_batch(policy, batch_size), Sampler(policy)
    noise = torch.randn(batch_size, 50, 32)
    for how in ({}, {"prefix": torch.randn(1, 9, 16), "delay": 2}):
        expected = policy.predict_action_chunk(batch, noise, **how)
        kept = policy.refinable
        assert (sampler.chunk(batch, noise, **how) - expected).abs().max() < 1e-5
        # The fast path drops padding that no sentence needs.
        assert (policy.refinable.chunk - kept.chunk).abs().max() < 1e-5
    state = torch.randn(batch_size, 16)
    later = refine_rest(policy, state, 2)
    policy.refinable = kept
    assert (refine_rest(policy, state, 2) - later).abs().max() < 1e-5
    policy.config.delta_refine_steps = 0
    assert (policy.predict_action_chunk(batch, noise, **how) - expected).abs().max() > 1e-4
