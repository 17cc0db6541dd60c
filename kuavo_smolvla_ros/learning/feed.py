"""What enters a step beside the samples: loaders, and noise and times that belong to places in the batch.

The samples, the noise and the times of a step are functions of (seed, step), and a device takes its part of
them: training goes on after a stop exactly as it would have, and runs on two devices as on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kuavo_smolvla_ros.learning.chance import key_of
from kuavo_smolvla_ros.learning.mixed_dataset import collate
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import BatchLayout
from kuavo_smolvla_ros.policy.flow import sample_noise, sample_time

CPU = torch.device("cpu")


def make_loader(
    samples: Dataset[Any], batches: Sampler[list[Any]], run: RunSettings, device: torch.device
) -> DataLoader[Any]:
    """Batches on the host, made ahead by `run.num_workers` processes."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=run.num_workers,
        prefetch_factor=run.prefetch_factor if run.num_workers else None,
        pin_memory=device.type == "cuda",
    )


class ListedBatches(Sampler[list[Any]]):
    """Batches that are known beforehand."""

    def __init__(self, batches: list[list[Any]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def places(step: int, layout: BatchLayout, rank: int, micro: int) -> slice:
    """The places in a step's batch of one device's accumulation step, as the sampler deals them."""
    parts = layout.devices * layout.accumulation
    return slice((micro * layout.devices + rank - step) % parts, None, parts)


def step_noise(seed: int, step: int, layout: BatchLayout, chunk: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Noise (batch, steps, width) and times (batch,) of a whole step, on the host."""
    # Drawn on the host: a device's generator would give other numbers than another device's.
    generator = torch.Generator().manual_seed(key_of("noise", seed, step) % 2**63)
    noise = sample_noise((layout.total, *chunk), CPU, generator)
    return noise, sample_time(layout.total, CPU, generator)


def seed_everything(seed: int, step: int, rank: int) -> None:
    """What else is random in a step (dropout) begins anew in each: no generator's state is to be kept."""
    torch.manual_seed(key_of("step", seed, step, rank) % 2**63)
