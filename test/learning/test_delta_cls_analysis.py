"""The analysis of CLS tokens: numbers that can be worked out, and what it writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.cls_analysis import (
    TokenTable,
    collect,
    effective_rank,
    figures,
    probe,
    reading,
    write_analysis,
)
from kuavo_smolvla_ros.learning.delta_stage import delta_stage
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy


def script() -> ModuleType:
    file = Path(__file__).parents[2] / "training" / "analyse_cls.py"
    spec = importlib.util.spec_from_file_location("analyse_cls", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(separate: float, n: int = 64) -> TokenTable:
    random = torch.Generator().manual_seed(0)
    task = np.arange(n) % 2 + 1
    shift = separate * torch.from_numpy(task - 1.5)[:, None].float()
    x, y = (torch.randn(n, 6, generator=random) + shift for _ in range(2))
    return TokenTable(x, y, x, x + 0.01 * y, task, np.arange(n) // 8)


def test_effective_rank_counts_directions() -> None:
    eye = torch.cat((torch.eye(4), -torch.eye(4)))
    assert effective_rank(eye) == pytest.approx(4.0)
    assert effective_rank(eye[:, :1]) == pytest.approx(1.0)
    assert effective_rank(torch.ones(5, 3)) == 0.0


def test_a_probe_finds_tasks_that_differ_and_none_that_do_not() -> None:
    apart, alike = table(6.0), table(0.0)
    assert probe(apart.observation, apart.task, apart.episode) == 1.0
    found = probe(alike.observation, alike.task, alike.episode)
    assert found is not None
    assert 0.2 < found < 0.8
    assert probe(apart.observation, np.ones(64, np.int64), apart.episode) is None
    assert probe(apart.observation, apart.task, np.zeros(64, np.int64)) is None


def test_the_same_sample_is_more_alike_than_another() -> None:
    found = figures(table(0.0))
    assert found["cosine_same_sample"] > 0.95
    assert abs(found["cosine_other_sample"]) < 0.3
    assert found["vicreg"]["covariance"] >= found["vicreg"]["covariance_floor"]
    assert found["largest_task_share"] == 0.5


def test_it_writes_picture_page_and_numbers(tmp_path: Path) -> None:
    found = write_analysis(table(6.0), {1: "one", 2: "two"}, tmp_path, "a <checkpoint>")
    assert (tmp_path / "cls_tsne.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "cls_report.html").read_text()
    assert "<svg" in page
    assert "a &lt;checkpoint&gt;" in page
    assert "names the task of 100%" in page
    assert json.loads((tmp_path / "cls_report.json").read_text()) == found


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UserError, match="too few"):
        _collected(count=3)


def _collected(count: int) -> TokenTable:
    from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

    config = KuavoSmolVLAConfig(backbone="tiny", device="cpu", train_delta_expert=True, use_cls_head=True)
    config.set_features(6, 6, {"head_cam_h": (32, 32)})
    policy = KuavoSmolVLAPolicy(config, statistics=Statistics.identity(config.widths))
    batch = {
        "observation.pixels": torch.zeros(count, 1, 3, 64, 64),
        "observation.state": torch.zeros(count, 6),
        "observation.language.tokens": torch.ones(count, 4, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(count, 4, dtype=torch.bool),
    }
    return collect(policy, [(batch, torch.zeros(count, 50, 32), [1] * count, range(count))])


def test_a_checkpoint_on_held_out_frames(tmp_path: Path) -> None:
    names = ("task1", "task2")
    sources = conflicting_tasks(names, episodes=6, length=6, extra_of_last=0)
    given = {
        "base": str(tmp_path),
        "policy": {"use_cls_head": True, "delta_num_layers": 2, "delta_refine_steps": 1},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "grad_clip_norm": 1.0},
        "schedule": {"warmup_steps": 2, "decay_steps": 100, "decay_lr": 1e-5},
        "training": {"epochs": 1, "max_steps": 1},
        "validation": {"freq_epochs": 1},
    }
    stage = delta_stage(synthetic_curriculum(1, extra_of_last=0)[1], given)
    manager = ReplayDatasetManager(stage, sources)
    config = stage.policy_config(device="cpu")
    config.set_features(6, 6, {"head_cam_h": (32, 32)})
    KuavoSmolVLAPolicy(config, statistics=Statistics.identity(config.widths)).save_pretrained(
        tmp_path / "best"
    )
    lines = script().analyse(str(tmp_path / "best"), manager, synthetic_run(tmp_path), tmp_path / "analysis")
    assert lines == reading(json.loads((tmp_path / "analysis" / "cls_report.json").read_text()))
    assert lines[0] == "24 held-out samples of 2 tasks"
