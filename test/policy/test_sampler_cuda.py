"""The graphs of the fast path: their plumbing anywhere, the graphs themselves where there is a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from kuavo_smolvla_ros.policy import sampler as module
from kuavo_smolvla_ros.policy.sampler import Sampler, SamplerOptions
from kuavo_smolvla_ros.policy.sampler_cuda import Captured, make_stage


class Recorded(Captured):
    """As a graph behaves towards its surroundings: own inputs, and a result that stays where it is."""

    def __init__(self, function, inputs):
        self._inputs = [x.clone() for x in inputs]
        self._function = function
        self._result = function(*self._inputs)

    def __call__(self, *inputs):
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        _overwrite(self._result, self._function(*self._inputs))
        return self._result


def _overwrite(old, new):
    if isinstance(old, torch.Tensor):
        if old is not new:
            old.copy_(new)
    elif old is not None:
        for mine, given in zip(old, new, strict=True):
            _overwrite(mine, given)


def test_one_recording_serves_with_and_without_a_previous_chunk(make_policy, make_batch, monkeypatch):
    made = []

    def record(name, function, inputs):
        made.append(name)
        return Recorded(function, inputs)

    monkeypatch.setattr(module, "make_stage", record)
    policy = make_policy()
    sampler = Sampler(policy)
    sampler._graphs = sampler._on_device = True
    for seed in range(2):
        batch = make_batch(policy, 2, seed=seed)
        for how in ({}, {"prefix": torch.randn(1, 9, 16), "delay": 2}):
            noise = torch.randn(2, 50, 32)
            expected = policy.predict_action_chunk(batch, noise, **how)
            assert (sampler.chunk(batch, noise, **how) - expected).abs().max() < 1e-5
    assert made == ["vision", "prefix", "denoising loop"]
    with torch.no_grad():
        policy.model.action_out_proj.bias.add_(1.0)
    noise = torch.randn(2, 50, 32)
    expected = policy.predict_action_chunk(batch, noise)
    sampler.refresh()
    sampler._graphs = sampler._on_device = True
    assert (sampler.chunk(batch, noise) - expected).abs().max() < 1e-5
    assert made[3:] == made[:3], "new weights are recorded anew"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here capturing works")
def test_what_cannot_be_captured_runs_without_a_graph(caplog):
    with caplog.at_level(logging.WARNING):
        stage = make_stage("vision", torch.neg, [torch.ones(2)])
    assert torch.equal(stage(torch.ones(2)), -torch.ones(2))
    assert "vision runs without a CUDA graph" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_graphs_equal_the_plain_path(make_policy, make_batch, dtype, tolerance):
    policy = make_policy(device="cuda", compute_dtype=dtype).cuda()
    sampler, eager = Sampler(policy), Sampler(policy, SamplerOptions(cuda_graphs=False))
    for seed in range(3):
        batch = make_batch(policy, 2, seed=seed)
        for how in ({}, {"prefix": torch.randn(1, 9, 16, device="cuda"), "delay": 2}):
            noise = torch.randn(2, 50, 32, device="cuda")
            chunk = sampler.chunk(batch, noise, **how)
            assert (chunk - eager.chunk(batch, noise, **how)).abs().max() < 1e-3
            assert (chunk - policy.predict_action_chunk(batch, noise, **how)).abs().max() < tolerance
    assert all(isinstance(stage, Captured) for stage in sampler._stages.values())
