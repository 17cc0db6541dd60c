"""What a stage will take, before anything is allocated: samples, trained parameters, memory, time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kuavo_smolvla_ros.learning.adapters import add_adapter
from kuavo_smolvla_ros.learning.outputs import read_rows
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import Adapter, Stage
from kuavo_smolvla_ros.policy.build import empty_network, ensure_architecture
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.freezing import FreezePlan, count_parameters, format_table
from kuavo_smolvla_ros.policy.memory import GIB, StepMemory, StepSizes, estimate_step

# lerobot's documentation: 20 000 steps of 64 samples in about 4 h on an A100, two cameras, vision frozen.
PUBLISHED_SAMPLES_PER_S = 89.0
LIBRARIES_BYTES = 1 * GIB  # what driver and libraries take beside the tensors
USABLE = 0.95  # of the rest: allocators leave holes


def step_memory(
    config: KuavoSmolVLAConfig, plan: FreezePlan, batch: int, bfloat16: bool, adapter: Adapter | None = None
) -> StepMemory:
    """What one device needs for this many samples at a time."""
    sizes = StepSizes(
        batch=batch,
        cameras=len(config.cameras),
        tokens=config.tokenizer_max_length,
        chunk_size=config.chunk_size,
        state_dim=config.max_state_dim,
        action_dim=config.max_action_dim,
        bfloat16=bfloat16,
    )
    adapt = None if adapter is None else partial(add_adapter, plan=plan, adapter=adapter)
    return estimate_step(ensure_architecture(config), plan, sizes, adapt)


def fitting_batch(
    config: KuavoSmolVLAConfig,
    plan: FreezePlan,
    batch: int,
    device: torch.device,
    adapter: Adapter | None = None,
) -> int | None:
    """The largest divisor of `batch`, smaller than it, that fits the device's memory; None: not even one."""
    if device.type != "cuda" or config.train_delta_expert:  # what is traced is the step without one
        return next((size for size in range(batch - 1, 0, -1) if batch % size == 0), None)
    total = torch.cuda.get_device_properties(device).total_memory
    return fitting_divisor(config, plan, batch, (total - LIBRARIES_BYTES) * USABLE, adapter)


def fitting_divisor(
    config: KuavoSmolVLAConfig,
    plan: FreezePlan,
    batch: int,
    available: float,
    adapter: Adapter | None = None,
) -> int | None:
    """The largest proper divisor of `batch` whose step needs no more than `available` bytes."""
    bfloat16 = config.compute_dtype != "float32"
    for size in range(batch - 1, 0, -1):
        if batch % size == 0 and step_memory(config, plan, size, bfloat16, adapter).peak <= available:
            return size
    return None


def measured_rate(root: Path) -> tuple[float, str] | None:
    """Samples per second of the newest run below `root`, and where it was measured."""
    logs = sorted(root.glob("*/log.jsonl"), key=lambda file: file.stat().st_mtime)
    for file in reversed(logs):
        rates = [row["samples_per_s"] for row in read_rows(file.parent, "train")]
        if rates:
            return sorted(rates)[len(rates) // 2], f"measured in {file.parent.name}"
    return None


def stage_plan(
    stage: Stage, manager: ReplayDatasetManager, config: KuavoSmolVLAConfig, run: RunSettings, devices: int
) -> Iterator[str]:
    """The stage for people, line by line."""
    layout = stage.training.layout(run.batch_size, devices)
    steps = manager.total_steps
    yield f"{stage.name} (stage {stage.hash}, data {manager.digest})"
    yield f"  starts from {stage.init.kind}{f' {stage.init.target}' if stage.init.target else ''}"
    yield (
        f"  {steps} steps of {layout.total} samples ({layout.per_device} per device x "
        f"{layout.accumulation} parts x "
        f"{layout.devices} devices), {stage.training.epochs} epochs of {manager.steps_per_epoch} steps"
    )
    first = manager.plan.quotas.counts(0).tolist()
    exposure = manager.plan.exposure(steps)
    for task, share, split, frames, count in zip(
        stage.tasks, stage.shares, manager.splits, manager.training_frames, first, strict=True
    ):
        seen = exposure[task.name]
        yield (
            f"  {task.name:<24} {float(share):>4.0%} of each batch ({count} in the first), {len(frames)} "
            f"frames, "
            f"{seen.passes:.1f} passes; {len(split.held_out_episodes)} episodes held out"
        )
    plan, counts = freezing_of(config, stage.adapter)
    yield from (f"  {line}" for line in format_table(plan, counts).splitlines())
    if stage.adapter is not None:
        rate = stage.optimizer.lr if stage.adapter.lr is None else stage.adapter.lr
        yield (
            f"  LoRA of rank {stage.adapter.rank} at {rate:g} beside "
            f"{', '.join(stage.adapter.target_modules)}; "
            f"{', '.join(stage.adapter.full) or 'nothing'} in full at {stage.optimizer.lr:g}"
        )
    bfloat16 = stage.training.precision == "bf16"
    memory = step_memory(config, plan, layout.per_device, bfloat16, stage.adapter)
    yield f"  memory per device, {layout.per_device} at a time: {memory.peak / GIB:.1f} GiB and libraries"
    rate, where = measured_rate(run.root) or (
        PUBLISHED_SAMPLES_PER_S * devices,
        f"{PUBLISHED_SAMPLES_PER_S:g} samples/s per device, published for an A100 with two cameras and "
        f"frozen vision",
    )
    yield f"  about {duration(steps * layout.total / rate)} of training ({where})"


def freezing_of(
    config: KuavoSmolVLAConfig, adapter: Adapter | None = None
) -> tuple[FreezePlan, tuple[Any, ...]]:
    """What trains of a network that is not built."""
    network = empty_network(config)
    plan = config.freeze_plan(len(network.vision.encoder.layers))
    if adapter is not None:
        add_adapter(network, plan, adapter)
    return plan, count_parameters(network, plan)


def duration(seconds: float) -> str:
    """In the unit people think in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
