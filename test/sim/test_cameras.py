"""Pictures, and what happens where none can be made."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from kuavo_smolvla_ros.sim import gl
from kuavo_smolvla_ros.sim.cameras import ROLES, Cameras, overview, sizes
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task


@pytest.fixture(scope="module")
def seeing() -> Simulation:
    sim = Simulation(make_task(1, "contest"), {**sizes(96, 128), "head_cam_h": (120, 160)})
    yield sim
    sim.close()


def test_one_picture_per_role_at_its_size(seeing):
    seeing.reset(0)
    pictures = seeing.images()
    assert {role: picture.shape for role, picture in pictures.items()} == {
        "head_cam_h": (120, 160, 3),
        "wrist_cam_l": (96, 128, 3),
        "wrist_cam_r": (96, 128, 3),
    }
    assert all(picture.dtype == np.uint8 and picture.std() > 5 for picture in pictures.values())


def test_same_seed_same_pixels_other_seed_others(seeing):
    seeing.reset(1)
    first = seeing.images()
    seeing.reset(2)
    other = seeing.images()
    seeing.reset(1)
    again = seeing.images()
    for role in ROLES:
        assert np.array_equal(first[role], again[role])
    assert not np.array_equal(first["head_cam_h"], other["head_cam_h"])


def test_colours_differ_between_episodes_and_the_robots_never(seeing):
    def colours(seed: int) -> tuple[np.ndarray, np.ndarray]:
        seeing.reset(seed)
        rgba = seeing.model.geom_rgba
        return rgba[seeing.model.geom("table").id].copy(), rgba[seeing.model.geom("left_palm").id].copy()

    (table, palm), (other_table, other_palm) = colours(1), colours(2)
    assert not np.allclose(table, other_table)
    assert np.array_equal(palm, other_palm)
    assert np.array_equal(colours(1)[0], table)
    for seed in range(30):
        assert np.all(np.abs(colours(seed)[0][:3] / [0.74, 0.62, 0.47] - 1) <= 0.2 + 1e-6)


def centre_of(picture: np.ndarray, colour: np.ndarray) -> tuple[float, float]:
    """Row and column of the middle of what has a colour, as shares of the picture."""
    rows, columns = np.nonzero(colour)
    assert len(rows) > 5
    return float(rows.mean() / picture.shape[0]), float(columns.mean() / picture.shape[1])


def test_the_head_camera_shows_left_on_the_left_and_far_above_near(seeing):
    seeing.reset(3)
    picture = seeing.images()["head_cam_h"].astype(int)
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    marker1 = centre_of(picture, (red > 120) & (green < 90) & (blue < 90))
    marker2 = centre_of(picture, (blue > 120) & (red < 100))
    part = centre_of(picture, (red > 140) & (green > 100) & (blue < 70))
    assert part[1] < marker1[1] < marker2[1]
    assert part[0] < marker1[0]


def test_rendering_changes_nothing_in_the_physics(seeing):
    blind = Simulation(make_task(1, "contest"))
    blind.reset(7)
    seeing.reset(7)
    for _ in range(5):
        seeing.images()
        seeing.step(10)
        blind.step(10)
    assert np.array_equal(seeing.data.qpos, blind.data.qpos)


def test_any_view_may_be_asked_for(seeing):
    picture = seeing.cameras.picture(seeing.data, overview(), (64, 80))
    assert picture.shape == (64, 80, 3)


def test_another_thread_is_refused_in_words(seeing):
    seeing.images()
    caught = []

    def other() -> None:
        try:
            seeing.images()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert caught
    assert "thread" in caught[0]


def test_closed_cameras_open_again(seeing):
    before = seeing.images()["wrist_cam_l"]
    seeing.close()
    assert np.array_equal(seeing.images()["wrist_cam_l"], before)


@pytest.mark.parametrize("wrong", [{"nose": (10, 10)}, {"head_cam_h": (0, 10)}, {"head_cam_h": (480, 6400)}])
def test_unknown_cameras_and_sizes_are_refused(seeing, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Cameras(seeing.model, wrong)


def test_without_a_library_the_error_names_the_package(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl.sys, "platform", "linux")
    monkeypatch.setattr(gl.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(gl.GlError, match="apt install libegl1"):
        gl.choose_backend()


@pytest.mark.parametrize(
    ("installed", "chosen"), [({"EGL", "OSMesa"}, "egl"), ({"OSMesa"}, "osmesa"), ({"EGL"}, "egl")]
)
def test_the_backend_is_what_there_is(monkeypatch, installed, chosen):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl.sys, "platform", "linux")
    monkeypatch.setattr(gl.ctypes.util, "find_library", lambda name: name if name in installed else None)
    assert gl.choose_backend() == chosen


def test_the_users_choice_is_honoured_and_checked(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert gl.choose_backend() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(gl.GlError, match="vulkan"):
        gl.choose_backend()


BLIND = """
import sys
sys.modules["OpenGL"] = None  # as if no OpenGL could be loaded
from kuavo_smolvla_ros.sim.cameras import sizes
from kuavo_smolvla_ros.sim.gl import GlError
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task
sim = Simulation(make_task(1), sizes(48, 64))
sim.act(sim.state())
print("state", sim.state().shape)
try:
    sim.images()
except GlError as error:
    print("refused", error)
"""


def test_states_need_no_opengl_and_pictures_say_what_is_missing():
    run = subprocess.run(
        [sys.executable, "-c", BLIND],
        env={**os.environ, "MUJOCO_GL": "egl"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "state (16,)" in run.stdout
    assert "refused cannot render cameras with egl" in run.stdout
    assert "apt install" in run.stdout
