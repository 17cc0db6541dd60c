"""`kuavo-smolvla sim`."""

from __future__ import annotations

import pytest

from kuavo_smolvla_ros.cli import main


def test_an_expert_episode_prints_its_score(capsys):
    assert main(["sim", "--task", "1", "--expert", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "zone1_position" in printed
    assert "succeeded" in printed.splitlines()[-1]
    assert "100.0 points" in printed.splitlines()[-1]


def test_nobody_trying_is_no_failure(capsys):
    assert main(["sim", "--task", "2", "--level", "contest"]) == 0
    assert "not done" in capsys.readouterr().out


def test_a_video_has_the_episodes_length(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "out.mp4"
    assert main(["sim", "--task", "2", "--expert", "--video", str(path)]) == 0
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        assert stream.average_rate == 20
    assert frames[0].shape == (640, 640, 3)
    assert 100 < len(frames) < 500
    assert frames[0].std() > 10
    assert abs(frames[0].astype(int) - frames[-1].astype(int)).max() > 50


def test_a_still_is_written_at_its_time(tmp_path, capsys):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "out.png"
    assert main(["sim", "--task", "1", "--expert", "--still", str(path), "--at", "2"]) == 0
    assert cv2.imread(str(path)).shape == (640, 640, 3)
    assert main(["sim", "--expert", "--still", str(tmp_path / "late.png"), "--at", "100"]) == 1
    assert "before --at 100 s" in capsys.readouterr().err
    assert not (tmp_path / "late.png").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--task", "9"], 2, "there is no task 9"),
        (["--level", "hard"], 2, "there is no level"),
        (["--seed", "-1"], 2, "--seed"),
        (["--video", "/nowhere/at/all.mp4"], 1, "cannot write the video"),
        (["--video", "film.nonsense"], 1, "cannot write the video"),
        (["--still", "/nowhere/at/all.jpg", "--at", "0"], 1, "cannot write the picture"),
        (["--still", "picture.nonsense", "--at", "0"], 1, "cannot write the picture"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, status, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sim", *arguments]) == status
    assert words in capsys.readouterr().err


def test_the_viewer_needs_a_display(capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert main(["sim", "--viewer"]) == 2
    assert "--video" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sim", "--help"])
    assert stop.value.code == 0
    assert "kuavo-smolvla sim --task 1 --expert --video" in capsys.readouterr().out
