"""The report says what the files say; figures come from the log alone."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.learning.estimate import duration, measured_rate
from kuavo_smolvla_ros.learning.outputs import RunLog
from kuavo_smolvla_ros.learning.record import forgetting, loss_matrix, read_stages
from kuavo_smolvla_ros.learning.report import sentences, table, write_report

LOSSES = {  # before the stage, and at its end
    1: ({"1": 3.0}, {"1": 0.2}),
    2: ({"1": 0.2, "2": 4.0}, {"1": 0.3, "2": 0.1}),
}


def result(loss: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "open_loop_error": loss / 10,
        "error_by_joint": {"a_joint": loss / 10, "a_gripper": 0.1},
        "error_by_horizon": [0.01, 0.02],
        "gripper_accuracy": 0.9,
        "frames": 4,
    }


def write_stage(root: Path, number: int, finished: bool = True) -> None:
    folder = root / f"task{number}"
    tasks = [{"number": n, "name": f"task{n}"} for n in range(1, number + 1)]
    log = RunLog(folder, 0)
    (folder / "stage.json").write_text(
        json.dumps({"stage": {"name": f"task{number}", "tasks": tasks, "optimizer": {"lr": 1e-4}}})
    )
    shares = {str(t["number"]): 1 / number for t in tasks}
    log.write(
        "stage",
        0,
        total_steps=20,
        shares=shares,
        vision_layers=4,
        unfrozen_layers=[2, 3],
        parameters={"vision_layers": {"total": 10, "trained": 5}},
    )
    verdicts = [{"task": "task1", "loss": 0.3, "ratio": 1.5, "verdict": "degraded", "advice": "Raise <it>"}]
    before, after = LOSSES[number]
    for step, losses in ((0, before), (20, after)):
        log.write(
            "validation",
            step,
            epoch=step / 10,
            mean_loss=0.0,
            tasks={n: result(loss) for n, loss in losses.items()},
            verdicts=verdicts,
        )
        log.write(
            "train",
            step + 5,
            loss=0.5,
            lr_by_group={"main": 1e-4},
            realised_shares=shares,
            samples_per_s=10.0 * (step + 1),
            data_s=0.1,
            preprocess_s=0.2,
            update_s=0.7,
        )
    log.close()
    if finished:
        (folder / "training_results.json").write_text(
            json.dumps(
                {
                    "best_validation": after,
                    "best_loss": after[str(number)],
                    "verdicts": verdicts,
                    "elapsed_s": 60,
                }
            )
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
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


def test_a_stage_that_is_not_finished_is_reported_as_such(tmp_path: Path) -> None:
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


def test_a_reference_without_a_first_stage_borrows_it(root: Path) -> None:
    place = root / "references" / "no_replay"
    write_stage(place, 2)
    content = forgetting(root)
    assert content["no_replay"]["tasks"] == ["1", "2"]
    assert content["no_replay"]["loss"] == content["curriculum"]["loss"]
    shutil.rmtree(root / "task1")
    shutil.rmtree(root / "task2")
    assert "curriculum" not in forgetting(root)


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
