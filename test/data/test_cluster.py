"""On a cluster the dataset is the same, byte for byte, and so is what is said of bad recordings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kuavo_smolvla_ros.data import cluster
from kuavo_smolvla_ros.data.cluster import on_cluster, process_there
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.shard import Job
from kuavo_smolvla_ros.data.synthetic import extract_recipe
from kuavo_smolvla_ros.data.video import VideoSettings, encoder_versions
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.errors import UsageError, UserError


@pytest.mark.slow  # starting a Ray takes longer than all else here
def test_two_workers_of_a_cluster_give_the_same_bytes(
    small_spec: str,
    tmp_path: Path,
    recipes: Callable[..., list[Recording]],
    contents: Callable[[Path], dict[str, str]],
) -> None:
    pytest.importorskip("ray")
    recordings = recipes(
        **{f"r{n}": [{"length": 10, "seed": n}] for n in range(6)},
        bad=[{"length": 5, "seed": 50, "broken_picture": 2}],
        crash=[{"crash": "a defect"}],
    )
    settings = ConversionSettings(small_spec, limits=PackLimits(seconds=2.0))
    here = convert(recordings, tmp_path / "here", settings, extract_recipe)
    there = convert(recordings, tmp_path / "there", settings, extract_recipe, runner=on_cluster("local", 2))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert there.left_out == here.left_out
    assert there.left_out == [
        ("bad.bag#0", "wrist_cam_r: the picture at step 2 is truncated"),
        ("crash.bag", "failed with RuntimeError: a defect"),
    ]
    wrong = ConversionSettings(str(Path(small_spec).with_name("nobody.yaml")))
    job = Job(wrong.spec, extract_recipe, {}, VideoSettings(), tmp_path)
    (first, *_) = on_cluster("local", 1)(job, recordings[:1])  # a fault of the machine there is told here
    assert first.failure is not None
    assert "nobody.yaml" in first.failure


def test_another_encoder_on_a_machine_is_refused(tmp_path: Path, recipes: Callable[..., list]) -> None:
    (recording,) = recipes(a=[{"length": 2}])
    job = Job("kuavo_sim", extract_recipe, {}, VideoSettings(), tmp_path, encode=False)
    assert process_there(job, recording, encoder_versions()).episodes
    with pytest.raises(UsageError, match="has another encoder"):
        process_there(job, recording, {**encoder_versions(), "libavcodec": "1.2.3"})


def test_without_ray_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    job = Job("kuavo_sim", extract_recipe, {}, VideoSettings(), tmp_path)
    with pytest.raises(UsageError, match=r"pip install 'kuavo_smolvla_ros\[cluster\]'"):
        next(on_cluster("local", 1)(job, []))


def test_no_cluster_at_an_address_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    job = Job("kuavo_sim", extract_recipe, {}, VideoSettings(), tmp_path)
    with pytest.raises(UserError, match="there is no Ray cluster at auto"):
        next(on_cluster("auto", 1)(job, []))


def test_descriptions_by_path_are_sent_with_their_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert cluster._absolute_spec("here/robot.yaml") == "/here/robot.yaml"
    assert cluster._absolute_spec("kuavo_sim") == "kuavo_sim"
