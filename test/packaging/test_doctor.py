"""`kuavo-smolvla doctor` tells what is there by trying it, and fails for what is needed only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.commands import doctor, environment
from kuavo_smolvla_ros.commands.environment import Finding, Probe, examine
from kuavo_smolvla_ros.errors import UserError


def find(name: str) -> Finding:
    return examine(next(probe for probe in environment.PROBES if probe.name == name))


def finding(name: str, need: str, ok: bool) -> Finding:
    return Finding(name, need, ok, "found", "" if ok else "much", "" if ok else "elsewhere")


def test_this_machine_has_a_working_core(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert all(f["ok"] for f in report["findings"] if f["need"] == "core")


def test_what_is_missing_says_what_it_disables_and_where_to_get_it() -> None:
    lines = doctor.table([finding("GPU", "", ok=False), finding("Python", "core", ok=True)])
    assert "missing  GPU" in lines
    assert "disables: much" in lines
    assert "get it:   elsewhere" in lines
    assert lines.count("disables") == 1


@pytest.mark.parametrize(("needs", "bad"), [((), ["core thing"]), (("ros",), ["core thing", "ros thing"])])
def test_only_what_is_needed_counts(needs: tuple[str, ...], bad: list[str]) -> None:
    findings = [
        finding("core thing", "core", ok=False),
        finding("ros thing", "ros", ok=False),
        finding("train thing", "train", ok=False),
        finding("GPU", "", ok=False),
        finding("fine", "core", ok=True),
    ]
    assert doctor.verdict(findings, needs) == bad


def test_a_missing_core_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise ImportError("libthing.so: cannot open shared object file\nmore")

    probe = Probe("thing", "core", broken, "everything", "make setup")
    monkeypatch.setattr(environment, "PROBES", (probe,))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "libthing.so: cannot open" in out
    assert "not complete (thing)" in out


@pytest.mark.parametrize(
    "error", [RuntimeError(""), UserError("bad"), AttributeError("gone"), OSError(2, "no")]
)
def test_no_broken_installation_stops_the_report(error: Exception) -> None:
    def look() -> str:
        raise error

    result = examine(Probe("thing", "ros", look, "this", "that"))
    assert not result.ok
    assert result.found
    assert (result.disables, result.get) == ("this", "that")


def test_each_probe_belongs_to_a_need_and_says_what_to_do() -> None:
    names = [probe.name for probe in environment.PROBES]
    assert len(set(names)) == len(names)
    for probe in environment.PROBES:
        assert probe.need in (*environment.NEEDS, "")
        assert probe.disables
        assert probe.get


def test_ros_1_in_the_shell_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DISTRO", "noetic")
    monkeypatch.setenv("ROS_VERSION", "1")
    assert "ROS 1 (noetic) is sourced" in find("ROS 2").found


@pytest.mark.parametrize("name", ["ROS 2", "middleware", "video decoder", "rendering"])
def test_what_make_setup_brings_is_found(name: str) -> None:
    for module in ("rclpy", "lerobot", "mujoco"):
        pytest.importorskip(module)
    result = find(name)
    assert result.ok, result.found


def test_a_small_shared_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB, as Docker gives by default, hold one process's segment."""
    real = shutil.disk_usage
    small = shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small if path == "/dev/shm" else real(path))
    result = find("shared memory")
    assert not result.ok
    assert "64 MB" in result.found


def test_weights_are_looked_for_where_hugging_face_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    absent = find("weights smolvla_base")
    assert not absent.ok
    assert str(tmp_path) in absent.found
    assert "lerobot/smolvla_base" in absent.get

    folder = tmp_path / "models--lerobot--smolvla_base"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(bytes(12_000_000))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    present = find("weights smolvla_base")
    assert present.ok
    assert present.found.startswith("0.01 GB")


def test_an_unknown_need_is_wrong_use() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--need", "luck"])
    assert stopped.value.code == 2
