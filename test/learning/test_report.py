"""The report says what the files say; figures come from the log alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.estimate import duration, measured_rate
from kuavo_smolvla_ros.learning.metrics import wilson
from kuavo_smolvla_ros.learning.record import forgetting, loss_matrix, read_stages
from kuavo_smolvla_ros.learning.report import sentences, table, write_report
from kuavo_smolvla_ros.learning.success import checkpoints_of, keep, stage_of, tally

WriteStage = Callable[..., None]


@pytest.fixture
def root(tmp_path: Path, write_stage: WriteStage) -> Path:
    write_stage(tmp_path, 2)
    write_stage(tmp_path, 1)
    return tmp_path


def test_the_matrix_holds_losses_after_each_stage_and_just_before_learning(root: Path) -> None:
    order, matrix = loss_matrix(read_stages(root))
    assert order == ["1", "2"]
    assert matrix.tolist() == [[0.2, 4.0], [0.3, 0.1]]


def test_the_figures_follow_from_the_matrix(root: Path) -> None:
    entry = forgetting(root)["curriculum"]
    assert entry["figures"]["average"] == pytest.approx(0.2)
    assert entry["figures"]["backward_transfer"] == pytest.approx(-0.1)
    assert entry["figures"]["max_forgetting"] == pytest.approx(0.1)
    assert entry["figures"]["joint_gap"] is None


def test_a_stage_that_is_not_finished_is_reported_as_such(tmp_path: Path, write_stage: WriteStage) -> None:
    write_stage(tmp_path, 1, finished=False)
    said = list(sentences(read_stages(tmp_path), forgetting(tmp_path)))
    assert said[0] == "0 of 1 stages that were begun are finished."
    assert "so far (validated at step 20 of 20)" in said[1]
    assert write_report(tmp_path) is not None


class Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.outside += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")
        ]
        if tag not in ("meta", "br", "use", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("use", "path"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(root: Path) -> None:
    file = write_report(root)
    assert file is not None
    text = file.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.outside == []
    assert "Raise &lt;it&gt;" in text
    assert "50.00%" in text
    assert "<td>task2</td><td class=n>20</td><td class=n>0.0001</td><td class=n>5 of 10</td>" in text


def test_the_same_files_make_the_same_page(root: Path) -> None:
    first = write_report(root)
    assert first is not None
    text = first.read_text()
    first.unlink()
    second = write_report(root)
    assert second is not None
    assert second.read_text() == text


def test_a_reference_without_a_first_stage_borrows_it(root: Path, write_stage: WriteStage) -> None:
    place = root / "references" / "no_replay"
    write_stage(place, 2)
    content = forgetting(root)
    assert content["no_replay"]["tasks"] == ["1", "2"]
    assert content["no_replay"]["loss"] == content["curriculum"]["loss"]
    shutil.rmtree(root / "task1")
    shutil.rmtree(root / "task2")
    assert "curriculum" not in forgetting(root)


def succeed(root: Path, number: int, *rates: int, **conditions: Any) -> None:
    """The stage's row: of ten episodes of task 1, 2 ... so many succeed."""
    results = [
        {"task": task, **tally([{"success": n < good, "score": 10.0} for n in range(10)])}
        for task, good in enumerate(rates, 1)
    ]
    keep(root / f"task{number}", results, level="easy", **conditions)


def test_success_makes_a_matrix_of_its_own_beside_the_losses(root: Path) -> None:
    assert forgetting(root)["curriculum"]["success"] is None
    succeed(root, 1, 8)
    entry = forgetting(root)["curriculum"]["success"]
    assert entry["success"] == [[0.8, None], [None, None]]
    assert entry["figures"] is None  # the last stage is not evaluated yet
    succeed(root, 1, 8, 1)
    succeed(root, 2, 6, 9)
    place = root / "references" / "joint"
    shutil.copytree(root / "task2", place / "task2")
    succeed(place, 2, 10, 9)
    entry = forgetting(root)["curriculum"]["success"]
    assert entry["success"] == [[0.8, 0.1], [0.6, 0.9]]
    assert entry["trials"] == [[10, 10], [10, 10]]
    low, high = entry["interval_95"][1][0]
    assert (low, high) == pytest.approx((wilson(6, 10).low, wilson(6, 10).high))
    figures = entry["figures"]
    assert figures["average"] == pytest.approx(0.75)
    assert figures["negative_backward_transfer"] == pytest.approx(0.2)
    assert figures["backward_transfer"] == pytest.approx(-0.2)
    assert figures["joint_gap"] == pytest.approx(0.2)
    file = write_report(root)
    assert file is not None
    text = file.read_text()
    assert "<h2>Success in simulation</h2>" in text
    assert "60% (31% to 83%, n 10)" in text
    assert "after the last stage: task 1 60%" in text
    checker = Checker()
    checker.feed(text)
    assert checker.open == []


def test_evaluating_again_replaces_and_other_conditions_begin_anew(root: Path) -> None:
    succeed(root, 1, 8, 1)
    keep(root / "task1", [{"task": 2, **tally([{"success": True, "score": 1.0}])}], level="easy")
    row = json.loads((root / "task1" / "success.json").read_text())["tasks"]
    assert {number: entry["success"] for number, entry in row.items()} == {"1": 0.8, "2": 1.0}
    succeed(root, 1, 5, first_seed=100)
    row = json.loads((root / "task1" / "success.json").read_text())["tasks"]
    assert {number: entry["success"] for number, entry in row.items()} == {"1": 0.5}
    with pytest.raises(UserError, match="no episode was played"):
        tally([])


def test_only_a_finished_stages_result_is_part_of_the_matrix(
    root: Path, tmp_path: Path, write_stage: WriteStage
) -> None:
    assert checkpoints_of(root) == [root / "task1" / "best", root / "task2" / "best"]
    assert stage_of(root / "task1" / "best") == root / "task1"
    assert stage_of(root / "task1" / "last") is None
    assert stage_of(tmp_path / "elsewhere" / "best") is None
    (root / "task2" / "training_results.json").unlink()
    assert checkpoints_of(root) == [root / "task1" / "best"]
    assert stage_of(root / "task2" / "best") is None


def test_throughput_of_an_earlier_stage_serves_for_estimates(root: Path) -> None:
    rate = measured_rate(root)
    assert rate is not None
    assert rate[0] == 210.0
    assert measured_rate(root / "nowhere") is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_cells_are_text() -> None:
    assert table(["<a>"], [["&"]]) == "<table><tr><th>&lt;a&gt;</th></tr><tr><td>&amp;</td></tr></table>"
