"""The four stages on tasks that conflict: with replay nothing is forgotten, without it everything is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kuavo_smolvla_ros.learning.curriculum_run import (
    make_accelerator,
    reference_root,
    reference_stages,
    run_stages,
    stage_source,
)
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.report import write_report
from kuavo_smolvla_ros.learning.sources import ACTION, TaskSource
from kuavo_smolvla_ros.learning.stage import Curriculum, StageError
from kuavo_smolvla_ros.learning.synthetic import (
    SENTENCES,
    conflicting_tasks,
    synthetic_curriculum,
    synthetic_run,
)
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING
from kuavo_smolvla_ros.policy.runtime import PolicyRunner

NAMES = ("task1", "task2", "task3", "task4")


def train(
    curriculum: Curriculum, sources: dict[str, TaskSource], root: Path, reference: str | None = None
) -> list[str]:
    run = synthetic_run(root)
    run = dataclasses.replace(run, output_root=str(reference_root(root, reference)))
    stages = reference_stages(curriculum, reference)
    said: list[str] = []
    assert run_stages(
        stages,
        run,
        make_accelerator(stages, run),
        lambda task, chunk: sources[task.name],
        interruption=Interruption(),
        shared=root,
        say=said.append,
    )
    return said


def test_tasks_conflict_all_see_the_same_and_do_something_else() -> None:
    sources = conflicting_tasks(NAMES, episodes=2, length=6, extra_of_last=0)
    for index in (0, 5, 11):
        samples = [sources[name].frames[index] for name in NAMES]
        for sample in samples[1:]:
            assert all(
                torch.equal(sample[key], samples[0][key])
                for key in samples[0]
                if key not in (ACTION, ACTION_STEP_PADDING)
            )
        for a in range(4):
            for b in range(a):
                difference = (samples[a][ACTION] - samples[b][ACTION])[~samples[a][ACTION_STEP_PADDING]]
                assert difference.abs().max() > 0.1


def short(epochs: int = 1) -> Curriculum:
    return tuple(
        dataclasses.replace(stage, training=dataclasses.replace(stage.training, max_steps=2))
        for stage in synthetic_curriculum(epochs)
    )


def test_references_share_what_is_the_same_work(tmp_path: Path) -> None:
    curriculum, sources = short(), conflicting_tasks(NAMES, episodes=5, length=8)
    train(curriculum, sources, tmp_path)
    said = train(curriculum, sources, tmp_path, "no_replay")
    assert said[0] == "task1: the same work as the curriculum's stage, which is used"
    place = tmp_path / "references" / "no_replay"
    assert not (place / "task1").exists()
    stages = reference_stages(curriculum, "no_replay")
    assert stage_source(stages[1], place, tmp_path, stages) == str(tmp_path / "task1" / "best")
    assert stage_source(stages[2], place, tmp_path, stages) == str(place / "task2" / "best")
    results = json.loads((place / "task4" / "training_results.json").read_text())
    assert results["shares_realised"] == {"task1": 0, "task2": 0, "task3": 0, "task4": 1}
    assert results["final_validation"].keys() == {"1", "2", "3", "4"}
    train(curriculum, sources, tmp_path, "joint")
    train(curriculum, sources, tmp_path, "single")
    content = json.loads((tmp_path / "forgetting.json").read_text())
    assert content.keys() == {"curriculum", "no_replay", "joint", "single"}
    assert content["curriculum"]["figures"]["joint_gap"] is not None
    assert content["curriculum"]["figures"]["single_gap"] is not None
    assert content["no_replay"]["loss"][0] == content["curriculum"]["loss"][0]
    report = write_report(tmp_path)
    assert report is not None
    text = report.read_text()
    assert "4 of 4 stages that were begun are finished" in text
    assert text.count("<svg") == 7
    assert "http-equiv" not in text
    assert 'src="' not in text  # self-contained


def test_a_stage_does_not_start_from_one_that_was_stopped(tmp_path: Path) -> None:
    curriculum, sources = short(), conflicting_tasks(NAMES, episodes=5, length=8)
    train(curriculum[:1], sources, tmp_path)
    (tmp_path / "task1" / "training_results.json").unlink()
    run = synthetic_run(tmp_path)
    with pytest.raises(StageError, match="task1, which has not been trained to its end"):
        run_stages(
            curriculum,
            run,
            make_accelerator(curriculum, run),
            lambda task, chunk: sources[task.name],
            interruption=Interruption(),
            selected=("task2",),
        )


def test_nothing_is_reported_where_nothing_was_trained(tmp_path: Path) -> None:
    assert write_report(tmp_path) is None


def matrix(root: Path, name: str) -> list[list[Any]]:
    return json.loads((root / "forgetting.json").read_text())[name]["loss"]


def rises(loss: list[list[Any]]) -> dict[tuple[int, int], float]:
    """Each earlier task's loss after each later stage, in multiples of its loss right after it was learnt."""
    return {(k, j): loss[k][j] / loss[j][j] for k in range(4) for j in range(k)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_replay_keeps_what_training_without_it_loses_and_language_chooses(tmp_path: Path) -> None:
    curriculum, sources = synthetic_curriculum(), conflicting_tasks(NAMES)
    train(curriculum, sources, tmp_path)
    train(curriculum, sources, tmp_path, "no_replay")
    kept, lost = rises(matrix(tmp_path, "curriculum")), rises(matrix(tmp_path, "no_replay"))
    assert max(kept.values()) <= 1.1, kept
    assert min(lost.values()) > 2.0, lost

    policy = PolicyRunner.load(tmp_path / "task4" / "best", device="cpu")
    frame = 3  # of the first episode; every task has the same picture and state there
    observed = sources["task1"].frames[frame]
    image = (observed["observation.images.head_cam_h"].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
    wanted = torch.stack([sources[name].frames[frame][ACTION][:, :6] for name in NAMES])
    for number, sentence in enumerate(SENTENCES):
        chunk = policy.chunk({"head_cam_h": image}, observed["observation.state"].numpy(), sentence, seed=0)
        errors = (torch.from_numpy(chunk)[None, :, :6] - wanted).abs().mean((1, 2))
        assert int(errors.argmin()) == number, errors
        assert errors[number] < 0.1  # rad; the nearest other movement is 0.28 away or more
