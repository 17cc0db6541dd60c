"""The memory estimate against what real tensors take."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kuavo_smolvla_ros.policy.architecture import Architecture, TextSizes, VisionSizes
from kuavo_smolvla_ros.policy.freezing import FreezeSettings, apply_plan, parameter_groups, plan_freezing
from kuavo_smolvla_ros.policy.memory import GIB, Allocations, StepSizes, estimate_step, step_loss
from kuavo_smolvla_ros.policy.network import SmolVLANetwork

SMALL = Architecture(
    vision=VisionSizes(4, 64, 4, 128, 64, 8, 1e-6),
    text=TextSizes(4, 64, 4, 2, 16, 128, 500, 1e-5),
    shuffle=4,
    expert_width=48,
    expert_mlp_width=256,
    self_attention_every=2,
    initializer_std=0.02,
)
FULL = Architecture(
    vision=VisionSizes(12, 768, 12, 3072, 512, 16, 1e-6),
    text=TextSizes(16, 960, 15, 5, 64, 2560, 49280, 1e-5),
    shuffle=4,
    expert_width=720,
    expert_mlp_width=2048,
    self_attention_every=2,
    initializer_std=0.02,
)
SIZES = StepSizes(batch=2, cameras=2)


def plan_for(architecture: Architecture, **settings: object):
    return plan_freezing(FreezeSettings(**settings), architecture.vision.layers)


def test_storages_are_counted_once_and_let_go() -> None:
    with Allocations() as counted:
        a = torch.empty(256)
        assert counted.live == 1024
        b = a.view(16, 16)[2:]  # shares the storage
        assert counted.live == 1024
        c = a + 1
        assert counted.live == 2048
        del a
        assert counted.live == 2048  # b still holds it
        del b
        assert counted.live == 1024
        del c
    assert counted.live == 0
    assert counted.peak == 2048


def test_what_is_there_already_is_counted_at_the_start() -> None:
    assert Allocations([torch.empty(10), torch.empty(5, dtype=torch.bfloat16)]).live == 50


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"preset": "expert_only"}, {"unfreeze_vision_layers": [-1]}, {"freeze_vision_encoder": False}],
)
def test_the_trace_equals_a_real_step_byte_for_byte(settings: dict, bfloat16: bool) -> None:
    sizes = replace(SIZES, bfloat16=bfloat16)
    plan = plan_for(SMALL, **settings)
    estimate = estimate_step(SMALL, plan, sizes)

    network = SmolVLANetwork(SMALL, 32, 32)
    network.initialise()
    apply_plan(network, plan)
    real = Allocations(network.parameters())
    assert estimate.weights == real.live == sum(4 * p.numel() for p in network.parameters())
    with real:
        loss = step_loss(network, sizes)
        assert real.live - estimate.weights == estimate.activations
        loss.backward()
    assert real.peak + estimate.moments == estimate.backward_peak


@pytest.mark.parametrize("settings", [{"preset": "expert_only"}, {"unfreeze_vision_layers": [-1]}])
def test_gradients_and_moments_are_what_the_optimizer_holds(settings: dict) -> None:
    plan = plan_for(SMALL, **settings)
    estimate = estimate_step(SMALL, plan, SIZES)
    network = SmolVLANetwork(SMALL, 32, 32)
    network.initialise()
    apply_plan(network, plan)
    optimizer = torch.optim.AdamW(parameter_groups(network, plan, 1e-4))
    step_loss(network, SIZES).backward()
    optimizer.step()
    assert sum(p.grad.nbytes for p in network.parameters() if p.grad is not None) == estimate.gradients
    held = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert sum(value.nbytes for value in held) == estimate.moments


def test_more_trained_layers_larger_batches_and_more_cameras_take_more() -> None:
    def kept(batch: int = 2, cameras: int = 2, **settings: object) -> int:
        sizes = replace(SIZES, batch=batch, cameras=cameras)
        return estimate_step(SMALL, plan_for(SMALL, **settings), sizes).activations

    by_layers = [kept(unfreeze_vision_layers=list(range(first, 4))) for first in (3, 2, 1, 0)]
    assert by_layers == sorted(set(by_layers))
    assert kept(preset="expert_only") < by_layers[0]
    assert kept(batch=4, preset="balanced") > kept(batch=2, preset="balanced")
    assert kept(cameras=3, preset="balanced") > kept(cameras=2, preset="balanced")


def test_a_frozen_layer_above_a_trained_one_keeps_its_activations() -> None:
    """What the plan warns of."""
    low = estimate_step(SMALL, plan_for(SMALL, unfreeze_vision_layers=[0]), SIZES)
    high = estimate_step(SMALL, plan_for(SMALL, unfreeze_vision_layers=[3]), SIZES)
    every = estimate_step(SMALL, plan_for(SMALL, unfreeze_vision_layers=[0, 1, 2, 3]), SIZES)
    assert low.activations > high.activations + 0.5 * (every.activations - high.activations)


def test_nothing_is_allocated_for_the_estimate() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    estimate = estimate_step(SMALL, plan_for(SMALL, freeze_vision_encoder=False), replace(SIZES, batch=5000))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert estimate.activations > 10 * GIB
    assert grown < GIB


def test_lines_state_every_number_in_gib() -> None:
    estimate = estimate_step(SMALL, plan_for(SMALL, preset="balanced"), SIZES)
    lines = "\n".join(replace(estimate, weights=3 * GIB, backward_peak=9 * GIB).lines())
    assert "weights              3.00 GiB" in lines
    assert "peak, backward       9.00 GiB" in lines


MEASURE = r"""
import re, sys, threading
from pathlib import Path
import torch
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_memory import FULL, SmolVLANetwork, StepSizes, apply_plan, parameter_groups, plan_for, step_loss

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

before, highest, over = anonymous(), 0, threading.Event()
def watch():
    global highest
    while not over.wait(0.005):
        highest = max(highest, anonymous())

plan = plan_for(FULL, preset="expert_only")
network = SmolVLANetwork(FULL, 32, 32)
network.initialise()
apply_plan(network, plan)
optimizer = torch.optim.AdamW(parameter_groups(network, plan, 1e-5), foreach=True)
watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(2):
    step_loss(network, StepSizes(batch=2)).backward()
    optimizer.step()
    optimizer.zero_grad()
over.set()
watcher.join()
print(highest - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to read the process's memory")
def test_the_estimate_is_near_what_a_full_size_step_takes_on_the_cpu() -> None:
    estimate = estimate_step(FULL, plan_for(FULL, preset="expert_only"), StepSizes(batch=2)).peak
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, __file__],
        # so that freed memory goes back to the system at once
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(done.stdout)
    print(f"estimated {estimate / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB: {estimate / measured:.2f}")
    assert 0.9 < estimate / measured < 1.1
