"""Vision features computed once: the same losses as from pictures, and never those of something else."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.learning.feature_cache import FeatureError, FeatureFile
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.outputs import read_rows
from kuavo_smolvla_ros.learning.sources import IMAGES, TaskSource
from kuavo_smolvla_ros.learning.stage import Stage
from kuavo_smolvla_ros.learning.stage_run import run_stage
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run

EXPERT_ONLY = {"train_expert_only": True, "unfreeze_vision_layers": None}
STEPS = 3


def stage(**policy: Any) -> Stage:
    first = synthetic_curriculum(freq_epochs=100, noise_samples=1)[0]
    return dataclasses.replace(
        first,
        training=dataclasses.replace(first.training, max_steps=STEPS, effective_batch_size=8),
        policy=tuple(sorted({**dict(first.policy), **policy}.items())),
    )


def sources(**changes: Any) -> dict[str, TaskSource]:
    made = conflicting_tasks(["task1"], episodes=5, length=8, extra_of_last=0)
    return {name: dataclasses.replace(source, **changes) for name, source in made.items()}


def train(
    root: Path, cache: str, data: dict[str, TaskSource] | None = None, policy: Any = EXPERT_ONLY, **run: Any
) -> list[str]:
    said: list[str] = []
    settings = {"batch_size": 4, "log_freq_steps": 1, "feature_cache": cache, **run}
    run_stage(
        stage(**policy),
        sources() if data is None else data,
        synthetic_run(root, **settings),
        root,
        Accelerator(cpu=True),
        source=None,
        when_learnt={},
        interruption=Interruption(),
        say=said.append,
    )
    return said


def numbers(root: Path) -> list[float]:
    rows = read_rows(root / "task1")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return losses + [row["tasks"]["1"]["loss"] for row in rows if row["kind"] == "validation"]


class NoPictures:
    """Frames that cannot be looked at, only their vectors."""

    def __init__(self, frames: Any) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.frames[index].items() if not name.startswith(IMAGES)}


@pytest.mark.parametrize(
    ("mode", "policy", "shape"),
    [
        ("auto", EXPERT_ONLY, (1, 4, 64)),
        ("deep", {"unfreeze_vision_layers": (-1,)}, (1, 64, 64)),
        ("deep", {"freeze_vision_encoder": True, "unfreeze_vision_layers": None}, (1, 64, 64)),
    ],
    ids=["tokens", "below a layer that trains", "below a connector that trains"],
)
def test_losses_are_those_from_pictures_and_pictures_are_read_once(
    tmp_path: Path, mode: str, policy: Any, shape: tuple[int, ...]
) -> None:
    train(tmp_path / "a", "off", policy=policy)
    made = sources()["task1"]
    said = train(
        tmp_path / "b", mode, {"task1": dataclasses.replace(made, vectors=NoPictures(made.frames))}, policy
    )
    assert any("caching vision features of 40 frames" in text for text in said)
    assert numbers(tmp_path / "b") == pytest.approx(numbers(tmp_path / "a"), rel=1e-5)
    (file,) = (tmp_path / "b/features").glob("*/task1-*.bin")
    assert file.stat().st_size == 40 * 4 * np.prod(shape)


def test_features_are_kept_for_the_next_run_and_its_pictures_never_read(tmp_path: Path) -> None:
    train(tmp_path, "auto")
    before = numbers(tmp_path)

    class Blind(NoPictures):
        def __getitem__(self, index: int) -> dict[str, Any]:
            assert index == 0, "a picture was decoded"  # the first frame tells the features' shape
            return dict(self.frames[index])

    made = sources()["task1"]
    blind = dataclasses.replace(made, frames=Blind(made.frames), vectors=NoPictures(made.frames))
    for name in ("training_results.json", "last", "best"):
        path = tmp_path / "task1" / name
        path.unlink() if path.is_file() else path.rename(path.with_name(f"old_{name}"))
    said = train(tmp_path, "auto", {"task1": blind})
    assert not any("caching" in text for text in said)
    assert numbers(tmp_path) == before


def test_a_fill_that_was_stopped_goes_on(tmp_path: Path) -> None:
    train(tmp_path, "auto")
    (rows,) = (tmp_path / "features").glob("*/task1-*.rows")
    marks = np.fromfile(rows, np.uint8)
    marks[10:] = 0
    marks.tofile(rows)
    (tmp_path / "task1/training_results.json").unlink()
    for name in ("last", "best"):
        (tmp_path / "task1" / name).rename(tmp_path / f"old_{name}")
    said = train(tmp_path, "auto")
    assert any("caching vision features of 30 frames" in text for text in said)


def test_other_data_and_another_tower_never_share_rows(tmp_path: Path) -> None:
    train(tmp_path / "a", "auto", feature_cache="auto")
    for name, data, seed in (("b", sources(stamp="changed"), 0), ("c", None, 1)):
        root = tmp_path / name
        root.mkdir()
        (tmp_path / "a/features").rename(root / "features")
        if seed:
            changed = stage(**EXPERT_ONLY)
            changed = dataclasses.replace(changed, training=dataclasses.replace(changed.training, seed=seed))
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(globals(), "stage", lambda **policy: changed)  # noqa: B023
                said = train(root, "auto", data)
        else:
            said = train(root, "auto", data)
        assert any("caching vision features of 40 frames" in text for text in said)
        (root / "features").rename(tmp_path / "a/features")


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path) -> None:
    said = train(tmp_path, "auto", min_free_gib=1e9)
    assert any(
        "vision features are not cached: they take 0.0 GiB, and 0.0 GiB may be used" in t for t in said
    )
    assert not (tmp_path / "features").exists()
    assert len(numbers(tmp_path)) == STEPS + 2  # trained from pictures


@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        ("auto", {"unfreeze_vision_layers": (-1,)}),
        ("deep", {"unfreeze_vision_layers": (0, 1, 2, 3)}),
        ("off", EXPERT_ONLY),
    ],
)
def test_nothing_is_cached_where_it_is_not_asked_for_or_everything_trains(
    tmp_path: Path, mode: str, policy: Any
) -> None:
    train(tmp_path, mode, policy=policy)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_to_the_last_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    file = FeatureFile(tmp_path / "x" / "rows.bin", 7, (2, 3, 5), dtype)
    wanted = np.array([1, 4, 6])
    assert file.missing(wanted).tolist() == [1, 4, 6]
    file.create()
    rows = torch.randn(2, 2, 3, 5).to(dtype)
    file.write([4, 1], rows)
    assert file.missing(wanted).tolist() == [6]
    file.create()  # of a run that goes on
    assert torch.equal(file.read(4), rows[0])
    assert torch.equal(file.read(1), rows[1])
    assert file.read(1).dtype == dtype
    with pytest.raises(FeatureError, match="holds no features of frame 6"):
        file.read(6)


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    order=st.permutations(range(5)),
)
@settings(deadline=None, max_examples=25)
def test_any_row_is_its_own_whatever_the_shape(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shape: tuple[int, ...], order: list[int]
) -> None:
    file = FeatureFile(tmp_path_factory.mktemp("rows") / "rows.bin", 5, shape, dtype)
    file.create()
    rows = torch.randn(5, *shape).to(dtype)
    file.write(order, rows[order])
    for frame in order:
        assert torch.equal(file.read(frame), rows[frame])


def test_a_row_that_was_read_belongs_to_whoever_read_it(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "rows.bin", 2, (3,), torch.float32)
    file.create()
    file.write([0, 1], torch.ones(2, 3))
    file.read(0).zero_()
    assert torch.equal(file.read(0), torch.ones(3))


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "rows.bin", 2, (3,), torch.float32)
    file.create()
    file.write([0, 1], torch.ones(2, 3))
    os.truncate(file.path, 2 * file.row_bytes - 1)
    assert torch.equal(file.read(0), torch.ones(3))
    with pytest.raises(FeatureError, match=r"rows\.bin ends before frame 1 does; delete it"):
        file.read(1)


def test_marks_that_were_cut_short_mark_nothing(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "rows.bin", 2, (3,), torch.float32)
    file.create()
    file.write([0, 1], torch.ones(2, 3))
    os.truncate(file.path.with_suffix(".rows"), 1)
    assert torch.equal(file.read(0), torch.ones(3))
    with pytest.raises(FeatureError, match="holds no features of frame 1"):
        file.read(1)
