"""Stages as data: checks, hashes, lengths, starts, schedules, references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.schedule import Schedule
from kuavo_smolvla_ros.learning.stage import (
    Adapter,
    Initialisation,
    Stage,
    StageError,
    TaskData,
    Thresholds,
    check_curriculum,
    joint,
    single_task,
    without_replay,
)

MakeStage = Callable[..., Stage]
MakeTask = Callable[..., TaskData]


def test_a_stage_is_immutable_and_hashable(make_stage: MakeStage) -> None:
    stage = make_stage("0.2", "0.8")
    with pytest.raises(FrozenInstanceError):
        stage.name = "other"  # type: ignore[misc]
    assert {stage: 1}[make_stage("0.2", "0.8")] == 1


def test_the_hash_is_stable_across_processes(make_stage: MakeStage) -> None:
    # A changed number here means that finished stages of users are no longer recognised.
    assert make_stage("0.2", "0.8").hash == "197b675b1f133384"


@pytest.mark.parametrize(
    "change",
    [
        {"shares": (Fraction(3, 10), Fraction(7, 10))},
        {"init": Initialisation("pretrained", "lerobot/smolvla_base")},
        {"schedule": Schedule(1500, 25_000, 2e-6)},
        {"policy": (("unfreeze_vision_layers", (-1,)),)},
        {"buffer_frames": 100},
        {"adapter": Adapter(8, 8.0, ("q_proj",))},
        {"thresholds": Thresholds(0.5, 0.7, 0.9)},
    ],
)
def test_the_hash_changes_with_whatever_changes_the_result(
    make_stage: MakeStage, change: dict[str, object]
) -> None:
    stage = make_stage("0.2", "0.8")
    assert replace(stage, **change).hash != stage.hash  # type: ignore[arg-type]


def test_the_hash_sees_seeds_and_instructions_but_not_where_data_lies(
    make_stage: MakeStage, make_task: MakeTask
) -> None:
    stage = make_stage("1")
    assert make_stage("1", training={"seed": 4}).hash != stage.hash
    assert make_stage("1", tasks=(make_task(1, instruction="other"),)).hash != stage.hash
    assert make_stage("1", tasks=(make_task(1, datasets=("/elsewhere",)),)).hash == stage.hash


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (("0.2", "0.7"), "the replay shares of task2 sum to 0.9 instead of 1 (task1 0.2, task2 0.7)"),
        (("0.3", "0.8"), "sum to 1.1"),
        (("-0.1", "1.1"), "negative for task1"),
        (("1", "0"), "gives its own task task2 no share"),
        (("1/3", "0.6667"), "sum to 1.00003"),
    ],
)
def test_shares_must_be_shares(make_stage: MakeStage, shares: tuple[str, ...], message: str) -> None:
    with pytest.raises(StageError) as raised:
        make_stage(*shares)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_shares_that_sum_to_one_exactly_are_taken(make_stage: MakeStage, parts: list[int]) -> None:
    shares = [str(Fraction(part, sum(parts))) for part in parts]
    assert sum(make_stage(*shares).shares) == 1


def test_decimal_shares_mean_what_is_written(make_stage: MakeStage) -> None:
    assert make_stage("0.1", "0.1", "0.2", "0.6").shares == tuple(Fraction(n, 10) for n in (1, 1, 2, 6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "  "}, "empty instruction"),
        ({"paraphrases": ("ok", "")}, "empty instruction, paraphrase or hold sentence"),
        ({"name": "a/b"}, "names a folder"),
        ({"datasets": ()}, "names no data set"),
        ({"datasets": ("x", "x")}, "names a data set twice"),
        ({"held_out_share": 0.0}, "held_out_share"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"paraphrase_share": 1.5}, "paraphrase_share"),
    ],
)
def test_a_task_that_cannot_be_is_refused(make_task: MakeTask, fields: dict, message: str) -> None:
    with pytest.raises(StageError, match=message):
        make_task(1, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "training.epochs is 0"),
        ({"max_steps": 0}, "training.max_steps is 0"),
        ({"ema_decay": 1.0}, "training.ema_decay"),
        ({"interpolate_previous": -0.1}, "training.interpolate_previous"),
        ({"precision": "fp8"}, "training.precision is 'fp8'"),
    ],
)
def test_training_settings_have_bounds(make_stage: MakeStage, fields: dict, message: str) -> None:
    with pytest.raises(StageError, match=message):
        make_stage("1", training=fields)


@pytest.mark.parametrize("numbers", [(0.5, 0.8, 0.7), (0.5, 0.0, 0.7), (0.0, 0.7, 0.8)])
def test_thresholds_must_rise(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(StageError, match="retained_below"):
        Thresholds(*numbers)


@pytest.mark.parametrize("ratios", [(1.4, None), (None, 1.4), (0.9, 1.4), (1.6, 1.4), (0.0, 1.4)])
def test_ratio_thresholds_come_in_pairs_and_rise(ratios: tuple[float | None, float | None]) -> None:
    with pytest.raises(StageError, match="retained_ratio"):
        Thresholds(0.5, 0.7, 0.8, *ratios)


class TestLength:
    def test_replay_comes_on_top_of_the_new_task(self, make_stage: MakeStage) -> None:
        alone = make_stage("1", training={"epochs": 10, "effective_batch_size": 64})
        mixed = make_stage("0.2", "0.8", training={"epochs": 10, "effective_batch_size": 64})
        assert alone.total_steps(6400) == 1000
        assert mixed.total_steps(6400) == 1250

    def test_an_epoch_is_rounded_up(self, make_stage: MakeStage) -> None:
        stage = make_stage("1", training={"epochs": 1, "effective_batch_size": 64})
        assert [stage.steps_per_epoch(n) for n in (1, 64, 65)] == [1, 1, 2]

    def test_no_floating_point_in_the_length(self, make_stage: MakeStage) -> None:
        # 0.1 * 10 samples per step are one: 7 samples are 7 steps, not 8.
        stage = make_stage("0.9", "0.1", training={"epochs": 1, "effective_batch_size": 10})
        assert stage.steps_per_epoch(7) == 7

    def test_max_steps_cuts_and_does_not_lengthen(self, make_stage: MakeStage) -> None:
        stage = make_stage("1", training={"epochs": 3, "effective_batch_size": 1, "max_steps": 20})
        assert (stage.total_steps(100), stage.total_steps(2)) == (20, 6)

    def test_no_sample_is_an_error(self, make_stage: MakeStage) -> None:
        with pytest.raises(StageError, match="task1 has no training sample"):
            make_stage().total_steps(0)

    @given(st.integers(1, 10**6), st.integers(1, 9), st.integers(1, 256))
    def test_an_epoch_sees_every_sample_and_hardly_more(
        self, make_stage: MakeStage, samples: int, tenths: int, batch: int
    ) -> None:
        share = Fraction(tenths, 10)
        stage = make_stage(str(1 - share), str(share), training={"epochs": 1, "effective_batch_size": batch})
        steps = stage.steps_per_epoch(samples)
        assert steps * batch * share >= samples > (steps - 1) * batch * share


class TestLayout:
    @pytest.mark.parametrize(
        ("per_device", "devices", "accumulation"), [(16, 1, 4), (16, 4, 1), (8, 2, 4), (64, 1, 1)]
    )
    def test_the_effective_batch_is_kept(
        self, make_stage: MakeStage, per_device: int, devices: int, accumulation: int
    ) -> None:
        layout = make_stage(training={"effective_batch_size": 64}).training.layout(per_device, devices)
        assert (layout.accumulation, layout.total) == (accumulation, 64)

    @pytest.mark.parametrize(("per_device", "devices"), [(24, 1), (16, 3), (128, 1), (0, 1)])
    def test_a_batch_that_cannot_be_made_is_an_error(
        self, make_stage: MakeStage, per_device: int, devices: int
    ) -> None:
        training = make_stage(training={"effective_batch_size": 64}).training
        with pytest.raises(StageError, match=r"set run\.batch_size") as raised:
            training.layout(per_device, devices)
        assert "64" in str(raised.value)


class TestStart:
    def test_a_task_s_best_checkpoint(self, tmp_path: Path) -> None:
        folder = tmp_path / "task1" / "best"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text("{}")
        assert Initialisation("task", "task1").source(tmp_path) == str(folder)

    def test_a_stage_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match="task=tasks/task1") as raised:
            Initialisation("task", "task1").source(tmp_path)
        assert str(tmp_path / "task1" / "best") in str(raised.value)

    def test_an_interrupted_checkpoint_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "task1" / "best").mkdir(parents=True)
        (tmp_path / "task1" / "best" / "model.safetensors").touch()
        with pytest.raises(StageError, match="there is no checkpoint"):
            Initialisation("task", "task1").source(tmp_path)

    @pytest.mark.parametrize(
        ("start", "source"),
        [
            (Initialisation("pretrained", "lerobot/smolvla_base"), "lerobot/smolvla_base"),
            (Initialisation("path", "/a"), "/a"),
            (Initialisation("scratch"), None),
        ],
    )
    def test_other_starts(self, tmp_path: Path, start: Initialisation, source: str | None) -> None:
        assert start.source(tmp_path) == source


class TestSchedule:
    schedule = Schedule(1500, 25_000, 1e-6)

    def test_ends_of_the_curve(self) -> None:
        lr = [self.schedule.factor(step, 5e-5) * 5e-5 for step in (0, 1499, 1500, 25_000, 99_999)]
        assert lr[0] == pytest.approx(5e-5 / 1501)
        assert lr[1] < lr[2] == 5e-5
        assert lr[3] == lr[4] == pytest.approx(1e-6)

    def test_half_way_is_half_way_between_peak_and_floor(self) -> None:
        middle = 1500 + (25_000 - 1500) // 2
        assert self.schedule.factor(middle, 5e-5) * 5e-5 == pytest.approx((5e-5 + 1e-6) / 2)

    @given(st.integers(1, 60_000))
    def test_every_stage_reaches_the_floor_by_its_end(self, steps: int) -> None:
        own = self.schedule.for_steps(steps)
        # After the last step; a longer stage has been there for some time.
        assert own.factor(steps, 5e-5) == pytest.approx(0.02)
        if steps < self.schedule.decay_steps:
            assert own.decay_steps == steps
            assert abs(own.warmup_steps / steps - 1500 / 25_000) <= 1 / steps
        else:
            assert own == self.schedule

    @given(st.integers(2, 3000), st.floats(1e-6, 1e-3))
    def test_rises_then_falls_and_stays_positive(self, steps: int, peak: float) -> None:
        own = self.schedule.for_steps(steps)
        factors = [own.factor(step, peak) for step in range(steps)]
        top = own.warmup_steps
        assert factors[: top + 1] == sorted(factors[: top + 1])
        assert factors[top:] == sorted(factors[top:], reverse=True)
        assert min(factors) > 0
        assert max(factors) <= 1

    def test_a_peak_below_the_floor_stays_where_it_is(self) -> None:
        assert self.schedule.factor(20_000, 5e-7) == 1.0

    @pytest.mark.parametrize("bad", [(10, 10, 1e-6), (-1, 10, 1e-6), (1, 10, -1.0)])
    def test_impossible_schedules(self, bad: tuple[int, int, float]) -> None:
        with pytest.raises(UserError, match=r"schedule\."):
            Schedule(*bad)

    def test_no_steps_no_schedule(self) -> None:
        with pytest.raises(UserError, match="0 steps"):
            self.schedule.for_steps(0)


class TestReferences:
    def test_without_replay_still_validates_all(self, make_stage: MakeStage) -> None:
        stage = without_replay(make_stage("0.1", "0.2", "0.7"))
        assert stage.shares == (0, 0, 1)
        assert stage.task_names == ("task1", "task2", "task3")

    def test_single_task_knows_nothing_else(self, make_stage: MakeStage) -> None:
        first = make_stage("1", init=Initialisation("pretrained", "base"))
        stage = single_task(make_stage("0.2", "0.8", init=Initialisation("task", "task1")), first)
        assert (stage.task_names, stage.shares, stage.init.target) == (("task2",), (1,), "base")

    def test_joint_has_all_tasks_at_equal_shares(self, make_stage: MakeStage) -> None:
        stages = (make_stage("1", init=Initialisation("pretrained", "base")), make_stage("0.2", "0.8"))
        both = joint(stages)
        assert (both.name, both.shares, both.init.target) == ("joint", (Fraction(1, 2),) * 2, "base")
        assert both.hash != stages[1].hash


class TestCurriculum:
    def test_a_start_must_come_before(self, make_stage: MakeStage) -> None:
        with pytest.raises(StageError, match="task1 starts from task2, which is not before it"):
            check_curriculum([make_stage("1", init=Initialisation("task", "task2"))])

    def test_a_name_stands_once(self, make_stage: MakeStage) -> None:
        with pytest.raises(StageError, match="contains task1 twice"):
            check_curriculum([make_stage("1"), make_stage("1")])

    def test_a_task_stands_once_in_a_stage(self, make_stage: MakeStage, make_task: MakeTask) -> None:
        with pytest.raises(StageError, match="lists a task twice"):
            make_stage("0.5", "0.5", tasks=(make_task(1), make_task(1)))
