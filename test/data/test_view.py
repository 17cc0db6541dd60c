"""An episode as a rerun recording, read back with rerun itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.dataset_reader import DatasetReader
from kuavo_smolvla_ros.data.episodes import extract
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic_bags import events, write
from kuavo_smolvla_ros.robot.spec import load_spec

rr = pytest.importorskip("rerun")


@pytest.fixture(scope="module")
def dataset(small_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = load_spec(small_spec)
    rates = {"arm_state": 100.0, "gripper_state": 100.0}
    bags = tmp_path_factory.mktemp("bags")
    write(bags / "one", spec, events(spec, 2.5, rates_hz=rates))
    root = tmp_path_factory.mktemp("out") / "data"
    label = {"task": "task1_moving_grasp", "instruction": "Pick it up", "trim_idle": False}
    convert(find_recordings([bags]), root, ConversionSettings(small_spec, extract=label), extract)
    return root


def test_states_actions_and_pictures_are_in_the_recording(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "deep" / "episode.rrd"
    assert main(["view", str(dataset), "--episode", "0", "--save", str(target)]) == 0
    assert f"open with: rerun {target}" in capsys.readouterr().out
    recording = rr.dataframe.load_recording(str(target))
    paths = {str(column.entity_path) for column in recording.schema().component_columns()}
    episode = DatasetReader.open(dataset).episode(0)
    assert {"/cameras/head_cam_h", "/cameras/wrist_cam_l", "/cameras/wrist_cam_r"} <= paths
    assert {"/joints/zarm_l1_joint/state", "/joints/zarm_l1_joint/action", "/about"} <= paths
    for what, values in (("state", episode.state), ("action", episode.action)):
        rows = _read(recording, f"/joints/zarm_l4_joint/{what}")
        np.testing.assert_allclose([row[0] for row in rows], values[:, 3], rtol=1e-6)
    assert len(_read(recording, "/cameras/head_cam_h")) == len(episode)


def _read(recording: rr.dataframe.Recording, path: str) -> list:
    table = recording.view(index="episode_time", contents=path).select().read_all()
    (name,) = (n for n in table.column_names if "scalars" in n or n.endswith(":blob"))
    return [value for value in table[name].to_pylist() if value is not None]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--episode", "7", "--save", "x.rrd"], 1, "episodes 0..0, not 7"),
        (["--episode", "-1"], 2, "count from 0"),
        (["--save", "x.mp4"], 2, "end in .rrd"),
        (["--episode", "0"], 2, "needs a display, and DISPLAY is not set; use --save"),
    ],
)
def test_wrong_use_is_said(
    dataset: Path,
    arguments: list[str],
    status: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["view", str(dataset), *arguments]) == status
    assert says in capsys.readouterr().err
