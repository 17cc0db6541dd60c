"""Steps are done once, in order, again when what they rest on has changed, and told on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.demo.convert import start_anew_for
from kuavo_smolvla_ros.demo.page import render
from kuavo_smolvla_ros.demo.record import Shelf
from kuavo_smolvla_ros.demo.road import Note, Place, Road
from kuavo_smolvla_ros.demo.steps import steps, walk
from kuavo_smolvla_ros.errors import UserError


class Counted:
    """A step that tells how often it was done."""

    def __init__(self, name: str, done: list[str], setting: int = 0) -> None:
        self.name, self.title = name, f"do {name}"
        self.done, self.setting = done, setting
        self.fault: BaseException | None = None

    def settings(self) -> Mapping[str, Any]:
        return {"setting": self.setting}

    def commands(self, place: Place) -> Sequence[str]:
        return (f"{self.name} --by-hand <{place.root.name}>",)

    def run(self, place: Place) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        self.done.append(self.name)
        return {"before": sorted(place.told), "setting": self.setting}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    said: list[str] = []
    road = [Counted("a", done), Counted("b", done)]
    first = walk(tmp_path, road, said.append)
    assert [note.figures["before"] for note in first] == [[], ["a"]]
    assert walk(tmp_path, road, said.append) == first
    assert done == ["a", "b"]
    assert said[-2:] == ["[1/2] do a: done already", "[2/2] do b: done already"]


def test_a_changed_step_and_all_after_it_are_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    walk(tmp_path, [Counted(name, done) for name in "abc"])
    walk(tmp_path, [Counted("a", done), Counted("b", done, setting=1), Counted("c", done)])
    assert done == ["a", "b", "c", "b", "c"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), UserError("the disk is full")])
def test_an_interrupted_walk_goes_on_and_its_time_counts(tmp_path: Path, fault: BaseException) -> None:
    done: list[str] = []
    road = [Counted("a", done), Counted("b", done)]
    road[1].fault = fault
    with pytest.raises(type(fault)):
        walk(tmp_path, road)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is False
    assert list(summary["steps"]) == ["a"]
    begun = tmp_path / "steps" / "b.begun.json"
    begun.write_text(json.dumps({**json.loads(begun.read_text()), "seconds": 100.0}))
    road[1].fault = None
    notes = walk(tmp_path, road)
    assert done == ["a", "b"]
    assert notes[1].seconds >= 100.0
    assert not begun.exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is True
    assert summary["seconds"] >= 100.0


def test_the_shipped_steps_tell_settings_that_json_can_hold() -> None:
    road = steps((1, 2), 1, height=48, width=64)
    for step in road:
        settings = dict(step.settings())
        assert json.loads(json.dumps(settings)) == settings
    assert [step.name for step in road][:4] == ["check", "record", "convert", "report"]


def test_walking_needs_no_page(tmp_path: Path) -> None:
    assert [note.name for note in Road(tmp_path, [Counted("a", [])], lambda _: None).walk()] == ["a"]


# The page.


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


FIGURES: dict[str, dict[str, Any]] = {
    "check": {"streams": [{"topic": "/a", "count": 3, "rate_hz": None, "shape": None}]},
    "record": {
        "episodes": [
            {"task": "t<1>", "seed": 0, "seconds": 1.0, "messages": 9, "megabytes": 0.1, "lost": "",
             "bag": "t/episode", "instruction": "Do & go"},
        ],
        "failed_attempts": 0,
    },
    "convert": {
        "datasets": [
            {"task": "t<1>", "episodes": 1, "frames": 9, "left_out": [["a", "b"]], "times_real_time": None}
        ]
    },
    "report": {
        "datasets": [
            {"task": "t<1>", "verdicts": {"good": 1, "suspect": 0, "bad": 0}, "findings": ["a < b"],
             "page": "quality/t/report.html", "videos": ["videos/t_0.mp4"]},
        ]
    },
    "train": {
        "tasks": ["t<1>", "u"], "forgetting": {"loss": [[1.0, None], [0.5, 2.0]]}, "page": "train/report.html"
    },
    "evaluate": {
        "max_steps": 250, "first_seed": 100,
        "tasks": [
            {"task": 1, "name": "t<1>", "successes": 0, "trials": 2, "interval_95": [0.0, 0.66],
             "mean_score": 1.5},
        ],
    },
    "drive": {
        "tasks": [
            {"task": "t<1>", "sentence": "Do <it>", "start_s": 0.5, "score": 10.0,
             "video": "videos/drive.mp4", "stop_s": 0.1, "stop_reason": "operator_stop", "resume_s": 0.2},
        ],
        "switch": {"from": "u", "to": "t<1>", "seconds": 0.3},
        "chunks": 9, "failures": 0, "latency_p50_s": 0.05, "latency_max_s": 0.1, "real_time_factor": 0.5,
        "held": {"policy_lost": 2},
    },
    "later": {"something": "new"},
}  # fmt: skip


def test_the_page_shows_every_step_and_needs_no_server() -> None:
    notes = [
        Note(name, f"title of {name}", "f", 1.0, (f"do <{name}>",), told) for name, told in FIGURES.items()
    ]
    page = render(notes, len(notes))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert [source for source in tags.sources if not source.startswith("#")] == [
        "quality/t/report.html",
        "videos/t_0.mp4",
        "train/report.html",
        "videos/drive.mp4",
    ]
    assert {f"#{name}" for name in FIGURES} <= set(tags.sources)
    assert "<svg" in page, "the forgetting matrix"
    assert "0 of 2" in page
    assert "policy_lost (2 times)" in page
    for name in FIGURES:
        assert f"Title of {name}" in page
        assert f"do &lt;{name}&gt;" in page
    assert "t&lt;1&gt;" in page
    assert "Do &amp; go" in page
    assert "steps are done" not in page
    assert "operator_stop" in page
    assert "1 of 5 steps are done" in render(notes[:1], 5)


# Recordings of an interrupted run.


def told(task: str, number: int) -> dict[str, Any]:
    return {"task": task, "number": number, "bag": f"{task}/episode_000{number}_{task}"}


def recording(root: Path, task: str, number: int, whole: bool = True) -> Path:
    folder = root / task / f"episode_000{number}_{task}"
    folder.mkdir(parents=True)
    (folder / "a.mcap").touch()
    if whole:
        (folder / "metadata.yaml").touch()
    return folder


def test_the_shelf_keeps_what_is_whole_and_removes_the_rest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, {"height": 1})
    kept = recording(tmp_path, "a", 0)
    shelf.put(told("a", 0))
    cut_off = recording(tmp_path, "a", 1, whole=False)
    not_told = recording(tmp_path, "a", 2)
    again = Shelf(tmp_path, {"height": 1})
    assert again.has("a", 0) == told("a", 0)
    assert again.has("a", 1) is None
    assert kept.exists()
    assert not cut_off.exists()
    assert not not_told.exists()


def test_other_settings_empty_the_shelf(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "s", {"height": 1})
    folder = recording(tmp_path / "s", "a", 0)
    shelf.put(told("a", 0))
    assert Shelf(tmp_path / "s", {"height": 2}).told == []
    assert not folder.exists()


def test_datasets_of_other_recordings_are_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "datasets"
    start_anew_for(folder, {"episodes": [1]})
    (folder / "data").touch()
    start_anew_for(folder, {"episodes": [1]})
    assert (folder / "data").exists()
    start_anew_for(folder, {"episodes": [2]})
    assert not (folder / "data").exists()
