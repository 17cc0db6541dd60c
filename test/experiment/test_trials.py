from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.experiment.play import Manner
from kuavo_smolvla_ros.experiment.trials import LOG, Trial, TrialLog, TrialSettings, summary


def checkpoint(folder: Path, name: str = "best") -> str:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "model.safetensors").write_bytes(b"weights")
    return str(folder / name)


def episode(seed: int, success: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "success": success,
        "score": 100.0 if success else 40.0,
        "time_s": 10.0,
        "chunks": 25,
        "refused": 1,
        "stops": [],
        "moved_rad": 0.5,
        **more,
    }


@pytest.fixture
def settings() -> TrialSettings:
    return TrialSettings(episodes=4, first_seed=10)


def test_what_is_missing_is_what_was_not_played(tmp_path: Path, settings: TrialSettings) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    log = TrialLog(tmp_path, settings)
    assert log.missing(trial) == [10, 11, 12, 13]
    log.add(trial, episode(11))
    log.add(trial, episode(10, success=False))
    assert log.missing(trial) == [12, 13]
    assert TrialLog(tmp_path, settings).missing(trial) == [12, 13]


def test_a_tally_counts_with_an_interval(tmp_path: Path, settings: TrialSettings) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    log = TrialLog(tmp_path, settings)
    for seed, success in zip(range(10, 14), (True, True, True, False), strict=True):
        stops = [] if success else ["starved"]
        log.add(trial, episode(seed, success, stops=stops, moved_rad=seed / 10))
    told = summary(log.episodes(trial))
    assert (told["successes"], told["trials"]) == (3, 4)
    low, high = told["interval_95"]
    assert low < 0.75 < high
    assert told["mean_score"] == pytest.approx(85.0)
    assert told["refused"] == 4
    assert told["stopped"] == 1
    assert told["median_moved_rad"] == pytest.approx(1.15)


def test_an_episode_that_lacks_what_is_told_today_is_played_anew(
    tmp_path: Path, settings: TrialSettings
) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    earlier = {name: value for name, value in episode(10).items() if name != "moved_rad"}
    TrialLog(tmp_path, settings).add(trial, earlier)
    TrialLog(tmp_path, settings).add(trial, episode(11))
    assert TrialLog(tmp_path, settings).missing(trial) == [10, 12, 13]


def test_more_episodes_keep_those_there_are(tmp_path: Path, settings: TrialSettings) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    log = TrialLog(tmp_path, settings)
    log.add(trial, episode(10))
    more = TrialLog(tmp_path, dataclasses.replace(settings, episodes=6))
    assert more.missing(trial) == [11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    "change",
    [{"level": "contest"}, {"manner": Manner(latency_s=0.5)}, {"first_seed": 0}],
    ids=lambda change: next(iter(change)),
)
def test_other_conditions_are_played_anew(
    tmp_path: Path, settings: TrialSettings, change: dict[str, Any]
) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    TrialLog(tmp_path, settings).add(trial, episode(10))
    log = TrialLog(tmp_path, dataclasses.replace(settings, **change))
    assert len(log.missing(trial)) == 4


def test_another_policy_in_the_same_place_is_played_anew(tmp_path: Path, settings: TrialSettings) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    log = TrialLog(tmp_path, settings)
    log.add(trial, episode(10))
    weights = tmp_path / "best" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    weights.write_bytes(b"others")
    assert weights.stat().st_mtime_ns != before
    assert len(log.missing(trial)) == 4


def test_tasks_sentences_and_checkpoints_are_told_apart(tmp_path: Path, settings: TrialSettings) -> None:
    first = Trial(checkpoint(tmp_path), 1)
    log = TrialLog(tmp_path, settings)
    log.add(first, episode(10))
    for other in (
        dataclasses.replace(first, task=2),
        dataclasses.replace(first, sentence="sing"),
        dataclasses.replace(first, checkpoint=checkpoint(tmp_path, "other")),
    ):
        assert len(log.missing(other)) == 4
    assert len(log.missing(dataclasses.replace(first, episodes=2))) == 1


def test_a_line_cut_short_is_one_episode_less(tmp_path: Path, settings: TrialSettings) -> None:
    trial = Trial(checkpoint(tmp_path), 1)
    log = TrialLog(tmp_path, settings)
    log.add(trial, episode(10))
    log.add(trial, episode(11))
    file = tmp_path / LOG
    file.write_text(file.read_text()[:-30])
    again = TrialLog(tmp_path, settings)
    assert again.missing(trial) == [11, 12, 13]
