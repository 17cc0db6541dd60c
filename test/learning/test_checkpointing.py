"""Whatever a crash leaves, `last` is there and whole if it ever was."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from kuavo_smolvla_ros.learning import checkpointing
from kuavo_smolvla_ros.learning.checkpointing import (
    Progress,
    is_low,
    optimizer_tensors,
    read_progress,
    read_state,
    recover,
    replace_last,
    require_space,
    restore_optimizer,
    write_state,
)
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError, atomic_folder


class CrashError(Exception):
    pass


def save(stage: Path, step: int, keep: int = 2) -> None:
    fresh = stage / f".last.new.{step}"
    fresh.mkdir(parents=True)
    write_state(fresh, Progress("hash", step), {"w.step": torch.tensor(float(step))}, None)
    replace_last(stage, fresh, keep)


def test_keeps_the_last_and_as_many_earlier_ones_as_asked(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    assert read_progress(tmp_path / "last").step == 6
    assert sorted(folder.name for folder in (tmp_path / "steps").iterdir()) == ["00000004", "00000005"]


def test_keeps_no_earlier_one_when_none_is_asked_for(tmp_path: Path) -> None:
    for step in range(1, 4):
        save(tmp_path, step, keep=0)
    assert read_progress(tmp_path / "last").step == 3
    assert list((tmp_path / "steps").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_crash_at_any_operation_leaves_a_last_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """Every rename and removal is once the one that does not happen any more."""
    for crash_at in itertools.count():
        stage = tmp_path / str(crash_at)
        save(stage, 1, keep)
        save(stage, 2, keep)
        count = 0

        def counted(function):  # type: ignore[no-untyped-def]
            def run(*args, **kwargs):  # type: ignore[no-untyped-def]
                nonlocal count
                if count == crash_at:  # noqa: B023
                    raise CrashError
                count += 1
                return function(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                save(stage, 3, keep)
                crashed = False
            except CrashError:
                crashed = True
        recover(stage, "best", "last")
        assert read_progress(stage / "last").step in (2, 3)
        moments, _ = read_state(stage / "last")
        assert float(moments["w.step"]) == read_progress(stage / "last").step
        assert not [p for p in stage.iterdir() if p.name.startswith(".last")]
        save(stage, 4, keep)  # and it goes on
        assert read_progress(stage / "last").step == 4
        if not crashed:
            assert crash_at > 2
            break


def test_a_best_lost_between_two_renames_is_found_again(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "best") as fresh:
        (fresh / "mark").write_text("first")
    old = tmp_path / ".best.old.x"
    old.mkdir()
    os.replace(tmp_path / "best", old / "best")  # and here the process died
    recover(tmp_path, "best", "last")
    assert (tmp_path / "best" / "mark").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_nothing_is_recovered_where_nothing_was(tmp_path: Path) -> None:
    recover(tmp_path / "absent", "best", "last")
    recover(tmp_path, "best", "last")
    assert list(tmp_path.iterdir()) == []


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizer_of(model: nn.Module) -> tuple[torch.optim.AdamW, dict[torch.Tensor, str]]:
    first, second = list(model.children())
    groups = [{"params": list(first.parameters())}, {"params": list(second.parameters()), "lr": 0.5}]
    return torch.optim.AdamW(groups, lr=0.1), {p: n for n, p in model.named_parameters()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    model = network()
    optimizer, names = optimizer_of(model)
    for seed in range(3):
        step(model, optimizer, seed)
    folder = tmp_path / "last"
    folder.mkdir()
    write_state(folder, Progress("hash", 3), optimizer_tensors(optimizer, names), None)
    other = network()
    other.load_state_dict(model.state_dict())
    restored, other_names = optimizer_of(other)
    moments, average = read_state(folder)
    assert average is None
    restore_optimizer(restored, other_names, moments)
    step(model, optimizer, 9)
    step(other, restored, 9)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model = network()
    optimizer, names = optimizer_of(model)
    step(model, optimizer, 0)
    moments = optimizer_tensors(optimizer, names)
    del moments["1.bias.exp_avg"]
    with pytest.raises(CheckpointError, match=r"1 entries differ, first 1.bias.exp_avg"):
        restore_optimizer(optimizer, names, moments)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "last" / "training_state" / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="the training state cannot be read"):
        read_state(tmp_path / "last")


def test_progress_of_another_version_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "last" / "training_state" / "progress.json"
    file.write_text('{"stage_hash": "x", "something": 1}')
    with pytest.raises(CheckpointError, match="another version"):
        read_progress(tmp_path / "last")


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"a checkpoint takes 1048576.0 GiB"):
        require_space(tmp_path, 2**50)
    free_gib = shutil.disk_usage(tmp_path).free / checkpointing.GIB
    assert is_low(tmp_path, free_gib + 100)
    assert not is_low(tmp_path, 0)
