"""Validation: the same numbers for the same weights, errors in radians, padding left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kuavo_smolvla_ros.learning.drift import stage_statistics
from kuavo_smolvla_ros.learning.mixed_dataset import MixedDataset, Standing, validation_draws
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.stage import Initialisation, Stage
from kuavo_smolvla_ros.learning.stage_policy import begin_policy
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.learning.validation import Validator, fixed_noise, is_arm, is_gripper
from kuavo_smolvla_ros.policy.dimensions import ACTION, ACTION_STEP_PADDING, normalise
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors


@pytest.fixture(scope="module")
def stage() -> Stage:
    return dataclasses.replace(synthetic_curriculum()[3], init=Initialisation("scratch"))


@pytest.fixture(scope="module")
def manager(stage: Stage) -> ReplayDatasetManager:
    return ReplayDatasetManager(stage, conflicting_tasks(stage.task_names, episodes=5, length=10))


@pytest.fixture(scope="module")
def policy(stage: Stage, manager: ReplayDatasetManager) -> KuavoSmolVLAPolicy:
    return begin_policy(stage, manager, None, "cpu", None)[0].eval()


@pytest.fixture
def make_validator(
    manager: ReplayDatasetManager, policy: KuavoSmolVLAPolicy, tmp_path: Any
) -> Callable[..., Validator]:
    def make(**run: Any) -> Validator:
        before, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
        samples = MixedDataset.of_manager(manager)
        return Validator(manager, samples, before, Accelerator(cpu=True), synthetic_run(tmp_path, **run))

    return make


def test_the_same_weights_give_the_same_numbers_whatever_was_drawn_before(
    make_validator: Callable[..., Validator], policy: KuavoSmolVLAPolicy
) -> None:
    first = make_validator()(policy)
    torch.rand(11)
    assert make_validator()(policy) == first
    assert sorted(first) == [1, 2, 3, 4]


def test_numbers_do_not_depend_on_how_frames_are_batched(
    make_validator: Callable[..., Validator], policy: KuavoSmolVLAPolicy
) -> None:
    whole, parts = make_validator(batch_size=32)(policy), make_validator(batch_size=3)(policy)
    for number, result in whole.items():
        assert parts[number].loss == pytest.approx(result.loss, rel=1e-5)
        assert parts[number].error_by_joint == pytest.approx(result.error_by_joint, rel=1e-4)


def test_other_weights_give_other_numbers(
    make_validator: Callable[..., Validator], policy: KuavoSmolVLAPolicy
) -> None:
    validate = make_validator()
    before = validate(policy)
    weight = policy.model.state_proj.weight
    with torch.no_grad():
        weight.mul_(1.01)
        after = validate(policy)
        weight.div_(1.01)
    assert all(after[n].loss != before[n].loss for n in before)


def test_what_is_said_of_a_base_changes_no_loss_of_a_robot_without_one(
    stage: Stage, policy: KuavoSmolVLAPolicy, tmp_path: Any
) -> None:
    """Or a base at rest, which is easy, would make a task look better than before it was there."""
    sources = conflicting_tasks(stage.task_names, episodes=5, length=10)
    name, last = sources.popitem()
    flagged = dataclasses.replace(last.facts, units={last.facts.action_names[-1]: "flag"})
    manager = ReplayDatasetManager(stage, {**sources, name: dataclasses.replace(last, facts=flagged)})
    assert Standing(manager.sources).known(manager.sources[0]) == (6, 7)
    before, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    samples = MixedDataset.of_manager(manager)
    validate = Validator(manager, samples, before, Accelerator(cpu=True), synthetic_run(tmp_path))
    first = validate(policy)
    bias = policy.model.action_out_proj.bias
    with torch.no_grad():
        bias[6:8] += 3.0
        second = validate(policy)
        bias[6:8] -= 3.0
    same = [second[number].loss == pytest.approx(first[number].loss, rel=1e-6) for number in (1, 2, 3, 4)]
    assert same == [True, True, True, False]


def test_the_mode_of_the_policy_is_left_as_it_was(
    make_validator: Callable[..., Validator], policy: KuavoSmolVLAPolicy
) -> None:
    policy.train()
    make_validator()(policy)
    assert policy.training
    policy.eval()


class Oracle:
    """Answers with the demonstrated actions, off by a known number of radians."""

    def __init__(self, policy: KuavoSmolVLAPolicy, off: torch.Tensor) -> None:
        self.config, self.statistics, self.training = policy.config, policy.statistics, False
        self._off = off

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def __call__(self, batch: Any, noise: Any, time: Any, reduction: str, counted: int) -> Any:
        assert reduction == "none"
        assert counted in (6, 8)
        return torch.full((len(batch[ACTION]),), 0.5), {}

    def predict_action_chunk(self, batch: Any, noise: Any) -> torch.Tensor:
        std = torch.tensor(self.statistics[ACTION].std)
        off = torch.zeros(batch[ACTION].shape[-1])
        off[: len(self._off)] = self._off
        predicted = batch[ACTION] + (off / std[: len(off)])
        # Behind an episode's end anything may stand, and it must not count.
        return torch.where(batch[ACTION_STEP_PADDING][..., None], 1e6, predicted)


def test_errors_are_in_radians_by_joint_and_by_step(
    make_validator: Callable[..., Validator], policy: KuavoSmolVLAPolicy
) -> None:
    off = torch.tensor([0.1, -0.2, 0.05, 0.3, 0.0, 0.0])
    results = make_validator()(Oracle(policy, off))  # type: ignore[arg-type]
    for number, result in results.items():
        assert result.loss == 0.5
        errors = [result.error_by_joint[name] for name in policy.config.action_names[:6]]
        assert errors == pytest.approx([0.1, 0.2, 0.05, 0.3, 0.0, 0.0], abs=1e-5)
        assert result.open_loop_error == pytest.approx((0.1 + 0.2 + 0.3 + 0.0) / 4, abs=1e-5)
        assert result.error_by_horizon == pytest.approx([result.open_loop_error] * 8, abs=1e-5)
        assert len(result.error_by_joint) == (8 if number == 4 else 6)


def test_gripper_accuracy_counts_the_side_of_half_open(
    make_validator: Callable[..., Validator], policy: KuavoSmolVLAPolicy, manager: ReplayDatasetManager
) -> None:
    exact = make_validator()(Oracle(policy, torch.zeros(6)))  # type: ignore[arg-type]
    assert all(result.gripper_accuracy == 1.0 for result in exact.values())
    wrong = make_validator()(Oracle(policy, torch.tensor([0, 0, 10.0, 0, 0, 10.0])))  # type: ignore[arg-type]
    # Predicted closed throughout: right where it was demonstrated closed.
    for task, source in zip(manager.stage.tasks, manager.sources, strict=True):
        samples = [source.frames[index] for index in manager.validation_frames(task).tolist()]
        real = torch.cat([sample[ACTION][~sample[ACTION_STEP_PADDING]] for sample in samples])
        closed = (real[:, [2, 5]] > 0.5).float().mean().item()
        assert wrong[task.number].gripper_accuracy == pytest.approx(closed, abs=1e-6)
    assert wrong[1].gripper_accuracy != wrong[2].gripper_accuracy


def test_only_held_out_frames_are_validated(manager: ReplayDatasetManager, stage: Stage) -> None:
    for task, split in zip(stage.tasks, manager.splits, strict=True):
        frames = {draw.frame for draw in validation_draws(manager, task)}
        assert frames <= set(split.held_out.tolist())
        assert frames.isdisjoint(split.training.tolist())


def test_noise_belongs_to_the_frame() -> None:
    noise, times = fixed_noise(0, "task1", [3, 5, 9], 4, (2, 6))
    alone, its_times = fixed_noise(0, "task1", [5], 4, (2, 6))
    assert torch.equal(noise[1], alone[0])
    assert torch.equal(times[1], its_times[0])
    other, _ = fixed_noise(0, "task2", [5], 4, (2, 6))
    assert not torch.equal(alone, other)


def test_times_of_a_frame_cover_the_whole_way() -> None:
    _, times = fixed_noise(7, "task1", list(range(50)), 8, (1, 1))
    uniform = ((times - 0.001) / 0.999) ** 1.5
    parts = (uniform * 8).floor()
    assert torch.equal(parts, torch.arange(8.0).expand(50, 8))


@pytest.mark.parametrize(
    ("name", "arm", "gripper"),
    [
        ("zarm_l1_joint", True, False),
        ("left_gripper", False, True),
        ("base_yaw", False, False),
        ("action_3", True, False),
    ],
)
def test_arms_grippers_and_base_are_told_apart(name: str, arm: bool, gripper: bool) -> None:
    assert (is_arm(name), is_gripper(name)) == (arm, gripper)


def test_padding_of_the_dataset_is_zero_after_normalising(manager: ReplayDatasetManager) -> None:
    """The synthetic tasks of different width go through the same statistics."""
    statistics = stage_statistics(manager.sources)
    assert statistics[ACTION].width == 8
    sample = manager.sources[0].frames[0]
    assert normalise(sample[ACTION], statistics[ACTION]).shape == (8, 6)
