from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kuavo_smolvla_ros.experiment.measured import (
    HELD_OUT,
    OTHERS,
    OTHERS_HELD_OUT,
    Conditions,
    Measured,
    kept,
)
from kuavo_smolvla_ros.experiment.play import Manner
from kuavo_smolvla_ros.experiment.road import TASKS, Experiment
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.experiment.trials import TrialLog, TrialSettings
from kuavo_smolvla_ros.experiment.ways import TASK_FILES, WAYS, TrainingSettings

ANOTHERS = {"successes": 1, "trials": 1, "success": 1.0, "interval_95": [0.2, 1.0], "machine": "another"}


def experiment(output: Path, ways: tuple[str, ...] = WAYS, **more: int) -> Experiment:
    return Experiment(
        output=output,
        demonstrations=2,  # one is held out
        seeing=SeeingSettings(steps=4, batch=8, warmup=1),
        training=TrainingSettings(steps=(more.get("steps", 4),) * 4, batch=20),
        trials=TrialSettings(episodes=1, manner=Manner(n_action_steps=16)),
        ways=ways,
        workers=1,
        device="cpu",
        figures=None,
    )


def test_cells_are_all_tasks_seen_so_far(tmp_path: Path) -> None:
    cells = list(experiment(tmp_path).cells())
    assert len(cells) == len(set(cells)) == 10 + 10 + 4 + 4
    assert ("curriculum", 2, 4) not in cells
    assert [cell for cell in cells if cell[0] == "single"] == [("single", t - 1, t) for t in TASKS]


def test_before_training_there_is_nothing_to_try_or_to_tell(tmp_path: Path) -> None:
    road = experiment(tmp_path)
    assert road.trial_of("curriculum", 0, 1) is None
    assert list(road.spoken()) == []
    road.tell()
    assert "after stage" not in (tmp_path / "results.md").read_text()
    told = json.loads((tmp_path / "results.json").read_text())
    assert (told["cells"], told["spoken"]) == ({}, {})
    assert told["conditions"]["training"]["batch"] == 20


def test_what_another_machine_measured_stays_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    road = replace(experiment(tmp_path / "here"), figures=tmp_path / "figures")
    conditions = Conditions(road.demonstrations, road.seeing, road.training, road.trials)
    there = Measured({("joint", 0, 3): ANOTHERS})
    (tmp_path / "figures").mkdir()
    there.write(tmp_path / "figures", conditions)
    road.tell()
    assert kept(tmp_path / "figures", conditions) == (there, None)
    assert kept(tmp_path / "here", conditions) == (Measured(), None)
    assert "| all four at once |" in (tmp_path / "figures" / "results.md").read_text()
    replace(road, demonstrations=3).tell()
    assert "of other conditions (demonstrations) and is begun anew" in capsys.readouterr().out
    assert "all four at once" not in (tmp_path / "figures" / "results.md").read_text()


@pytest.mark.slow
def test_the_whole_road_in_small_goes_on_where_it_was(tmp_path: Path) -> None:
    road = experiment(tmp_path, ("curriculum", "no_replay"))
    for part in ("gather", "see", "train"):
        getattr(road, part)()
    results = tmp_path / "train" / TASK_FILES[3] / "training_results.json"
    made = results.stat().st_mtime_ns
    road.train()
    assert results.stat().st_mtime_ns == made
    # Stage 1 is the same work with and without replay, and done once.
    first = road.trial_of("no_replay", 0, 1)
    assert first is not None
    assert first == road.trial_of("curriculum", 0, 1)
    assert road.trial_of("no_replay", 1, 1) != road.trial_of("curriculum", 1, 1)
    road.play()
    log = TrialLog(tmp_path, road.trials)
    assert all(not log.missing(trial) for _, trial in road.spoken())
    said = Counter((spoken.what, spoken.task) for spoken, _ in road.spoken())
    assert said == {
        (what, t): n for t in TASKS for what, n in ((HELD_OUT, 4), (OTHERS, 3), (OTHERS_HELD_OUT, 12))
    }
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    road.play()
    assert (tmp_path / "trials.jsonl").read_text().splitlines() == lines
    road.tell()
    page = (tmp_path / "results.md").read_text()
    assert page.count("after stage 4") == 2
    assert "sentences held out of training" in page
    assert (tmp_path / "images" / "results_curriculum.svg").is_file()
