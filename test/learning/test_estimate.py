"""What is said before training agrees with what the network then is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kuavo_smolvla_ros.learning.estimate import (
    fitting_batch,
    fitting_divisor,
    freezing_of,
    stage_plan,
    step_memory,
)
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.stage import Initialisation, Stage
from kuavo_smolvla_ros.learning.stage_policy import begin_policy, stage_config
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.freezing import count_parameters


@pytest.fixture(scope="module")
def stage() -> Stage:
    return dataclasses.replace(synthetic_curriculum()[1], init=Initialisation("scratch"))


@pytest.fixture(scope="module")
def manager(stage: Stage) -> ReplayDatasetManager:
    return ReplayDatasetManager(stage, conflicting_tasks(stage.task_names, episodes=5, length=8))


@pytest.fixture(scope="module")
def config(stage: Stage, manager: ReplayDatasetManager) -> KuavoSmolVLAConfig:
    return stage_config(stage, manager.facts, "cpu", None)


def test_what_will_train_is_what_trains(
    stage: Stage, manager: ReplayDatasetManager, config: KuavoSmolVLAConfig
) -> None:
    _, counts = freezing_of(config)
    policy, _ = begin_policy(stage, manager, None, "cpu", None)
    assert counts == count_parameters(policy.model, policy.freezing)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(count.trained for count in counts) == trained


def test_the_plan_names_steps_shares_and_time(
    stage: Stage, manager: ReplayDatasetManager, config: KuavoSmolVLAConfig, tmp_path: object
) -> None:
    run = synthetic_run(tmp_path, batch_size=8)  # type: ignore[arg-type]
    text = "\n".join(stage_plan(stage, manager, config, run, devices=2))
    assert f"{manager.total_steps} steps of 32 samples (8 per device x 2 parts x 2 devices)" in text
    assert "20% of each batch" in text
    assert "1 episodes held out" in text
    assert "published for an A100" in text


def test_the_batch_that_fits_is_the_largest_divisor_that_does(config: KuavoSmolVLAConfig) -> None:
    plan, _ = freezing_of(config)
    four = step_memory(config, plan, 4, bfloat16=False).peak
    assert fitting_divisor(config, plan, 12, four) == 4
    assert fitting_divisor(config, plan, 5, 1000.0) is None
    assert fitting_divisor(config, plan, 1, 1e12) is None


def test_without_a_gpu_the_next_smaller_divisor_is_named(config: KuavoSmolVLAConfig) -> None:
    plan, _ = freezing_of(config)
    assert fitting_batch(config, plan, 12, torch.device("cpu")) == 6
    assert fitting_batch(config, plan, 1, torch.device("cpu")) is None
