"""Every task seen so far on its held-out frames, always with the same noise and at the same times.

Fresh noise would hide changes of a percent or two, which is what forgetting looks like at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuavo_smolvla_ros.learning.chance import key_of
from kuavo_smolvla_ros.learning.feed import ListedBatches, make_loader
from kuavo_smolvla_ros.learning.mixed_dataset import FRAME, MixedDataset, validation_draws
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import TaskData
from kuavo_smolvla_ros.policy.dimensions import ACTION, ACTION_STEP_PADDING
from kuavo_smolvla_ros.policy.flow import TIME_EXPONENT, TIME_FLOOR
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

OPEN = 0.5  # a gripper is 0 open .. 1 closed


@dataclass(frozen=True)
class TaskResult:
    """One task's validation, of its own robot's values, so that stages with another robot compare. Errors are
    absolute, in the joints' own units (rad), of whole chunks.
    """

    loss: float
    open_loop_error: float  # mean over arm joints and the chunk's steps
    error_by_joint: Mapping[str, float]
    error_by_horizon: Sequence[float]  # mean over arm joints, for each step of the chunk
    gripper_accuracy: (
        float | None
    )  # how often a gripper is on the demonstrated side of half open; None: no gripper
    frames: int


def is_gripper(name: str) -> bool:
    """Whether an action is a gripper's opening, by the name the robot's description gives it."""
    return "gripper" in name


def is_arm(name: str) -> bool:
    """Whether an action is a joint's angle, neither a gripper's opening nor the base's."""
    return not is_gripper(name) and not name.startswith("base_")


def fixed_noise(
    seed: int, task: str, frames: Sequence[int], samples: int, chunk: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Noise (frames, samples, steps, width) and times (frames, samples) that belong to each frame.

    A frame's times lie one in each of `samples` equal parts of the distribution that training draws from.
    """
    noise, times = [], []
    for frame in frames:
        generator = torch.Generator().manual_seed(key_of("validation", seed, task, frame) % 2**63)
        noise.append(torch.randn(samples, *chunk, generator=generator))
        times.append((torch.arange(samples) + torch.rand(samples, generator=generator)) / samples)
    return torch.stack(noise), torch.stack(times) ** TIME_EXPONENT * (1 - TIME_FLOOR) + TIME_FLOOR


class Validator:
    """Validates a policy; each of several processes takes part of the frames, and all get the result."""

    def __init__(
        self,
        manager: ReplayDatasetManager,
        samples: MixedDataset,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]],
        accelerator: Any,
        run: RunSettings,
    ) -> None:
        self._manager, self._samples, self._preprocess = manager, samples, preprocess
        self._accelerator, self._run = accelerator, run
        self._settings = manager.stage.validation
        self._draws = {task.name: validation_draws(manager, task) for task in manager.stage.tasks}

    @torch.no_grad()
    def __call__(self, policy: KuavoSmolVLAPolicy) -> dict[int, TaskResult]:
        """Results by task number."""
        was_training = policy.training
        policy.eval()
        results = {task.number: self._task(policy, task) for task in self._manager.stage.tasks}
        policy.train(was_training)
        return results

    def _task(self, policy: KuavoSmolVLAPolicy, task: TaskData) -> TaskResult:
        accelerator, draws = self._accelerator, self._draws[task.name]
        mine = draws[accelerator.process_index :: accelerator.num_processes]
        size = self._run.batch_size
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        source = self._manager.sources[self._manager.stage.task_names.index(task.name)]
        names = source.facts.action_names
        steps, device = policy.config.chunk_size, accelerator.device
        loss = torch.zeros(2, device=device)  # sum, count
        error = torch.zeros(steps, len(names), device=device)
        counted = torch.zeros(steps, device=device)
        same_side = torch.zeros(len(names), device=device)
        std = torch.tensor(policy.statistics[ACTION].std[: len(names)], device=device)
        mean = torch.tensor(policy.statistics[ACTION].mean[: len(names)], device=device)
        for raw in make_loader(self._samples, ListedBatches(batches), self._run, device):
            noise, times = fixed_noise(
                self._settings.seed,
                task.name,
                raw[FRAME].tolist(),
                self._settings.noise_samples,
                (steps, policy.config.max_action_dim),
            )
            noise, times = noise.to(device), times.to(device)
            batch = self._preprocess(raw)
            with accelerator.autocast():
                for sample in range(self._settings.noise_samples):
                    # A base at rest is easy, and would make the losses of a mix with one look better.
                    each, _ = policy(
                        batch, noise[:, sample], times[:, sample], reduction="none", counted=len(names)
                    )
                    loss += torch.stack([each.float().sum(), each.new_tensor(len(each))])
                predicted = policy.predict_action_chunk(batch, noise[:, 0])[..., : len(names)].float()
            target = batch[ACTION][..., : len(names)]
            valid = ~batch[ACTION_STEP_PADDING][..., None]
            error += torch.where(valid, (predicted - target).abs() * std, 0.0).sum(0)
            counted += valid.sum((0, 2))
            closed = ((predicted * std + mean) > OPEN) == ((target * std + mean) > OPEN)
            same_side += (closed & valid).sum((0, 1))
        loss, error, counted, same_side = accelerator.reduce((loss, error, counted, same_side), "sum")
        return _result(names, loss.cpu(), error.cpu(), counted.cpu(), same_side.cpu(), len(draws))


def _result(
    names: Sequence[str], loss: Tensor, error: Tensor, counted: Tensor, same_side: Tensor, frames: int
) -> TaskResult:
    total = counted.sum()
    by_joint = error.sum(0) / total
    arm = [index for index, name in enumerate(names) if is_arm(name)]
    grippers = [index for index, name in enumerate(names) if is_gripper(name)]
    # The last steps of a chunk may lie past the end of every held-out episode.
    seen = int((counted > 0).sum())
    by_horizon = error[:seen, arm].mean(1) / counted[:seen]
    return TaskResult(
        loss=float(loss[0] / loss[1]),
        open_loop_error=float(by_joint[arm].mean()),
        error_by_joint=dict(zip(names, by_joint.tolist(), strict=True)),
        error_by_horizon=by_horizon.tolist(),
        gripper_accuracy=float((same_side[grippers] / total).mean()) if grippers else None,
        frames=frames,
    )
