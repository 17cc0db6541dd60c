from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kuavo_smolvla_ros.experiment.gather import (
    ABOUT,
    ARRAYS,
    FIRST_SEED,
    Gathering,
    cameras,
    demonstrate,
    gather,
    halved,
    places,
    things,
)
from kuavo_smolvla_ros.experiment.ways import TASK_FILES
from kuavo_smolvla_ros.sim.simulation import ARM_INDICES, Simulation
from kuavo_smolvla_ros.sim.tasks import make_task


@pytest.fixture(scope="module")
def bottles() -> Simulation:
    return Simulation(make_task(3), cameras(8, 12))


def test_an_episode_ends_with_success_and_its_arrays_agree(bottles: Simulation) -> None:
    episode = demonstrate(bottles, FIRST_SEED, Gathering(3, 1, height=8, width=12))
    assert episode is not None
    frames = len(episode["states"])
    assert bottles.score().success
    assert episode["pictures"].shape == (frames, 3, 8, 12, 3)
    assert episode["pictures"].dtype == np.uint8
    assert episode["actions"].shape == (frames, 16)
    assert np.ptp(episode["actions"], axis=0)[ARM_INDICES].max() > 0.3


def test_the_same_seed_is_the_same_episode(bottles: Simulation) -> None:
    wanted = Gathering(3, 1, height=8, width=12)
    first, second = (demonstrate(bottles, 5, wanted) for _ in range(2))
    assert first is not None
    assert second is not None
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_pushed_arms_are_told_the_experts_way(bottles: Simulation) -> None:
    """The arms are somewhere else, and what is to be learnt from there is as smooth as without pushes."""
    calm = demonstrate(bottles, 7, Gathering(3, 1, height=8, width=12, nudge_rad=0.0))
    pushed = demonstrate(bottles, 7, Gathering(3, 1, height=8, width=12, nudge_rad=0.02))
    assert calm is not None
    assert pushed is not None
    both = min(len(calm["states"]), len(pushed["states"]))
    assert np.abs(calm["states"][:both] - pushed["states"][:both]).max() > 0.01

    def jerks(episode: dict[str, np.ndarray]) -> float:
        return float(np.abs(np.diff(episode["actions"][:, ARM_INDICES], n=2, axis=0)).mean())

    assert jerks(pushed) < 1.5 * jerks(calm)


def test_an_action_is_what_held_when_the_picture_was_taken(bottles: Simulation) -> None:
    """Row 0 is the arms as they were found; who follows row i at i / 10 s is where the expert led."""
    episode = demonstrate(bottles, 9, Gathering(3, 1, height=8, width=12, nudge_rad=0.0))
    assert episode is not None
    np.testing.assert_allclose(episode["actions"][0], episode["states"][0], atol=0.02)
    # The arms trail what they are told by a tenth of a second; told for later, they would trail by more.
    arms = ARM_INDICES
    now = np.abs(episode["states"][1:, arms] - episode["actions"][:-1, arms]).mean()
    later = np.abs(episode["states"][1:, arms] - episode["actions"][1:, arms]).mean()
    assert now < later


def test_a_mean_of_four_pixels() -> None:
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 0] = 255
    np.testing.assert_array_equal(halved(picture)[0, :, 0], [64, 0])


def test_places_are_seen_from_the_robot() -> None:
    sim = Simulation(make_task(4))
    sim.reset(0)
    names = things(sim)
    assert set(names) == {"item1", "bin_a"}
    at_start = places(sim, names)
    np.testing.assert_allclose(at_start[-4:], [0, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(at_start[:2], sim.position(names[0])[:2], atol=1e-6)
    walk = np.concatenate([sim.target, [0.3, 0.1, 0.5], [1.0]])
    for _ in range(30):
        sim.act(walk)
    base = sim.base_pose()
    assert base[0] > 0.2
    seen = places(sim, names)[:2]
    cos, sin = np.cos(base[2]), np.sin(base[2])
    back = np.array([[cos, -sin], [sin, cos]]) @ seen + base[:2]
    np.testing.assert_allclose(back, sim.position(names[0])[:2], atol=1e-5)


def test_what_is_there_is_not_gathered_again(demonstrations: Path) -> None:
    folder = demonstrations / TASK_FILES[2]
    before = (folder / "pictures.npy").stat().st_mtime_ns
    called: list[None] = []
    told = gather(Gathering(3, 2), folder, lambda: called.append(None))
    assert not called
    assert (folder / "pictures.npy").stat().st_mtime_ns == before
    assert told["frames"] == len(np.load(folder / "states.npy"))


def test_other_wishes_are_gathered_anew(tmp_path: Path) -> None:
    gather(Gathering(3, 1, height=8, width=12), tmp_path)
    called: list[None] = []
    gather(Gathering(3, 1, height=6, width=8), tmp_path, lambda: called.append(None))
    assert len(called) == 1
    assert json.loads((tmp_path / ABOUT).read_text())["wanted"]["height"] == 6
    assert np.load(tmp_path / "pictures.npy").shape[2:4] == (6, 8)


def test_fewer_of_the_same_are_added_to(tmp_path: Path) -> None:
    small = Gathering(3, 1, height=8, width=12)
    gather(small, tmp_path / "grown")
    called: list[None] = []
    told = gather(replace(small, episodes=2), tmp_path / "grown", lambda: called.append(None))
    assert len(called) == 2
    at_once = gather(replace(small, episodes=2), tmp_path / "at once")
    assert told == at_once
    for name in ARRAYS:
        grown, whole = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("grown", "at once"))
        assert np.array_equal(grown, whole), name


def test_more_than_wanted_are_gathered_anew(tmp_path: Path) -> None:
    gather(Gathering(3, 2, height=8, width=12), tmp_path)
    told = gather(Gathering(3, 1, height=8, width=12), tmp_path)
    assert np.load(tmp_path / "episodes.npy").max() == 0
    assert told["wanted"]["episodes"] == 1
