"""The demo's recording is what the description promises, and the check sees when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.commands import demo
from kuavo_smolvla_ros.robot.spec import load_spec

pytest.importorskip("rosbags")


def test_the_demo_ends_well_and_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert "streams, all fit" in capsys.readouterr().out


def test_the_recording_holds_every_stream_at_its_rate(tmp_path: Path) -> None:
    spec = load_spec("kuavo_sim")
    demo.write_bag(tmp_path / "bag", spec, seconds=1.0)
    rows_file = tmp_path / "rows.json"
    command = ["check", "kuavo_sim", "--bag", str(tmp_path / "bag"), "--json", str(rows_file)]
    assert main(command) == 0
    for row in json.loads(rows_file.read_text())["streams"]:
        stream = spec.streams[row["stream"]]
        assert row["count"] == stream.rate_hz
        assert row["age_p50_ms"] == pytest.approx(demo.TRANSPORT_S * 1000)


def test_a_picture_of_another_size_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from kuavo_smolvla_ros.robot.images import encode_jpeg

    small = np.frombuffer(encode_jpeg(np.zeros((120, 160, 3), np.uint8), 90), np.uint8)
    monkeypatch.setattr(demo, "_picture", lambda _time_s: small)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "160x120" in capsys.readouterr().out
