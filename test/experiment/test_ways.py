from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from kuavo_smolvla_ros.experiment.ways import (
    CURRICULUM,
    TASK_FILES,
    WAYS,
    TrainingSettings,
    curriculum_of,
    root_of,
    stages_of,
)
from kuavo_smolvla_ros.learning.paraphrases import held_out_paraphrases
from kuavo_smolvla_ros.learning.stage import Curriculum, check_curriculum
from kuavo_smolvla_ros.learning.stage_config import read_request


@pytest.fixture
def curriculum(tmp_path: Path) -> Curriculum:
    stages, _ = curriculum_of(TrainingSettings(steps=(40,) * 4), tmp_path / "seeing", tmp_path, "cpu")
    return stages


def test_the_curriculum_falls_in_rate_and_in_layers(curriculum: Curriculum, tmp_path: Path) -> None:
    check_curriculum(curriculum)
    rates = [stage.optimizer.lr for stage in curriculum]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(TrainingSettings().lr)
    # 2e-5 to 5e-5 on the full-size network, of which the square root is kept here
    assert rates[3] / rates[0] == pytest.approx(0.4**0.5)
    layers = [dict(stage.policy)["unfreeze_vision_layers"] for stage in curriculum]
    assert layers == [(-1, -2), (-1,), (-1,), (-1,)]
    assert curriculum[0].init.target == str(tmp_path / "seeing")
    assert [stage.init.target for stage in curriculum[1:]] == list(TASK_FILES[:3])


def test_replay_is_at_least_that_of_the_task_files(curriculum: Curriculum) -> None:
    assert curriculum[0].shares == (1,)
    assert curriculum[1].shares == (Fraction(1, 5), Fraction(4, 5))
    assert curriculum[3].shares == tuple(Fraction(share, 20) for share in (2, 5, 4, 9))
    for file, stage in zip(TASK_FILES, curriculum, strict=True):
        (shipped,) = read_request([f"task=tasks/{file}"]).stages
        assert stage.shares[-1] <= shipped.shares[-1]
        assert all(ours >= theirs for ours, theirs in zip(stage.shares[:-1], shipped.shares, strict=False))


def test_each_stage_has_its_own_length(tmp_path: Path) -> None:
    settings = TrainingSettings(steps=(10, 20, 30, 40))
    stages, _ = curriculum_of(settings, tmp_path / "seeing", tmp_path, "cpu")
    assert [stage.training.max_steps for stage in stages] == [10, 20, 30, 40]
    # Each task as often as in its own stage: 10, 0.8 of 20, 0.45 of 30, 0.45 of 40.
    assert [stage.training.max_steps for stage in stages_of("joint", stages)] == [10 + 16 + 14 + 18]


def test_no_replay_differs_in_the_mix_and_sees_as_much_of_each_task(curriculum: Curriculum) -> None:
    for ours, theirs in zip(curriculum, stages_of("no_replay", curriculum), strict=True):
        assert theirs.shares[-1] == 1
        assert (ours.optimizer, ours.policy) == (theirs.optimizer, theirs.policy)
        steps = ours.training.max_steps * ours.shares[-1]
        assert theirs.training == replace(ours.training, max_steps=round(steps))
        assert theirs.schedule == replace(ours.schedule, decay_steps=round(steps))


def test_joint_training_sees_as_much_and_has_the_first_stages_freedom(curriculum: Curriculum) -> None:
    (stage,) = stages_of("joint", curriculum)
    alone = [each.training.max_steps for each in stages_of("single", curriculum)]
    steps = stage.training.max_steps
    assert steps == sum(alone)
    factor = stage.schedule.for_steps(steps).factor
    assert factor(steps - 1, 1.0) < factor(steps // 2, 1.0)
    assert stage.shares == (Fraction(1, 4),) * 4
    assert (stage.optimizer, stage.policy) == (curriculum[0].optimizer, curriculum[0].policy)


def test_each_alone_begins_where_the_first_does(curriculum: Curriculum) -> None:
    stages = stages_of("single", curriculum)
    assert [stage.task_names for stage in stages] == [(name,) for name in TASK_FILES]
    assert {stage.init for stage in stages} == {curriculum[0].init}
    assert {stage.optimizer.lr for stage in stages} == {curriculum[0].optimizer.lr}
    assert stages[0].hash == curriculum[0].hash  # so it is not trained twice


@pytest.mark.parametrize("way", ["single", "no_replay"])
def test_without_replay_a_task_is_seen_as_often_as_with_it(tmp_path: Path, way: str) -> None:
    shares = (("1",), ("0.2", "0.8"), ("0.2", "0.3", "0.5"), ("0.2", "0.2", "0.2", "0.4"))
    settings = TrainingSettings(steps=(10, 20, 30, 40), shares=shares)
    stages, _ = curriculum_of(settings, tmp_path / "seeing", tmp_path, "cpu")
    assert [stage.training.max_steps for stage in stages_of(way, stages)] == [10, 16, 15, 16]


def test_every_stage_hears_the_other_tasks_sentences_and_none_that_is_held_out(
    curriculum: Curriculum,
) -> None:
    held_out = {sentence for sentences in held_out_paraphrases().values() for sentence in sentences}
    own = {stage.name: set(stage.task.sentences) for stage in curriculum}
    for way in WAYS:
        for stage in stages_of(way, curriculum):
            for task in stage.tasks:
                others = set().union(*(said for name, said in own.items() if name != task.name))
                assert set(task.hold_sentences) == others
                assert task.hold_share == TrainingSettings().hold_share > 0
                assert not held_out & {*task.sentences, *task.hold_sentences}


def test_without_holding_no_sentence_is_told_but_the_tasks_own(tmp_path: Path) -> None:
    settings = TrainingSettings(steps=(4,) * 4, hold_share=0.0)
    stages, _ = curriculum_of(settings, tmp_path / "seeing", tmp_path, "cpu")
    assert {task.hold_sentences for stage in stages for task in stage.tasks} == {()}


def test_every_way_has_a_place_of_its_own(tmp_path: Path) -> None:
    places = [root_of(way, tmp_path) for way in WAYS]
    assert len(set(places)) == len(WAYS)
    assert places[0] == root_of(CURRICULUM, tmp_path) == tmp_path / "train"
