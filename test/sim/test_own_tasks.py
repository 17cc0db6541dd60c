"""Tasks from files outside the package, and the recordings of their experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.data.recording_metadata import read_recording_metadata
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.nodes.sim_bag import record_expert
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.vectors import decode_state
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.own_tasks import VARIABLE
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task, task_numbers

OWN = """
from kuavo_smolvla_ros.sim import scene
from kuavo_smolvla_ros.sim.expert import Expert
from kuavo_smolvla_ros.sim.task import Task, TimeBonus


class Wave(Task):
    number = 7
    name, instruction = "task7_wave", "Wave with the left arm"
    ready_pose = "task1_ready"
    time_limit_s = 2.0
    time_bonus = TimeBonus(0.0, 0.0, 0.0)

    def build(self, spec):
        scene.add_table(spec, "table", (0.6, 0.0, 0.6), (0.3, 0.6, 0.02))

    def place(self, sim, rng):
        self.start = sim.state()[0]

    def points(self, sim):
        return {"moved": 100.0 * (abs(sim.state()[0] + 0.1745) > 0.05)}

    def succeeded(self, sim, best):
        return best["moved"] > 0


class WaveExpert(Expert):
    def left(self, arm):
        yield from arm.move_joints(arm.joints + [0.2, 0, 0, 0, 0, 0, 0], duration_s=0.5)


TASK, EXPERT = Wave, WaveExpert
"""
SMALL = """
extends: kuavo_sim.yaml
cameras:
  head_cam_h: {height: 24, width: 32}
  wrist_cam_l: {height: 24, width: 32}
  wrist_cam_r: {height: 24, width: 32}
"""


@pytest.fixture
def wave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of one's own that this process knows."""
    file = tmp_path / "wave.py"
    file.write_text(OWN)
    monkeypatch.setenv(VARIABLE, str(file))
    return file


@pytest.mark.usefixtures("wave")
def test_a_file_adds_a_task_and_its_expert() -> None:
    assert task_numbers() == [1, 2, 3, 4, 7]
    sim = Simulation(make_task(7))
    assert sim.task.instruction == "Wave with the left arm"
    assert type(make_expert(sim, 0)).__name__ == "WaveExpert"
    assert make_task(1).name == "task1_moving_grasp"


def test_without_the_variable_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UsageError, match="no task 7; choose one of 1, 2, 3, 4, or name the file of your own"):
        make_task(7)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("TASK, EXPERT = Wave, WaveExpert", "", "has no TASK"),
        ("TASK, EXPERT = Wave, WaveExpert", "TASK = 5", "has no TASK"),
        ("TASK, EXPERT = Wave, WaveExpert", "TASK, EXPERT = Wave, Wave", "no class derived from sim.expert"),
        ("    number = 7\n", "", "Wave in .* sets no number"),
        ("number = 7", "number = 2", "takes the number 2, which the package has a task for"),
        ("def succeeded", "def succeded", "does not say succeeded"),
        ("import scene", "import scenery", "does not load: ImportError"),
        ('"task1_ready"', '"nowhere"', "has no pose nowhere; set ready_pose of Wave to one of zero"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(
    wave: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, complaint: str
) -> None:
    assert old in OWN
    other = wave.with_name(f"{abs(hash(new + old))}.py")  # each file is read once
    other.write_text(OWN.replace(old, new))
    monkeypatch.setenv(VARIABLE, str(other))
    with pytest.raises(UsageError, match=complaint) as raised:
        make_task(7 if "number = 2" not in new else 2).ready_state()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["none.py", "{file}:{file}"])
def test_places_that_cannot_be_meant(wave: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv(VARIABLE, place.format(file=wave))
    with pytest.raises(UsageError, match=r"which is no file|both have the task number 7"):
        make_task(1)


def test_a_task_without_an_expert_says_so(wave: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wave.with_name("plain.py")
    plain.write_text(OWN.replace("TASK, EXPERT = Wave, WaveExpert", "TASK = Wave"))
    monkeypatch.setenv(VARIABLE, str(plain))
    sim = Simulation(make_task(7))
    with pytest.raises(UsageError, match="task 7 has no scripted expert"):
        make_expert(sim, 0)


@pytest.mark.usefixtures("wave")
def test_an_experts_episode_is_recorded_as_the_nodes_would(tmp_path: Path) -> None:
    description = tmp_path / "small.yaml"
    description.write_text(SMALL)
    spec = load_spec(description)
    sim = Simulation(make_task(7))
    episode = record_expert(sim, 3, tmp_path / "bag", spec)
    last = sim.state()
    sim.close()
    assert episode.score.success
    with open_bag(tmp_path / "bag") as bag:
        told = read_recording_metadata(bag.metadata)
        newest, counts = {}, dict.fromkeys((s.topic for s in spec.streams.values()), 0)
        for message in bag.messages():
            counts[message.topic] += 1
            newest[message.topic] = message.decode()
    assert told is not None
    assert (told.task, told.instruction) == ("task7_wave", "Wave with the left arm")
    assert told.fingerprint == spec.fingerprint
    seconds = counts["/kuavo/arm_state"] / 500
    for stream in spec.streams.values():
        assert counts[stream.topic] == pytest.approx(seconds * stream.rate_hz, abs=2), stream.name
    states = {s.name: newest[s.topic] for s in spec.inputs.values()}
    assert decode_state(spec, states) == pytest.approx(last, abs=1e-6)


@pytest.mark.usefixtures("wave")
def test_what_fails_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = Simulation(make_task(7))
    monkeypatch.setattr(type(sim.task), "succeeded", lambda *_: False)
    spec = load_spec("kuavo_sim")
    monkeypatch.setattr(sim.cameras, "picture", lambda *_: np.zeros((480, 640, 3), np.uint8))
    assert not record_expert(sim, 0, tmp_path / "bag", spec).score.success
    assert not (tmp_path / "bag").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--episodes", "0"], 2, "--episodes of at least 1"),
        (["--viewer"], 2, "goes without"),
        (["--robot", "kuavo_sim_bag"], 1, "kuavo_msgs/msg/sensorsData, a type of the robot's own"),
        (["--robot", "nobody"], 1, "no robot description 'nobody'"),
    ],
)
@pytest.mark.usefixtures("wave")
def test_wrong_use_of_the_command(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    assert main(["sim", "--task", "7", "--bags", str(tmp_path / "bags"), *arguments]) == status
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("bags/*"))
