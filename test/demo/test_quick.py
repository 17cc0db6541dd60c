"""The quick look: its recording is what the description promises, and the check sees when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.demo import made_up
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.spec import load_spec


def test_the_quick_demo_ends_well_and_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "7 streams of 3 s, all fit kuavo_sim" in out
    assert "done already" in out
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["complete"] is True
    assert [stream["count"] for stream in summary["steps"]["check"]["streams"]][:4] == [90, 90, 90, 1500]
    assert "/kuavo/arm_state" in (tmp_path / "demo" / "report.html").read_text()


def test_the_recording_holds_every_stream_at_its_rate(tmp_path: Path) -> None:
    spec = load_spec("kuavo_sim")
    made_up.write_bag(tmp_path / "bag", spec, seconds=1.0)
    rows_file = tmp_path / "rows.json"
    command = ["check", "kuavo_sim", "--bag", str(tmp_path / "bag"), "--json", str(rows_file)]
    assert main(command) == 0
    for row in json.loads(rows_file.read_text())["streams"]:
        stream = spec.streams[row["stream"]]
        assert row["count"] == stream.rate_hz
        assert row["age_p50_ms"] == pytest.approx(made_up.TRANSPORT_S * 1000)


def test_a_picture_of_another_size_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = np.frombuffer(encode_jpeg(np.zeros((120, 160, 3), np.uint8), 90), np.uint8)
    monkeypatch.setattr(made_up, "_picture", lambda _time_s: small)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "160x120" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "1", "7"], "there is no task 7"),
        (
            ["--until", "later"],
            "there is no step 'later' here; choose one of check, record, convert, report, ",
        ),
        (["--episodes", "0"], "--episodes is at least 1"),
        (["--real-time-factor", "-1"], "--real-time-factor from 0 to 100"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()
