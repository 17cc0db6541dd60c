from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kuavo_smolvla_ros.experiment.eyes import base_config, learn_to_see
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.experiment.ways import TASK_FILES
from kuavo_smolvla_ros.policy.build import WEIGHTS_FILE, new_network, read_policy_weights
from kuavo_smolvla_ros.policy.plain_smolvla import read_config

QUICK = SeeingSettings(steps=12, batch=8, warmup=2)


@pytest.fixture(scope="module")
def folders(demonstrations: Path) -> list[Path]:
    return [demonstrations / name for name in TASK_FILES]


def test_seeing_improves_and_is_stored_as_a_start(folders: list[Path], tmp_path: Path) -> None:
    losses: list[float] = []
    config = base_config(folders[0])
    errors = learn_to_see(folders, config, QUICK, tmp_path / "seeing", losses.append)
    assert len(losses) == QUICK.steps
    assert losses[-1] < losses[0]
    assert set(errors) == set(TASK_FILES)
    assert errors[TASK_FILES[2]].keys() == {"square", "back_bottle_1"}
    assert all(error >= 0 for of_task in errors.values() for error in of_task.values())
    assert errors[TASK_FILES[3]] == {}  # its only episode was learnt from
    stored = read_config(tmp_path / "seeing")
    assert not stored.plain
    assert stored.config.cameras == config.cameras
    assert not (tmp_path / "seeing" / "statistics.json").exists()


def test_only_eyes_have_learnt(folders: list[Path], tmp_path: Path) -> None:
    learn_to_see(folders[:1], base_config(folders[0]), QUICK, tmp_path / "seeing")
    torch.manual_seed(QUICK.seed)
    fresh = dict(new_network(base_config(folders[0])).named_parameters())
    stored = read_policy_weights(tmp_path / "seeing" / WEIGHTS_FILE)
    changed = {name for name, tensor in stored.items() if not torch.equal(tensor, fresh[name])}
    assert changed
    assert all("vision_model" in name or ".connector." in name for name in changed)
    assert any("connector" in name for name in changed)


def test_the_same_seed_learns_the_same(folders: list[Path], tmp_path: Path) -> None:
    for place in ("a", "b"):
        learn_to_see(folders[2:3], base_config(folders[2]), QUICK, tmp_path / place)
    first, second = (read_policy_weights(tmp_path / place / WEIGHTS_FILE) for place in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
