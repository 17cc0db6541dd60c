"""The loop: what a stage writes, what it leaves alone, and how it says that it cannot go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning import stage_run
from kuavo_smolvla_ros.learning.averaging import ResultWeights
from kuavo_smolvla_ros.learning.checkpointing import read_progress
from kuavo_smolvla_ros.learning.feed import places, seed_everything, step_noise
from kuavo_smolvla_ros.learning.interruption import Interruption, interruptible
from kuavo_smolvla_ros.learning.meters import Meters
from kuavo_smolvla_ros.learning.outputs import read_rows
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.learning.stage import BatchLayout, Initialisation, Stage, StageError
from kuavo_smolvla_ros.learning.stage_run import clear_stage, finished_results, run_stage
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.learning.trainer import StageTrainer, TrainingError
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

SMALL = {"episodes": 5, "length": 8}  # 32 frames to train on: one step of 32 is an epoch of the first stage


def short(stage: Stage, steps: int, **training: Any) -> Stage:
    return dataclasses.replace(
        stage, training=dataclasses.replace(stage.training, max_steps=steps, **training)
    )


@pytest.fixture
def stages() -> tuple[Stage, ...]:
    return tuple(short(stage, 4) for stage in synthetic_curriculum(freq_epochs=2))


@pytest.fixture
def sources() -> dict[str, TaskSource]:
    return conflicting_tasks([f"task{n}" for n in range(1, 5)], **SMALL)


@pytest.fixture
def train(tmp_path: Path, sources: dict[str, TaskSource]) -> Callable[..., Any]:
    def run(stage: Stage, *, root: Path = tmp_path, source: str | None = None, **settings: Any) -> Any:
        interruption = settings.pop("interruption", Interruption())
        said: list[str] = settings.pop("said", [])
        data = settings.pop("data", sources)
        run_settings = synthetic_run(root, **{"log_freq_steps": 1, "save_freq_steps": 2, **settings})
        return run_stage(
            stage,
            data,
            run_settings,
            root,
            Accelerator(cpu=True),
            source=source,
            when_learnt={},
            interruption=interruption,
            say=said.append,
        )

    return run


# What a stage writes


def test_a_stage_leaves_results_checkpoints_and_a_log(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    results = train(stages[0], save_freq_epochs=2)
    folder = tmp_path / "task1"
    assert {"best", "last", "epoch2", "epoch4", "training_results.json", "log.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert results == json.loads((folder / "training_results.json").read_text())
    assert (results["task_id"], results["task_name"]) == (1, "task1")
    assert results["language_instruction"] == stages[0].task.instruction
    assert results["description"] == stages[0].task.description
    assert (results["training_epochs"], results["learning_rate"]) == (16, 3e-3)
    validations = [row for row in read_rows(folder, "validation") if row["step"]]
    assert [row["step"] for row in validations] == [2, 4]
    assert results["best_loss"] == min(row["tasks"]["1"]["loss"] for row in validations)
    assert results["final_validation"] == {"1": validations[-1]["tasks"]["1"]["loss"]}
    assert results["reproduce"]["stage_hash"] == stages[0].hash
    for name in ("best", "last", "epoch2"):
        policy = KuavoSmolVLAPolicy.from_pretrained(folder / name)
        assert policy.statistics.sha256 == results["statistics_sha256"]
        assert policy.config.robot_fingerprint == "synthetic-6"
        assert stages[0].task.instruction in (folder / name / "README.md").read_text()


def test_rates_follow_the_schedule_and_vision_has_its_own(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    train(stages[0])
    schedule = stages[0].schedule.for_steps(4)
    for row in read_rows(tmp_path / "task1", "train"):
        wanted = 3e-3 * schedule.factor(row["step"] - 1, 3e-3)
        assert row["lr"] == pytest.approx(wanted)
        assert row["lr_by_group"] == pytest.approx({"main": wanted, "vision": wanted / 10})


def test_the_loss_falls(train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path) -> None:
    results = train(short(stages[0], 30))
    before = read_rows(tmp_path / "task1", "validation")[0]["tasks"]["1"]["loss"]
    assert results["best_loss"] < before / 2


def test_a_finished_stage_is_found_and_another_one_refused(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    assert finished_results(stages[0], tmp_path / "task1") is None
    results = train(stages[0])
    assert finished_results(stages[0], tmp_path / "task1") == results
    with pytest.raises(StageError, match=r"other settings \(training.max_steps was 4, is 6\)"):
        finished_results(short(stages[0], 6), tmp_path / "task1")
    clear_stage(tmp_path / "task1")
    assert finished_results(short(stages[0], 6), tmp_path / "task1") is None


# The curriculum's promises


def test_statistics_are_the_same_in_all_checkpoints_and_only_grow(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    source, found = None, []
    for stage in stages:
        train(short(stage, 2), source=source)
        source = str(tmp_path / stage.name / "best")
        found.append(KuavoSmolVLAPolicy.from_pretrained(source).statistics)
    assert found[0] == found[1] == found[2]
    assert found[0].sha256 == found[1].sha256 == found[2].sha256
    assert found[3]["observation.state"] == found[0]["observation.state"]
    first, last = found[0]["action"], found[3]["action"]
    assert (first.width, last.width) == (6, 8)  # the last task has two actions more
    assert last.mean[:6] == first.mean
    assert last.std[:6] == first.std


def test_frozen_parameters_do_not_change_by_one_bit(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    train(short(stages[0], 2))
    start = KuavoSmolVLAPolicy.from_pretrained(tmp_path / "task1" / "best")
    results = train(stages[1], source=str(tmp_path / "task1" / "best"))
    end = KuavoSmolVLAPolicy.from_pretrained(tmp_path / "task2" / "last")
    frozen = [name for name, p in end.named_parameters() if not p.requires_grad and "lm_head" not in name]
    assert any("vision_model.encoder.layers.0." in name for name in frozen)
    assert not any("vision_model.encoder.layers.3." in name for name in frozen)
    before, after = dict(start.named_parameters()), dict(end.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = [n for n, p in end.named_parameters() if p.requires_grad and not torch.equal(before[n], p)]
    assert len(moved) == sum(p.requires_grad for p in end.parameters())
    digest = hashlib.sha256()
    for name in frozen:
        digest.update(name.encode())
        digest.update(before[name].detach().numpy().tobytes())
    assert results["frozen_sha256"] == digest.hexdigest()
    moments = load_file(tmp_path / "task2" / "last" / "training_state" / "optimizer.safetensors")
    assert {name.rsplit(".", 1)[0] for name in moments}.isdisjoint(frozen)


def test_a_frozen_parameter_that_moves_is_an_error(
    train: Callable[..., Any], stages: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = StageTrainer.fit

    def tampered(self: StageTrainer) -> Any:
        progress = fit(self)
        frozen = next(p for n, p in self.policy.named_parameters() if "vision_model.encoder.layers.0." in n)
        frozen.data[0] += 1e-6
        return progress

    monkeypatch.setattr(StageTrainer, "fit", tampered)
    with pytest.raises(TrainingError, match="frozen parameters of task1 have changed"):
        train(stages[0])


def test_shares_are_realised_exactly(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    train(short(stages[0], 2))
    results = train(short(stages[1], 5), source=str(tmp_path / "task1" / "best"))
    assert results["shares_realised"] == pytest.approx({"task1": 0.2, "task2": 0.8}, abs=1e-12)
    rows = read_rows(tmp_path / "task2", "train")
    assert all(abs(row["realised_shares"]["1"] - 0.2) <= 1 / 32 for row in rows)
    assert all(row["loss_by_task"].keys() == {"1", "2"} for row in rows)
    for row in rows:  # the loss is the mean over samples, so it is the tasks' losses in their shares
        parts = sum(row["loss_by_task"][n] * row["realised_shares"][n] for n in ("1", "2"))
        assert parts == pytest.approx(row["loss"], rel=1e-5)


# Stopping and going on


def test_a_signal_finishes_the_step_saves_and_the_next_run_goes_on(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(stages[0], root=tmp_path / "whole")
    step = StageTrainer._step

    def signalled(self: StageTrainer, batches: Any) -> None:
        if self.progress.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, batches)

    with monkeypatch.context() as patch, interruptible() as interruption:
        patch.setattr(StageTrainer, "_step", signalled)
        assert train(stages[0], interruption=interruption) is None
    assert read_progress(tmp_path / "task1" / "last").step == 1
    assert finished_results(stages[0], tmp_path / "task1") is None
    said: list[str] = []
    results = train(stages[0], said=said)
    assert said[0] == "task1: goes on after step 1 of 4"
    assert results["best_validation"] == whole["best_validation"]
    losses = [
        [r["loss"] for r in read_rows(place / "task1", "train")] for place in (tmp_path / "whole", tmp_path)
    ]
    assert losses[0] == losses[1]


def test_the_second_signal_ends_the_process_at_once() -> None:
    with interruptible() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_going_on_with_other_settings_is_refused_by_name(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    stopped = Interruption()
    stopped.signal = signal.SIGINT
    assert train(stages[0], interruption=stopped) is None
    other = dataclasses.replace(stages[0], optimizer=dataclasses.replace(stages[0].optimizer, lr=1e-3))
    with pytest.raises(StageError, match=r"begun with other settings \(optimizer.lr was 0.003, is 0.001\)"):
        train(other)


def test_going_on_with_other_data_is_refused(
    train: Callable[..., Any], stages: tuple[Stage, ...], sources: dict[str, TaskSource]
) -> None:
    stopped = Interruption()
    stopped.signal = signal.SIGINT
    train(stages[0], interruption=stopped)
    with pytest.raises(StageError, match="a data set has grown or shrunk"):
        train(stages[0], data=conflicting_tasks(["task1"], episodes=6, length=8))


def test_an_average_of_weights_survives_a_stop(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    stage = short(stages[0], 4, ema_decay=0.9)
    train(stage, root=tmp_path / "whole")
    stopped = Interruption()
    stopped.signal = signal.SIGINT
    train(stage, interruption=stopped)
    train(stage)
    ours, theirs = (load_file(p / "task1/best/model.safetensors") for p in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = load_file(tmp_path / "task1/last/model.safetensors")
    assert any(not torch.equal(last[name], ours[name]) for name in ours)  # training goes on with its own


def test_the_result_is_drawn_back_to_the_stage_before(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    train(short(stages[0], 2))
    start = load_file(tmp_path / "task1/best/model.safetensors")
    train(short(stages[1], 2, interpolate_previous=0.25), source=str(tmp_path / "task1/best"))
    trained, result = (load_file(tmp_path / f"task2/{n}/model.safetensors") for n in ("last", "best"))
    for name in result:
        expected = trained[name].float() + 0.25 * (start[name].float() - trained[name].float())
        torch.testing.assert_close(result[name].float(), expected)


# Bad input


def poisoned(sources: dict[str, TaskSource], frames: set[int]) -> dict[str, TaskSource]:
    source = sources["task1"]

    class Poisoned:
        def __len__(self) -> int:
            return len(source.frames)

        def __getitem__(self, index: int) -> Any:
            sample = dict(source.frames[index])
            if index in frames:
                sample["action"] = sample["action"] * math.nan
            return sample

    return {**sources, "task1": dataclasses.replace(source, frames=Poisoned())}


def test_a_loss_that_is_not_finite_stops_names_the_sample_and_keeps_the_checkpoint(
    train: Callable[..., Any], stages: tuple[Stage, ...], sources: dict[str, TaskSource], tmp_path: Path
) -> None:
    stage = short(stages[0], 12, effective_batch_size=8)  # four steps to an epoch
    manager = ReplayDatasetManager(stage, sources)
    late = manager.plan.batch(3)[5].frame  # the first epoch's last batch
    with pytest.raises(
        TrainingError,
        match=rf"the loss of step 3 is not finite, from sample task1 frame {late}; the checkpoint",
    ):
        train(stage, data=poisoned(sources, {late}), batch_size=4, save_freq_steps=2, log_freq_steps=50)
    kept = tmp_path / "task1" / "last"
    assert read_progress(kept).step == 2
    assert all(torch.isfinite(p).all() for p in KuavoSmolVLAPolicy.from_pretrained(kept).parameters())
    assert not (tmp_path / "task1" / "training_results.json").exists()


def test_a_step_that_does_not_fit_into_memory_says_what_would(
    train: Callable[..., Any], stages: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: KuavoSmolVLAPolicy, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    forward = KuavoSmolVLAPolicy.forward
    monkeypatch.setattr(KuavoSmolVLAPolicy, "forward", full)
    monkeypatch.setattr(stage_run, "fitting_batch", lambda config, plan, batch, *rest: batch // 4)
    with pytest.raises(TrainingError, match=r"32 samples at a time do not fit .* run.batch_size=8 would fit"):
        train(stages[0])


def test_a_disk_that_gets_full_stops_after_saving(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="step 2 is saved"):
        train(stages[0], min_free_gib=1e9)
    assert read_progress(tmp_path / "task1" / "last").step == 2


def test_a_previous_checkpoint_of_another_robot_is_refused(
    train: Callable[..., Any], stages: tuple[Stage, ...], sources: dict[str, TaskSource], tmp_path: Path
) -> None:
    train(short(stages[0], 2))
    source = str(tmp_path / "task1" / "best")

    def other(**facts: Any) -> dict[str, TaskSource]:
        return {
            name: dataclasses.replace(s, facts=dataclasses.replace(s.facts, **facts))
            for name, s in sources.items()
        }

    with pytest.raises(
        StageError, match="trained for the robot with fingerprint synthetic-6, the data was recorded on x"
    ):
        train(stages[1], source=source, data=other(fingerprint="x"))
    names = tuple(reversed(sources["task1"].facts.state_names))
    with pytest.raises(StageError, match=r"trained with observation\.state\[0\] = "):
        train(stages[1], source=source, data=other(state_names=names))


def test_a_robot_that_is_not_the_datas_is_refused(
    train: Callable[..., Any], stages: tuple[Stage, ...]
) -> None:
    with pytest.raises(UserError, match=r"run\.robot=kuavo_sim has the state zarm_l1_joint"):
        train(stages[0], robot="kuavo_sim")


def test_data_of_no_robot_is_warned_about(
    train: Callable[..., Any],
    stages: tuple[Stage, ...],
    sources: dict[str, TaskSource],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = sources["task1"]
    bare = {"task1": dataclasses.replace(source, facts=dataclasses.replace(source.facts, fingerprint=None))}
    with caplog.at_level(logging.WARNING):
        train(short(stages[0], 1), data=bare)
    assert "do not say which robot they are from" in caplog.text


def test_a_missing_checkpoint_to_start_from_is_named(
    train: Callable[..., Any], stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder here nor a checkpoint"):
        train(stages[1], source=str(tmp_path / "nowhere"))
    with pytest.raises(StageError, match="train it first"):
        Initialisation("task", "task1").source(tmp_path)


# Parts


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_noise_belongs_to_the_sampler_s_places(
    stages: tuple[Stage, ...], sources: dict[str, TaskSource], devices: int
) -> None:
    plan = ReplayDatasetManager(stages[1], sources).plan
    layout = BatchLayout(4, 32 // (4 * devices), devices)
    for step in range(9):
        batch, seen = plan.batch(step), []
        for rank in range(devices):
            for micro in range(layout.accumulation):
                mine = places(step, layout, rank, micro)
                assert plan.part(step, layout, rank, micro) == batch[mine]
                seen += range(len(batch))[mine]
        assert sorted(seen) == list(range(32))


def test_noise_is_the_same_again_and_differs_between_steps_and_seeds() -> None:
    layout = BatchLayout(4, 2, 1)
    noise, times = step_noise(0, 3, layout, (5, 6))
    again, _ = step_noise(0, 3, layout, (5, 6))
    assert noise.shape == (8, 5, 6)
    assert times.shape == (8,)
    assert torch.equal(noise, again)
    for seed, step in ((0, 4), (1, 3)):
        assert not torch.equal(noise, step_noise(seed, step, layout, (5, 6))[0])


def test_other_chance_is_a_function_of_the_step_too() -> None:
    def dropped(*parts: int) -> torch.Tensor:
        torch.rand(7)  # whatever was drawn before
        seed_everything(*parts)
        return torch.nn.functional.dropout(torch.ones(100))

    assert torch.equal(dropped(0, 5, 0), dropped(0, 5, 0))
    assert not torch.equal(dropped(0, 5, 0), dropped(0, 5, 1))
    assert not torch.equal(dropped(0, 5, 0), dropped(0, 6, 0))


def test_meters_sum_up_and_remember_the_first_bad_step() -> None:
    accelerator = Accelerator(cpu=True)
    meters = Meters(2, 2, 3, torch.device("cpu"))
    tasks = torch.tensor([0, 1, 1])
    for step in range(4):
        for micro in range(2):
            losses = torch.tensor([1.0, 2.0, 3.0]) + step
            if step >= 2:
                losses[micro] = math.nan if step == 2 and micro == 1 else losses[micro]
                losses = losses * (math.nan if step == 3 else 1)
            meters.add_losses(losses, tasks)
        meters.end_step(step, torch.tensor(0.5))
        if step == 1:
            reading = meters.read(accelerator)
            assert reading.loss == pytest.approx(2.5)
            assert reading.grad_norm == 0.5
            assert reading.loss_sum_by_task == pytest.approx([6.0, 24.0])
            assert reading.bad_step is None
            assert not reading.bad_places.any()
    reading = meters.read(accelerator)
    assert reading.bad_step == 2
    assert reading.bad_places.nonzero().tolist() == [[0, 1, 1]]


def test_a_gradient_that_is_not_finite_counts_too() -> None:
    meters = Meters(1, 1, 1, torch.device("cpu"))
    meters.add_losses(torch.ones(1), torch.zeros(1, dtype=torch.long))
    meters.end_step(7, torch.tensor(math.inf))
    reading = meters.read(Accelerator(cpu=True))
    assert reading.bad_step == 7
    assert not reading.bad_places.any()


def test_result_weights_are_in_place_only_inside() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    result = ResultWeights({"w": weight}, decay=0.5, previous_share=0.25)
    result.start_from({"w": torch.full((3,), 8.0)})
    with torch.no_grad():
        weight += 4.0
    result.update()  # average 2
    with result.in_place():
        assert weight.tolist() == [2 + 0.25 * 6] * 3
    assert weight.tolist() == [4.0] * 3


def test_weights_are_put_back_after_an_error_too() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    result = ResultWeights({"w": weight}, decay=0.5, previous_share=None)
    with torch.no_grad():
        weight += 4.0

    def fail() -> None:
        with result.in_place():
            raise RuntimeError(str(weight.tolist()))

    with pytest.raises(RuntimeError, match=r"\[0.0, 0.0, 0.0\]"):
        fail()
    assert weight.tolist() == [4.0] * 3


def test_without_averaging_nothing_is_copied() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    result = ResultWeights({"w": weight}, None, None)
    pointer = weight.data_ptr()
    result.update()
    with result.in_place():
        assert weight.data_ptr() == pointer
        assert weight.tolist() == [1.0] * 3
    assert result.average is None


def test_shares_of_a_stage_are_exact_fractions(stages: tuple[Stage, ...]) -> None:
    assert stages[2].shares == (Fraction(1, 10), Fraction(1, 5), Fraction(7, 10))
