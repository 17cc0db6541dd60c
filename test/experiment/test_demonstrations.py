from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.experiment.demonstrations import open_demonstrations
from kuavo_smolvla_ros.experiment.ways import TASK_FILES
from kuavo_smolvla_ros.learning.mixed_dataset import Standing
from kuavo_smolvla_ros.learning.sources import ACTION, IMAGES, STATE, require_agreement
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING
from kuavo_smolvla_ros.robot.spec import load_spec

CHUNK = 6


def test_a_sample_is_a_frame_and_what_follows(demonstrations: Path) -> None:
    folder = demonstrations / TASK_FILES[0]
    source = open_demonstrations("one", folder, CHUNK)
    actions = np.load(folder / "actions.npy")
    sample = source.frames[3]
    np.testing.assert_array_equal(sample[ACTION].numpy(), actions[3 : 3 + CHUNK])
    assert not sample[ACTION_STEP_PADDING].any()
    camera = sample[IMAGES + "head_cam_h"]
    assert camera.shape == (3, 48, 64)
    assert camera.dtype == torch.uint8


def test_a_chunk_never_reaches_into_the_next_episode(demonstrations: Path) -> None:
    source = open_demonstrations("one", demonstrations / TASK_FILES[0], CHUNK)
    actions = np.load(demonstrations / TASK_FILES[0] / "actions.npy")
    end = int(np.flatnonzero(np.diff(source.episodes))[0])

    @given(st.integers(0, CHUNK - 1))
    @settings(max_examples=CHUNK, deadline=None)
    def check(before: int) -> None:
        assert source.vectors is not None
        sample = source.vectors[end - before]
        assert sample[ACTION_STEP_PADDING].tolist() == [False] * (before + 1) + [True] * (CHUNK - before - 1)
        np.testing.assert_array_equal(sample[ACTION][-1].numpy(), actions[end])

    check()


def test_vectors_read_no_picture(demonstrations: Path) -> None:
    source = open_demonstrations("one", demonstrations / TASK_FILES[0], CHUNK)
    assert source.vectors is not None
    assert set(source.vectors[0]) == {STATE, ACTION, ACTION_STEP_PADDING}


def test_the_four_tasks_go_together(demonstrations: Path) -> None:
    sources = {name: open_demonstrations(name, demonstrations / name, CHUNK) for name in TASK_FILES}
    first, last = sources[TASK_FILES[0]].facts, sources[TASK_FILES[3]].facts
    require_agreement("four", last, {"one": first})
    assert first.action_names == load_spec("kuavo_sim").action_names
    assert last.action_names == load_spec("kuavo_mobile").action_names
    assert first.fingerprint == load_spec("kuavo_sim").fingerprint


def test_the_tasks_without_a_base_teach_that_it_stands(demonstrations: Path) -> None:
    """Untaught it would wander in their chunks once task 4 has been learnt, and the arms with it."""
    sources = [open_demonstrations(name, demonstrations / name, CHUNK) for name in TASK_FILES]
    base = tuple(range(16, 20))
    assert [Standing(sources).known(source) for source in sources] == [base, base, base, ()]
    assert Standing(sources).advice() == []


def test_statistics_are_those_of_the_arrays(demonstrations: Path) -> None:
    folder = demonstrations / TASK_FILES[1]
    source = open_demonstrations("two", folder, CHUNK)
    states = np.load(folder / "states.npy")
    np.testing.assert_allclose(source.stats[STATE]["std"], states.std(0))
    np.testing.assert_array_equal(source.stats[STATE]["max"], states.max(0))
