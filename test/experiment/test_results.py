from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.experiment.measured import (
    HELD_OUT,
    OTHERS,
    OTHERS_HELD_OUT,
    Conditions,
    Measured,
    kept,
)
from kuavo_smolvla_ros.experiment.results import (
    _cell,
    _ends,
    _figures,
    _language,
    _stages,
    last_stage,
    matrix,
    write_results,
)
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.experiment.trials import TrialSettings
from kuavo_smolvla_ros.experiment.ways import TrainingSettings
from kuavo_smolvla_ros.learning.metrics import wilson


def told(successes: int, trials: int = 50) -> dict[str, Any]:
    interval = wilson(successes, trials)
    return {
        "successes": successes,
        "trials": trials,
        "success": successes / trials,
        "interval_95": [interval.low, interval.high],
        "median_moved_rad": successes / 100,
        "machine": "a machine",
    }


def cells(way: str, rows: list[list[int]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {
        (way, stage, task): told(count)
        for stage, row in enumerate(rows)
        for task, count in enumerate(row, start=1)
    }


KEPT = cells("curriculum", [[45], [44, 42], [43, 42, 41], [43, 41, 40, 45]])
LOST = cells("no_replay", [[45], [10, 43], [0, 5, 44], [0, 0, 6, 45]])
ALONE = {("single", task - 1, task): told(count) for task, count in enumerate((45, 44, 43, 46), 1)}


def test_a_matrix_needs_every_task_tried_after_its_own_and_later_stages() -> None:
    scores = matrix(KEPT, "curriculum")
    assert scores is not None
    assert scores[3].tolist() == [0.86, 0.82, 0.8, 0.9]
    assert np.isnan(scores[0, 1])
    incomplete = {cell: entry for cell, entry in KEPT.items() if cell != ("curriculum", 3, 2)}
    assert matrix(incomplete, "curriculum") is None
    assert matrix(KEPT, "no_replay") is None


def test_a_cell_says_share_and_interval_or_nothing() -> None:
    assert _cell(told(45)) == "90% [79%, 96%]"
    assert _cell(None) == ""


def test_the_tables_of_a_way_show_what_is_known() -> None:
    lines = list(_stages(KEPT, "curriculum"))
    assert any(line.startswith("| after stage 4 | 86%") for line in lines)
    assert any("results_curriculum.svg" in line for line in lines)
    assert list(_stages(KEPT, "no_replay")) == []


def test_the_end_of_each_way_has_its_own_stage() -> None:
    assert [last_stage("single", task) for task in (1, 4)] == [0, 3]
    assert last_stage("joint", 3) == 0
    assert last_stage("curriculum", 1) == 3
    text = "\n".join(_ends({**KEPT, **LOST, **ALONE}))
    assert "| each alone | 90% [79%, 96%] |" in text
    assert "84.5% |" in text
    assert "all four at once" not in text


def test_the_end_is_a_picture_too_with_a_bar_for_each_known_cell(tmp_path: Path) -> None:
    conditions = Conditions(200, SeeingSettings(), TrainingSettings(), TrialSettings())
    some = {cell: entry for cell, entry in ALONE.items() if cell[2] != 2}
    page = write_results(Measured({**KEPT, **some}), conditions, tmp_path).read_text(encoding="utf-8")
    assert "](images/results_end.svg)" in page
    picture = (tmp_path / "images" / "results_end.svg").read_text(encoding="utf-8")
    assert "each alone" in picture
    assert "all four at once" not in picture


def test_without_an_end_there_is_no_picture_of_it(tmp_path: Path) -> None:
    conditions = Conditions(200, SeeingSettings(), TrainingSettings(), TrialSettings())
    write_results(Measured(cells("curriculum", [[45]])), conditions, tmp_path)
    assert not (tmp_path / "images" / "results_end.svg").exists()


def test_a_mean_of_some_tasks_is_not_told() -> None:
    some = {cell: entry for cell, entry in ALONE.items() if cell[2] != 2}
    assert "not measured" in "\n".join(_ends(some))


def test_figures_follow_from_the_matrices() -> None:
    text = "\n".join(_figures({**KEPT, **LOST, **ALONE}))
    assert "| mean success in the end | 84.5% | 25.5% |" in text
    shares = next(line for line in text.splitlines() if "each alone" in line)
    assert "0.95 x" in shares
    lost = next(line for line in text.splitlines() if "NBT" in line)
    kept, forgotten = (float(part.strip(" %")) for part in lost.split("|")[2:4])
    assert kept < 5 < forgotten


@pytest.mark.parametrize("given", [{}, ALONE])
def test_without_a_matrix_there_are_no_figures(given: dict[tuple[str, int, int], Any]) -> None:
    assert list(_figures(given)) == []


def test_other_words_are_told_beside_the_tasks_own() -> None:
    spoken = {(HELD_OUT, task): told(count, 52) for task, count in enumerate((49, 39, 52, 52), 1)}
    spoken |= {(OTHERS, task): told(0, 39) for task in (1, 2, 3, 4)}
    spoken |= {(OTHERS_HELD_OUT, task): told(6, 60) for task in (1, 2, 3, 4)}
    lines = list(_language(Measured(KEPT, spoken)))
    own, held_out, others, others_held_out = [line for line in lines if line.endswith("% |")]
    assert own.startswith("| the task's own sentence | 86% [74%, 93%] |")
    assert held_out.endswith("| 92.3% |")
    assert others.endswith("| 0.0% |")
    assert others_held_out.endswith("| 10.0% |")
    moved = lines[-4:]
    assert moved[0] == "| the task's own sentence | 0.43 rad | 0.41 rad | 0.40 rad | 0.45 rad |"
    assert moved[2] == "| sentences of other tasks | 0.00 rad | 0.00 rad | 0.00 rad | 0.00 rad |"


def test_what_was_not_said_is_not_told() -> None:
    assert list(_language(Measured(KEPT))) == []
    some = Measured({}, {(HELD_OUT, 1): told(5)})
    lines = list(_language(some))
    assert sum(line.endswith("| not measured |") for line in lines) == 4
    assert "| sentences held out of training | 0.05 rad |  |  |  |" in lines


def test_a_page_names_each_machine_once_and_keeps_its_figures(tmp_path: Path) -> None:
    conditions = Conditions(200, SeeingSettings(), TrainingSettings(), TrialSettings())
    other = {cell: {**entry, "machine": "another"} for cell, entry in ALONE.items()}
    measured = Measured({**KEPT, **LOST, **other})
    page = write_results(measured, conditions, tmp_path).read_text(encoding="utf-8")
    assert "Measured on: a machine; another." in page
    assert (tmp_path / "images" / "results_no_replay.svg").is_file()
    assert kept(tmp_path, conditions) == (measured, None)
