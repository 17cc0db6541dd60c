"""The command data engineers use: recordings of every format in, a dataset out, an honest exit status."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from kuavo_smolvla_ros.data.convert_config import load_conversion
from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.merge import load_dataset
from kuavo_smolvla_ros.data.synthetic_bags import events, write
from kuavo_smolvla_ros.data.task_file import shipped_tasks
from kuavo_smolvla_ros.data.video import VideoSettings
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.paths import config_dir, share_dir
from kuavo_smolvla_ros.robot.spec import load_spec

START_NS = 1_700_000_000_000_000_000
NEEDED = ["bags=b", "dataset=d", "robot=kuavo_sim"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "convert_bags", share_dir() / "training" / "convert_bags.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bags(small_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = load_spec(small_spec)
    folder = tmp_path_factory.mktemp("bags")
    for number, layout in enumerate(("mcap", "bag", "sqlite3")):
        happened = events(
            spec,
            3.0,
            is_ros1=layout == "bag",
            start_ns=START_NS + number * 10**12,
            rates_hz={"arm_state": 50, "gripper_state": 50, "arm_command": 50, "gripper_command": 50},
        )
        write(folder / (f"{layout}.bag" if layout == "bag" else layout), spec, happened, layout)
    return folder


@pytest.fixture
def call(script: ModuleType, bags: Path, small_spec: str, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        return script.main(
            [f"bags={bags}", f"dataset={tmp_path / 'out'}", f"robot={small_spec}", "workers=1", *arguments]
        )

    return run


def test_recordings_of_three_formats_become_one_dataset(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("task=task2_weighing", "--report", str(tmp_path / "report.json")) == 0
    said = capsys.readouterr().out
    assert "added 3 episodes" in said
    assert "left out 0" in said
    dataset = load_dataset(tmp_path / "out")
    assert list(dataset.recordings) == ["bag.bag", "mcap", "sqlite3"]
    assert list(dataset.identity["tasks"]) == ["task2_weighing"]
    assert dataset.instructions[0].startswith("Pick up the package from the conveyor belt, weigh it")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["episodes"], report["converted"], report["left_out"]) == (3, 3, [])
    assert call("task=task2_weighing") == 0
    assert "added 0 episodes" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--dry-run", "task=task2_weighing") == 0
    assert "would add 3 episodes" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_listed_and_is_exit_status_1(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 1  # these recordings do not say their task
    said = capsys.readouterr().out
    for name in ("bag.bag", "mcap", "sqlite3"):
        assert f"left out: {name}: " in said
    assert "task and instruction" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["robot=kuavo_sim"], 2, "bags is not given; add bags=..."),
        (["bags=x", "dataset=y"], 2, "robot is not given"),
        ([*NEEDED, "pictures=gif"], 2, "gif"),
        ([*NEEDED, "pictures.crf=99"], 2, "crf 99 lies outside 0..63"),
        ([*NEEDED, "pictures.quality=5"], 2, "pictures.quality"),
        ([*NEEDED, "extract.min_episode_s=-1"], 2, "min_episode_s"),
        ([*NEEDED, "extract.min_length=4"], 2, "extract.min_length"),
        ([*NEEDED, "extract.receive_stamped=[camera]"], 2, "has no stream 'camera'"),
        ([*NEEDED, "extract.task=weighing"], 2, "go together"),
        ([*NEEDED, "task=juggling"], 2, "no task 'juggling'; give recorded, task1_moving_grasp"),
        ([*NEEDED, "task=no/such.yaml"], 2, "no/such.yaml cannot be read: No such file"),
        ([*NEEDED, "task=task2_weighing", "extract.task=a", "extract.instruction=b"], 2, "give one of them"),
        ([*NEEDED, "workers=0"], 2, "whole number from 1"),
        ([*NEEDED, "workers=two"], 2, "workers is 'two'"),
        ([*NEEDED, "files.seconds=2000"], 2, "beyond 1000"),
        ([*NEEDED, "files.megabytes=0"], 2, "above 0"),
        ([*NEEDED, "+files.kilobytes=3"], 2, "kilobytes"),
        ([*NEEDED, "nonsense"], 2, "nonsense"),
        ([*NEEDED, "--config", "other"], 2, "no configuration 'other'"),
        (["bags=x", "dataset=y", "robot=nobody"], 1, "no robot description 'nobody'"),
        (["bags=/nowhere", "dataset=y", "robot=kuavo_sim"], 1, "no such recording or folder"),
    ],
)
def test_wrong_use_is_one_sentence(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    complaint: str,
) -> None:
    assert script.main(arguments) == status
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.startswith("convert_bags: ")
    assert captured.err.count("\n") == 1


def test_help_shows_an_example(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "example:" in said
    assert "exit status" in said


def test_the_shipped_rules_are_the_defaults_and_all_of_them() -> None:
    config = yaml.safe_load((config_dir() / "data" / "convert.yaml").read_text())
    known = {f.name: f.default for f in fields(EpisodeSettings)}
    assert MISSING not in known.values()
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config["extract"].items()}
    assert given == known
    assert PackLimits(**config["files"]) == PackLimits()


def test_the_shipped_pictures_are_the_defaults() -> None:
    loaded = load_conversion(NEEDED)
    assert loaded.settings.pictures == VideoSettings()
    assert load_conversion([*NEEDED, "pictures=h264"]).settings.pictures == VideoSettings(
        "h264", 26, 2, "ultrafast"
    )


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((config_dir() / "data" / "pictures").glob("*.yaml"))]
)
def test_every_shipped_way_of_storing_pictures_loads(name: str) -> None:
    load_conversion([*NEEDED, f"pictures={name}"])


@pytest.mark.parametrize("name", shipped_tasks())
def test_every_shipped_task_loads(name: str) -> None:
    extract: Any = load_conversion([*NEEDED, f"task={name}"]).settings.extract
    assert extract["task"] == name
    assert "\n" not in extract["instruction"]
    assert load_conversion(NEEDED).settings.extract["task"] is None


def test_a_task_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cups.yaml"
    file.write_text("task:\n  name: task5_cups\n  instruction: Stack\n    the cups\n")
    extract: Any = load_conversion([*NEEDED, f"task={file}"]).settings.extract
    assert (extract["task"], extract["instruction"]) == ("task5_cups", "Stack the cups")


def test_several_places_can_be_given() -> None:
    loaded = load_conversion(["bags=[monday,tuesday/b.bag]", "dataset=d", "robot=kuavo_sim"])
    assert [str(path) for path in loaded.bags] == ["monday", "tuesday/b.bag"]


def test_another_exception_is_not_swallowed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("told")

    monkeypatch.setattr("kuavo_smolvla_ros.data.convert_config.load_conversion", fail)
    assert script.main([]) == 1
    monkeypatch.setattr(
        "kuavo_smolvla_ros.data.convert_config.load_conversion",
        lambda *_: (_ for _ in ()).throw(UsageError("told")),
    )
    assert script.main([]) == 2
