"""Datasets made of datasets hold the same episodes, the same bytes of video, and remember where from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.commands import dataset as command
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.merge import choose_parts, load_dataset, merge, split, subset
from kuavo_smolvla_ros.data.recordings import Recording, find_recordings
from kuavo_smolvla_ros.data.stills import StillSettings
from kuavo_smolvla_ros.data.synthetic import extract_recipe, write_recipe
from kuavo_smolvla_ros.data.video import VideoSettings
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.errors import UsageError, UserError

LIMITS = PackLimits(seconds=2.0)
Contents = Callable[[Path], dict[str, str]]
WEIGH = {"task": "task2", "instruction": "Weigh"}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "a": [{"length": 9, "seed": 1}],
    "b": [{"length": 7, "seed": 2}, {"length": 8, "seed": 3, **WEIGH}],
    "c": [{"length": 12, "seed": 4, **WEIGH}],
    "d": [{"length": 5, "seed": 5}, {"reject": "bad"}],
}


@pytest.fixture
def make(small_spec: str, tmp_path: Path) -> Callable[..., Path]:
    """`make("name", "ab")`: a dataset of the recordings a and b."""

    def dataset(name: str, letters: str, pictures: Any = None, recipes: Any = None) -> Path:
        folder = tmp_path / f"{name}_bags"
        for letter in letters:
            write_recipe(folder / f"{letter}.bag", *(recipes or RECIPES)[letter])
        settings = ConversionSettings(small_spec, pictures or VideoSettings(), limits=LIMITS)
        convert(find_recordings([folder]), tmp_path / name, settings, extract_recipe)
        return tmp_path / name

    return dataset


def numbers_and_sources(root: Path) -> list[tuple[str, int]]:
    dataset = load_dataset(root)
    return [
        (episode["source"], episode["length"])
        for entry in dataset.recordings.values()
        for episode in entry["episodes"]
    ]


def same_but_for(one: dict[str, str], two: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


@pytest.mark.parametrize(
    "pictures",
    [VideoSettings(), VideoSettings("h264", 26, 4, "ultrafast"), StillSettings("jpeg")],
    ids=["av1", "h264", "jpeg"],
)
def test_merged_is_byte_for_byte_what_converting_all_at_once_gives(
    make: Callable[..., Path], tmp_path: Path, contents: Contents, pictures: Any
) -> None:
    parts = [make("one", "ab", pictures), make("two", "cd", pictures)]
    report = merge(parts, tmp_path / "merged", LIMITS)
    assert (report.episodes, report.frames) == (5, 41)
    together = contents(make("together", "abcd", pictures))
    assert contents(tmp_path / "merged") == together


def test_all_episodes_of_one_are_that_one(
    make: Callable[..., Path], tmp_path: Path, contents: Contents
) -> None:
    root = make("whole", "abcd")
    subset(root, tmp_path / "all", range(5), limits=LIMITS)
    assert contents(tmp_path / "all") == contents(root)


def test_a_part_reads_as_the_whole_did(make: Callable[..., Path], tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = make("whole", "abcd")
    subset(root, tmp_path / "part", [1, 3, 4])
    whole = LeRobotDataset("test/whole", root=root, video_backend="pyav")
    part = LeRobotDataset("test/part", root=tmp_path / "part", video_backend="pyav")
    rows = [*range(9, 16), *range(24, 36), *range(36, 41)]
    assert len(part) == len(rows)
    for here, there in enumerate(rows):
        ours, original = part[here], whole[there]
        assert ours["task"] == original["task"]
        for key in ("observation.state", "action", "timestamp", "frame_index"):
            assert (ours[key] == original[key]).all()
        for role in part.meta.video_keys:
            assert (ours[role] == original[role]).all()
        assert ours["index"] == here
    values = np.stack([whole[i]["action"].numpy() for i in rows]).astype(np.float64)
    np.testing.assert_allclose(part.meta.stats["action"]["std"], values.std(axis=0), atol=1e-6)


def test_a_part_remembers_what_was_not_chosen_and_takes_it_up_no_more(
    make: Callable[..., Path], tmp_path: Path, small_spec: str
) -> None:
    root = make("whole", "abcd")
    subset(root, tmp_path / "part", [0, 2], reasons={1: "blurred"})
    entry = load_dataset(tmp_path / "part").recordings["b.bag"]
    assert [e["length"] for e in entry["episodes"]] == [8]
    assert [r["reason"] for r in entry["rejected"]] == ["blurred"]
    again = convert(
        find_recordings([tmp_path / "whole_bags"]),
        tmp_path / "part",
        ConversionSettings(small_spec, limits=LIMITS),
        extract_recipe,
    )
    assert (again.known, again.episodes) == (4, 0)


def test_a_merge_into_an_existing_dataset_adds(make: Callable[..., Path], contents: Contents) -> None:
    one, two = make("one", "ab"), make("two", "cd")
    before = contents(one)
    report = merge([two], one)
    assert report.episodes == 2
    assert load_dataset(one).info["total_episodes"] == 5
    assert all(name.startswith("meta/") for name in before if contents(one)[name] != before[name])


def test_a_recording_in_both_comes_once(make: Callable[..., Path], tmp_path: Path) -> None:
    merge([make("one", "ab"), make("two", "bc")], tmp_path / "merged")
    assert [length for _, length in numbers_and_sources(tmp_path / "merged")] == [9, 7, 8, 12]


def test_one_name_for_two_recordings_becomes_two_names(make: Callable[..., Path], tmp_path: Path) -> None:
    other = {"a": [{"length": 6, "seed": 60}]}
    merge([make("one", "ab"), make("two", "a", recipes=other)], tmp_path / "merged")
    assert list(load_dataset(tmp_path / "merged").recordings) == ["one/a.bag", "b.bag", "two/a.bag"]


def test_a_merge_that_crashed_is_finished_by_the_next(
    make: Callable[..., Path], tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [make("one", "ab"), make("two", "cd")]
    merge(parts, tmp_path / "clean", LIMITS)
    with monkeypatch.context() as patch:

        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("kuavo_smolvla_ros.data.convert.mark_ready", crash)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "crashed", LIMITS)
    assert merge(parts, tmp_path / "crashed", LIMITS).resumed == 4
    assert contents(tmp_path / "crashed") == contents(tmp_path / "clean")


def test_what_does_not_fit_together_is_refused(
    make: Callable[..., Path], tmp_path: Path, small_spec: str
) -> None:
    one = make("one", "a")
    with pytest.raises(UserError, match="codec h264, asked for is libsvtav1"):
        merge([one, make("two", "b", VideoSettings("h264", 26, 2, "ultrafast"))], tmp_path / "merged")
    with pytest.raises(UsageError, match="two datasets"):
        merge([one], tmp_path / "merged")
    with pytest.raises(UsageError, match="out of itself"):
        merge([one, make("three", "c")], one)
    with pytest.raises(UserError, match="there is no dataset"):
        merge([one, tmp_path / "nothing"], tmp_path / "merged")
    with pytest.raises(UsageError, match=r"episodes 0\.\.0, not 1"):
        subset(one, tmp_path / "part", [0, 1])
    with pytest.raises(UsageError, match="no episode"):
        subset(one, tmp_path / "part", [])
    with pytest.raises(UsageError, match="exists already"):
        subset(one, tmp_path / "three", [0])


# Dividing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def many(small_spec: str, tmp_path: Path) -> Path:
    for number in range(12):
        task = WEIGH if number % 3 == 0 else {}
        write_recipe(
            tmp_path / "bags" / f"{number:02d}.bag",
            *({"length": 2 + part, "seed": 100 * number + part, **task} for part in range(1 + number % 2)),
        )
    recordings: list[Recording] = find_recordings([tmp_path / "bags"])
    settings = ConversionSettings(small_spec, StillSettings("jpeg"))
    convert(recordings, tmp_path / "many", settings, extract_recipe)
    return tmp_path / "many"


def test_parts_are_disjoint_complete_and_keep_recordings_whole(many: Path) -> None:
    dataset = load_dataset(many)
    parts = choose_parts(dataset, {"train": 0.75, "validation": 0.25})
    assert sorted(parts["train"] + parts["validation"]) == list(range(18))
    assert len(parts["validation"]) in (4, 5, 6)
    number = 0
    for entry in dataset.recordings.values():
        members = set(range(number, number + len(entry["episodes"])))
        assert members <= set(parts["train"]) or members <= set(parts["validation"])
        number += len(entry["episodes"])


def test_every_task_is_in_every_part(many: Path) -> None:
    dataset = load_dataset(many)
    tasks = [e["task"] for entry in dataset.recordings.values() for e in entry["episodes"]]
    for seed in range(5):
        parts = choose_parts(dataset, {"train": 0.6, "validation": 0.4}, seed)
        for chosen in parts.values():
            assert {tasks[number] for number in chosen} == {"task2", "task1_moving_grasp"}


def test_the_seed_decides_the_division(many: Path) -> None:
    dataset = load_dataset(many)
    shares = {"train": 0.5, "validation": 0.5}
    assert choose_parts(dataset, shares, 1) == choose_parts(dataset, shares, 1)
    assert any(choose_parts(dataset, shares, 1) != choose_parts(dataset, shares, s) for s in range(2, 6))


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}, {"a": 1.0, "b": 0.0}])
def test_shares_that_do_not_add_up_are_refused(many: Path, shares: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="add up to 1"):
        choose_parts(load_dataset(many), shares)


def test_too_few_recordings_to_divide_are_said(make: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="nothing is left for b"):
        choose_parts(load_dataset(make("one", "a")), {"a": 0.5, "b": 0.5})


def test_a_division_is_written(many: Path, tmp_path: Path) -> None:
    roots = {name: tmp_path / name for name in ("train", "validation")}
    reports = split(many, roots, {"train": 0.75, "validation": 0.25})
    totals = {name: load_dataset(root).info["total_episodes"] for name, root in roots.items()}
    assert totals == {name: report.episodes for name, report in reports.items()}
    assert sum(totals.values()) == 18


# The command ------------------------------------------------------------------------------------------------


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def test_the_command_tells_merges_and_takes_parts(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make("one", "ab"), make("two", "cd")
    assert call("merge", one, two, "--into", tmp_path / "merged") == 0
    assert call("subset", tmp_path / "merged", "--without", "1-2,4", "--into", tmp_path / "part") == 0
    capsys.readouterr()
    assert call("info", tmp_path / "part", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["episodes"], told["frames"], told["recordings"]) == (2, 21, 4)
    assert told["episodes_per_task"] == {"task1_moving_grasp": 1, "task2": 1}
    assert {item["reason"] for item in told["left_out"]} == {"bad", "not chosen for this part of the dataset"}
    assert call("info", tmp_path / "part") == 0
    assert "left out: 4" in capsys.readouterr().out


def test_a_part_by_the_verdict_of_the_quality_report(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twins = {"a": [{"length": 30, "seed": 1}], "b": [{"length": 30, "seed": 1, **WEIGH}]}
    root = make("whole", "ab", recipes=twins)
    lenient = tmp_path / "lenient.yaml"  # signals of a recipe know no limits
    off = ("fast_share", "jerky_share", "outside_limits_share", "at_limit_share", "lag_s", "lead_s")
    lenient.write_text("".join(f"{name}: null\n" for name in off) + "duplicate_distance: 0.5\n")
    verdict = ("--verdict", "good", "suspect", "--thresholds", lenient)
    assert call("subset", root, *verdict, "--into", tmp_path / "part") == 0
    assert "1 episodes (30 frames)" in capsys.readouterr().out
    (left,) = load_dataset(tmp_path / "part").recordings["b.bag"]["rejected"]
    assert left["reason"] == "judged bad: repeats episode 0 (a.bag#0)"
    with pytest.raises(UsageError, match="is suspect"):
        call("subset", root, "--verdict", "suspect", "--thresholds", lenient, "--into", tmp_path / "none")
    with pytest.raises(UsageError, match="belong to --verdict"):
        call("subset", root, "--episodes", "0", "--thresholds", lenient, "--into", tmp_path / "none")


@pytest.mark.parametrize(("text", "numbers"), [("3", {3}), ("0-2", {0, 1, 2}), ("0-1, 5,7-7", {0, 1, 5, 7})])
def test_lists_of_numbers(text: str, numbers: set[int]) -> None:
    assert command.parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-2", "1,,2"])
def test_bad_lists_of_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither a number nor a range"):
        command.parse_numbers(text)
