"""A delta expert through the same trainer, on cached outputs that are the live ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.curriculum_run import make_accelerator, run_stages
from kuavo_smolvla_ros.learning.delta_cache import base_sha256
from kuavo_smolvla_ros.learning.delta_run import delta_root, make_feed, train_delta
from kuavo_smolvla_ros.learning.delta_stage import (
    CacheSettings,
    DeltaRequest,
    delta_stage,
    read_delta_request,
)
from kuavo_smolvla_ros.learning.feed import make_loader
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.outputs import read_rows, scalars
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.sources import DataError
from kuavo_smolvla_ros.learning.stage import StageError
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.policy.build import read_policy_weights
from kuavo_smolvla_ros.policy.delta_network import is_delta_name
from kuavo_smolvla_ros.policy.delta_policy import BASE_CHUNKS, IMAGE_TOKENS, KNOWN_AGES, LATER_STATES
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

GIVEN: dict[str, Any] = {
    "base": None,
    "policy": {
        "delta_target": "demonstration",
        "delta_refine_steps": 1,
        "delta_max_age": 2,
        "delta_num_layers": 2,
        "use_cls_head": True,
    },
    "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "grad_clip_norm": 1.0},
    "schedule": {"warmup_steps": 2, "decay_steps": 100, "decay_lr": 1e-5},
    "training": {"epochs": 8, "max_steps": 4},
    "validation": {"freq_epochs": 8},
}
CACHE = CacheSettings(None, 2, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Two stages of two steps, and the data; task 2 is wider."""
    root = tmp_path_factory.mktemp("base")
    sources = conflicting_tasks(("task1", "task2"), episodes=5, length=8)
    stages = tuple(
        dataclasses.replace(stage, training=dataclasses.replace(stage.training, max_steps=2))
        for stage in synthetic_curriculum(1)[:2]
    )
    run = synthetic_run(root, log_freq_steps=1)
    accelerator = make_accelerator(stages, run)
    assert run_stages(
        stages,
        run,
        accelerator,
        lambda task, chunk: sources[task.name],
        interruption=Interruption(),
        say=lambda text: None,
    )
    return root, stages, sources


def request_of(stage: Any, root: Path, **changes: Any) -> DeltaRequest:
    given = {**GIVEN, **changes}
    return DeltaRequest(stage, delta_stage(stage, given), CACHE, synthetic_run(root, log_freq_steps=1))


def train(request: DeltaRequest, sources: Any, said: list[str] | None = None, **kwargs: Any) -> Any:
    return train_delta(
        request,
        make_accelerator([request.stage], request.run),
        lambda task, chunk: sources[task.name],
        interruption=kwargs.pop("interruption", Interruption()),
        say=(said if said is not None else []).append,
        **kwargs,
    )


def link(root: Path, here: Path) -> Path:
    """A folder of its own with the same trained stages."""
    for stage in ("task1", "task2"):
        (here / stage).symlink_to(root / stage)
    return here


def test_after_any_stage_it_trains_and_the_base_is_the_same(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    for stage in stages:
        request = request_of(stage, link(root, tmp_path) if stage is stages[0] else tmp_path)
        results = train(request, sources)
        folder = delta_root(request.run) / f"{stage.name}_delta"
        base = read_policy_weights(root / stage.name / "best" / "model.safetensors")
        after = read_policy_weights(folder / "last" / "model.safetensors")
        assert {n for n in after if not is_delta_name(n)} == set(base)
        assert all(torch.equal(base[name], after[name]) for name in base)
        assert after["delta_action_out_proj.weight"].abs().max() > 0
        assert results["steps"] == 4
        policy = KuavoSmolVLAPolicy.from_pretrained(folder / "best")
        assert policy.config.delta_refine_steps == 1
    assert not list(tmp_path.glob("*/delta*"))  # the curriculum's report does not take it for a stage


def test_the_log_holds_all_its_numbers(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    request = request_of(stages[0], link(root, tmp_path))
    train(request, sources)
    rows = read_rows(delta_root(request.run) / "task1_delta", "train")
    assert len(rows) == 4
    names = {name for name, _ in scalars(rows[-1])}
    for name in (
        "delta_loss",
        "delta_losses_after_forward",
        "delta_losses_after_in_ep_bound",
        "delta_losses_after_rm_padding",
        "vicreg_invariance",
        "vicreg_variance",
        "vicreg_covariance",
        "vicreg_covariance_floor",
        "cls_cosine",
    ):
        assert f"train/{name}" in names
    assert rows[0]["numbers"]["delta_loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)


def test_what_is_cached_is_what_the_base_says(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    request = request_of(stages[1], link(root, tmp_path))
    manager = ReplayDatasetManager(request.stage, sources)
    accelerator = make_accelerator([request.stage], request.run)
    policy = KuavoSmolVLAPolicy.from_pretrained(
        root / "task2" / "best", overrides=dict(request.stage.policy) | {"unfreeze_vision_layers": None}
    )
    said: list[str] = []
    feed = make_feed(policy, manager, run=request.run, cache=CACHE, accelerator=accelerator, say=said.append)
    assert len(said) == 2
    frame = int(manager.training_frames[0][3])
    draws = [[Draw(0, frame, 0), Draw(1, frame, 0)]]
    batch = feed.preprocess(next(iter(make_loader(feed.samples, draws, request.run, accelerator.device))))
    preprocess, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    from kuavo_smolvla_ros.learning.mixed_dataset import MixedDataset

    live = preprocess(
        next(iter(make_loader(MixedDataset.of_manager(manager), draws, request.run, accelerator.device)))
    )
    for key in ("observation.state", "action", "action_is_pad", "observation.language.tokens"):
        assert torch.equal(batch[key], live[key]), key
    with torch.no_grad():
        # Another number of pictures at a time may be multiplied by another library.
        assert torch.allclose(batch[IMAGE_TOKENS], policy.image_tokens(live), atol=1e-5)
        from kuavo_smolvla_ros.learning.validation import fixed_noise

        for place, name in enumerate(("task1", "task2")):
            shape = (policy.config.chunk_size, policy.config.max_action_dim)
            noise, _ = fixed_noise(0, name, [frame], 2, shape)
            one = {k: v[place : place + 1] for k, v in live.items() if isinstance(v, torch.Tensor)}
            for draw in range(2):
                policy.predict_action_chunk(one, noise[:, draw])
                kept = policy.refinable
                assert kept is not None
                assert torch.allclose(batch[BASE_CHUNKS][place, draw], kept.chunk[0], atol=1e-5)
    assert torch.equal(batch[LATER_STATES][:, 0], batch["observation.state"])
    assert batch[LATER_STATES].shape[1] == 3
    # The cache is used again, and another base has another.
    make_feed(policy, manager, run=request.run, cache=CACHE, accelerator=accelerator, say=said.append)
    assert len(said) == 2
    before = base_sha256(policy)
    with torch.no_grad():
        policy.model.delta_action_in_proj.weight.add_(1.0)
    assert base_sha256(policy) == before
    with torch.no_grad():
        policy.model.state_proj.bias.add_(1e-3)
    assert base_sha256(policy) != before


def test_later_states_end_with_the_episode(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    request = request_of(stages[0], link(root, tmp_path))
    manager = ReplayDatasetManager(request.stage, sources)
    policy = KuavoSmolVLAPolicy.from_pretrained(
        root / "task1" / "best", overrides=dict(request.stage.policy) | {"unfreeze_vision_layers": None}
    )
    feed = make_feed(
        policy,
        manager,
        run=request.run,
        cache=CACHE,
        accelerator=make_accelerator([request.stage], request.run),
        say=lambda text: None,
    )
    frames, episodes = manager.training_frames[0], sources["task1"].episodes
    last = int(frames[np.flatnonzero(episodes[frames] == episodes[frames[0]])[-1]])
    for frame, known in ((last, 1), (last - 1, 2), (last - 2, 3), (last - 3, 3)):
        sample = feed.samples[Draw(0, frame, 0)]
        assert sample[KNOWN_AGES] == known
        for age in range(known):
            own = sources["task1"].frames[frame + age]["observation.state"]
            assert torch.equal(sample[LATER_STATES][age], own)


def test_stopped_and_continued_it_ends_the_same(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    weights = {}
    for name, stops in (("whole", False), ("parts", True)):
        (tmp_path / name).mkdir()
        request = request_of(stages[0], link(root, tmp_path / name))
        if stops:
            first = dataclasses.replace(request, run=synthetic_run(tmp_path / name, log_freq_steps=1))
            interruption = Interruption()
            interruption._ask(15, None)  # before the first step: it stops after it
            assert train(first, sources, interruption=interruption) is None
        results = train(request, sources)
        assert results["steps"] == 4
        folder = delta_root(request.run) / "task1_delta"
        weights[name] = read_policy_weights(folder / "last" / "model.safetensors")
    assert all(torch.equal(weights["whole"][n], weights["parts"][n]) for n in weights["whole"])


@pytest.mark.slow
def test_finished_is_finished_until_the_base_is_another(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    import shutil

    shutil.copytree(root / "task1", tmp_path / "task1")
    request = request_of(stages[0], tmp_path)
    train(request, sources)
    said: list[str] = []
    train(request, sources, said)
    assert "finished already" in said[0]
    file = tmp_path / "task1" / "best"
    policy = KuavoSmolVLAPolicy.from_pretrained(file)
    with torch.no_grad():
        policy.model.state_proj.bias.add_(0.5)
    policy.save_pretrained(file)
    with pytest.raises(StageError, match="refines another base"):
        train(request, sources)
    train(request, sources, restart=True)


def test_with_a_cls_head_a_batch_goes_through_at_once(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    request = request_of(stages[0], link(root, tmp_path))
    small = dataclasses.replace(request, run=synthetic_run(tmp_path, batch_size=16))
    with pytest.raises(UsageError, match=r"set run\.batch_size=32"):
        train(small, sources)


def test_a_full_disk_is_told_before_anything_is_written(trained: Any, tmp_path: Path) -> None:
    root, stages, sources = trained
    request = request_of(stages[0], link(root, tmp_path))
    request = dataclasses.replace(request, run=synthetic_run(tmp_path, min_free_gib=1e9))
    with pytest.raises(DataError, match=r"delta\.cache\.folder"):
        train(request, sources)


class TestRequest:
    def test_the_package_s_own(self) -> None:
        request = read_delta_request(["task=tasks/task2_weighing", "delta.policy.use_cls_head=true"])
        fields = dict(request.stage.policy)
        assert request.stage.name == "task2_weighing_delta"
        assert request.stage.init.target == "task2_weighing"
        assert request.stage.task_names == ("task1_moving_grasp", "task2_weighing")
        assert fields["train_delta_expert"]
        assert fields["use_cls_head"]
        assert fields["cls_expander_width"] == 128
        assert "unfreeze_vision_layers" not in fields
        assert all(task.sentences == (task.instruction,) for task in request.stage.tasks)
        request.stage.policy_config(device="cpu")

    def test_a_checkpoint_may_be_given(self) -> None:
        request = read_delta_request(["task=tasks/task1_moving_grasp", "delta.base=/data/base"])
        assert request.stage.init.source(Path("outputs")) == "/data/base"

    @pytest.mark.parametrize(
        ("overrides", "complaint"),
        [
            (["stages=all"], "one stage's result"),
            (["task=tasks/task1_moving_grasp", "delta.policy.nonsense=1"], "nonsense"),
            (["task=tasks/task1_moving_grasp", "delta.cache.draws=0"], "at least 1"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, overrides: list[str], complaint: str) -> None:
        with pytest.raises(UsageError, match=complaint):
            read_delta_request(overrides)
