"""What a delta expert is trained on where one robot stands and another walks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.learning.delta_cache import cache_task
from kuavo_smolvla_ros.learning.delta_data import DeltaDataset, DeltaPreprocess
from kuavo_smolvla_ros.learning.drift import stage_statistics
from kuavo_smolvla_ros.learning.mixed_dataset import Standing, collate
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.learning.stage import TaskData
from kuavo_smolvla_ros.learning.synthetic import synthetic_run
from kuavo_smolvla_ros.policy.delta_policy import BASE_CHUNKS
from kuavo_smolvla_ros.policy.loss import valid_entries
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors
from kuavo_smolvla_ros.policy.steps import TokenizeInstruction

BASE = ("base_x", "base_y", "base_yaw", "base_move")
UNITS = dict(zip(BASE, ("m", "m", "rad", "flag"), strict=True))
FRAMES = np.arange(6)


@pytest.fixture(scope="module")
def sources(make_source: Callable[..., TaskSource]) -> tuple[TaskSource, TaskSource]:
    """A robot that stands, and one that also walks."""
    names = tuple(f"joint_{i}" for i in range(16)) + BASE
    return make_source(1), make_source(2, action_dim=20, action_names=names, units=UNITS)


@pytest.fixture(scope="module")
def tasks(make_task: Callable[..., TaskData]) -> tuple[TaskData, TaskData]:
    return make_task(1), make_task(2)


@pytest.fixture(scope="module")
def policy(sources: tuple[TaskSource, TaskSource], make_stage: Any, tasks: Any) -> KuavoSmolVLAPolicy:
    torch.manual_seed(0)
    stage = make_stage("0.25", "0.75", tasks=tasks)
    config = stage.policy_config(
        backbone="tiny",
        device="cpu",
        chunk_size=4,
        n_action_steps=2,
        train_delta_expert=True,
        num_action_context=2,
    )
    config.set_features(16, 20, dict(sources[0].facts.cameras))
    return KuavoSmolVLAPolicy(config, statistics=stage_statistics(sources))


@pytest.fixture(scope="module")
def cached(policy: Any, sources: Any, tasks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the base says, in a mix with these sources."""
    folder = tmp_path_factory.mktemp("cache")
    preprocess, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    run = synthetic_run(folder, batch_size=4, num_workers=0, min_free_gib=0.0, device="cpu")

    def fill(mix: Any = sources) -> list[Any]:
        return [
            cache_task(
                policy, task, source, FRAMES, preprocess, run, folder,
                standing=Standing(mix), base="base", draws=2, seed=0, say=lambda text: None,
            )
            for task, source in zip(tasks, sources, strict=True)
        ]  # fmt: skip

    return fill


@pytest.fixture
def batch(policy: Any, sources: Any, tasks: Any, cached: Any) -> dict[str, Any]:
    """Both robots' frames, ready for the policy."""
    dataset = DeltaDataset(tasks, sources, cached(), Standing(sources), 1, 16)
    preprocess, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    (tokenize,) = (step for step in preprocess.steps if isinstance(step, TokenizeInstruction))
    ready = DeltaPreprocess(policy.statistics, tokenize, torch.device("cpu"))
    return ready(collate([dataset[Draw(task, 2, 0)] for task in (0, 1)]))


def test_a_robot_without_a_base_says_that_it_stands(batch: dict[str, Any], policy: Any) -> None:
    flag = policy.statistics["action"]
    assert not batch["action_dim_is_pad"][:, :20].any()
    assert batch["action"][0, :, 19].eq((0 - flag.mean[19]) / flag.std[19]).all()
    valid = valid_entries(batch["action_is_pad"], batch["action_dim_is_pad"])
    assert valid[0, 0].sum() == 20
    assert valid[1, 0].sum() == 20


def test_the_base_decides_the_flag_as_it_does_when_it_runs(batch: dict[str, Any]) -> None:
    chunks = batch[BASE_CHUNKS][0]
    assert chunks[..., 16:20].abs().min() > 0
    assert not chunks[..., 20:].any()


def test_it_all_trains(batch: dict[str, Any], policy: Any) -> None:
    loss, _ = policy.train()(batch)
    policy.eval()
    assert torch.isfinite(loss)


def test_another_mix_is_another_cache(cached: Any, sources: Any) -> None:
    """What the base is free to say depends on it."""
    mixed, alone = cached()[0], cached(sources[:1])[0]
    assert mixed.chunks[..., 19].any()
    assert not alone.chunks[..., 19].any()
    assert np.array_equal(mixed.action, alone.action)
    assert mixed.action.shape[-1] == 16  # the robot's own


def test_what_a_source_is_known_to_be_zero_in(sources: Any) -> None:
    narrow, wide = sources
    assert Standing(sources).known(narrow) == (16, 17, 18, 19)
    assert Standing(sources).known(wide) == ()
    assert Standing([narrow]).known(narrow) == ()
