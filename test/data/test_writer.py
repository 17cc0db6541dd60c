"""LeRobot reads what we write as its own: the same files and columns, every number and picture in place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.dataset import read_identity
from kuavo_smolvla_ros.data.episode import Episode
from kuavo_smolvla_ros.data.features import INDEX_COLUMNS, Layout, data_path, features, video_path
from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.stills import StillSettings
from kuavo_smolvla_ros.data.synthetic import extract_recipe, read_number, synthetic_episode
from kuavo_smolvla_ros.data.video import VideoSettings, count_frames
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.robot.spec import load_spec

SIZE = (64, 96)
WEIGH = {"task": "task2_weighing", "instruction": "Weigh the package"}
EPISODES: list[dict[str, Any]] = [
    {"length": 14, "seed": 1},
    {"length": 9, "seed": 2, **WEIGH},
    {"length": 25, "seed": 3},
    {"length": 1, "seed": 4},
    {"length": 12, "seed": 5, **WEIGH},
]


@pytest.fixture(scope="module")
def dataset(small_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dataset"), small_spec)


def write(
    folder: Path,
    spec: str,
    pictures: VideoSettings | StillSettings | None = None,
    limits: PackLimits | None = None,
    episodes: list[dict[str, Any]] = EPISODES,
) -> Path:
    for number, episode in enumerate(episodes):
        (folder / f"{number}.bag").write_text(json.dumps([episode]))
    recordings = [Recording(p.name, p, 1) for p in sorted(folder.glob("*.bag"))]
    settings = ConversionSettings(spec, pictures or VideoSettings(), limits=limits or PackLimits(seconds=3.0))
    report = convert(recordings, folder / "dataset", settings, extract_recipe)
    assert not report.left_out
    assert report.episodes == len(episodes)
    return folder / "dataset"


def opened(root: Path, **options: Any):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("test/ours", root=root, video_backend="pyav", **options)


def originals(spec: str) -> list[Episode]:
    return [synthetic_episode(load_spec(spec), **episode) for episode in EPISODES]


def as_picture(tensor: Any) -> np.ndarray:
    return (tensor.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_every_step_of_every_episode_is_where_it_belongs(dataset: Path, small_spec: str) -> None:
    read = opened(dataset)
    index = 0
    for number, episode in enumerate(originals(small_spec)):
        for step in range(len(episode)):
            item = read[index]
            assert_array_equal(item["observation.state"].numpy(), episode.state[step])
            assert_array_equal(item["action"].numpy(), episode.action[step])
            assert item["episode_index"] == number
            assert item["frame_index"] == step
            assert item["index"] == index
            assert item["timestamp"].item() == np.float32(step / 10)
            assert item["task"] == episode.instruction
            for role in episode.frames:
                assert read_number(as_picture(item[f"observation.images.{role}"])) == step
            index += 1
    assert len(read) == index


def test_pictures_belong_to_their_camera_and_episode(dataset: Path, small_spec: str) -> None:
    read = opened(dataset)
    start = 0
    for episode in originals(small_spec):
        item = read[start]
        for role, frames in episode.frames.items():
            original = next(iter(frames)).astype(float)
            error = np.mean((as_picture(item[f"observation.images.{role}"]) - original) ** 2)
            assert 10 * np.log10(255**2 / error) > 25
        start += len(episode)


def test_chunks_of_actions_stop_at_the_end_of_the_episode(dataset: Path, small_spec: str) -> None:
    read = opened(dataset, delta_timestamps={"action": [i / 10 for i in range(6)]})
    item = read[13 - 2]
    assert item["action_is_pad"].tolist() == [False] * 3 + [True] * 3
    expected = originals(small_spec)[0].action[[11, 12, 13, 13, 13, 13]]
    assert_array_equal(item["action"].numpy(), expected)


def test_histories_of_pictures_are_found(dataset: Path) -> None:
    key = "observation.images.wrist_cam_l"
    read = opened(dataset, delta_timestamps={key: [-0.2, -0.1, 0.0]})
    pictures = read[14 + 9 + 20][key]
    assert [read_number(as_picture(p)) for p in pictures] == [18, 19, 20]


def test_some_episodes_can_be_chosen(dataset: Path) -> None:
    read = opened(dataset, episodes=[1, 4])
    assert len(read) == 21
    assert {read[i]["episode_index"].item() for i in range(21)} == {1, 4}
    assert read[20]["task"] == WEIGH["instruction"]


def test_the_whole_statistics_are_those_of_the_data(dataset: Path, small_spec: str) -> None:
    stats = opened(dataset).meta.stats
    for name, values in {
        "observation.state": np.concatenate([e.state for e in originals(small_spec)]),
        "action": np.concatenate([e.action for e in originals(small_spec)]),
        "index": np.arange(61)[:, None],
    }.items():
        values = values.astype(np.float64)
        assert_allclose(stats[name]["mean"], values.mean(axis=0), atol=1e-6)
        assert_allclose(stats[name]["std"], values.std(axis=0), atol=1e-6)
        assert_allclose(stats[name]["min"], values.min(axis=0))
        assert_allclose(stats[name]["max"], values.max(axis=0))
        assert_allclose(stats[name]["q10"], np.quantile(values, 0.1, axis=0), atol=1e-3)
        assert stats[name]["count"].tolist() == [61]


def test_picture_statistics_are_those_of_the_pictures_that_went_in(dataset: Path, small_spec: str) -> None:
    stats = opened(dataset).meta.stats
    for role in load_spec(small_spec).cameras:
        frames = [frame for episode in originals(small_spec) for frame in episode.frames[role]]
        pixels = np.concatenate(frames).reshape(-1, 3) / 255
        found = stats[f"observation.images.{role}"]
        assert_allclose(found["mean"].ravel(), pixels.mean(axis=0), atol=1e-9)
        assert_allclose(found["std"].ravel(), pixels.std(axis=0), atol=1e-9)
        assert found["count"].tolist() == [61]


@pytest.fixture(scope="module")
def theirs(small_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of dataset, written by LeRobot itself."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("theirs") / "dataset"
    spec = load_spec(small_spec)
    described = {
        name: {k: tuple(v) if k == "shape" else v for k, v in feature.items() if k != "info"}
        for name, feature in features(Layout.of(spec), VideoSettings()).items()
        if name not in INDEX_COLUMNS
    }
    dataset = LeRobotDataset.create("test/theirs", 10, described, root, spec.name, streaming_encoding=True)
    record(dataset, synthetic_episode(spec, 14, 1))
    dataset.finalize()
    return root


def record(dataset: Any, episode: Episode) -> None:
    for step, pictures in enumerate(zip(*episode.frames.values(), strict=True)):
        frame = {
            f"observation.images.{role}": picture
            for role, picture in zip(episode.frames, pictures, strict=True)
        }
        frame |= {"observation.state": episode.state[step], "action": episode.action[step]}
        dataset.add_frame({**frame, "task": episode.instruction})
    dataset.save_episode()


@pytest.mark.parametrize(
    "path", ["data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"]
)
def test_files_have_the_columns_lerobot_writes(dataset: Path, theirs: Path, path: str) -> None:
    ours, their = (pq.read_schema(root / path) for root in (dataset, theirs))
    assert dict(zip(ours.names, ours.types, strict=True)) == dict(zip(their.names, their.types, strict=True))


def test_the_data_files_note_is_lerobots(dataset: Path, theirs: Path) -> None:
    notes = [
        json.loads(pq.read_schema(root / data_path(0)).metadata[b"huggingface"])["info"]
        for root in (dataset, theirs)
    ]
    assert notes[0] == notes[1]


def test_the_info_differs_from_lerobots_in_the_counts_only(dataset: Path, theirs: Path) -> None:
    ours, their = (json.loads((root / "meta/info.json").read_text()) for root in (dataset, theirs))
    counts = {"total_episodes", "total_frames", "total_tasks", "splits"}
    assert list(ours) == list(their)
    assert {k: v for k, v in ours.items() if k not in counts} == {
        k: v for k, v in their.items() if k not in counts
    }
    assert [ours[k] for k in sorted(counts)] == [{"train": "0:5"}, 5, 61, 2]


def test_statistics_have_lerobots_keys_and_shapes(dataset: Path, theirs: Path) -> None:
    from lerobot.datasets.compute_stats import aggregate_stats

    ours, their = opened(dataset).meta.stats, opened(theirs).meta.stats
    shapes = [
        {name: {k: v.shape for k, v in feature.items()} for name, feature in stats.items()}
        for stats in (ours, their)
    ]
    assert shapes[0] == shapes[1]
    aggregate_stats([ours, their])  # validates types and shapes


def test_tasks_are_kept_as_lerobot_keeps_them(dataset: Path, theirs: Path) -> None:
    ours, their = (pd.read_parquet(root / "meta/tasks.parquet") for root in (dataset, theirs))
    assert ours.dtypes.tolist() == their.dtypes.tolist()
    assert ours.index.tolist() == ["Pick up the moving object", "Weigh the package"]
    assert ours["task_index"].tolist() == [0, 1]


def test_lerobot_can_record_on_and_we_then_refuse_to_add(
    dataset: Path, small_spec: str, tmp_path: Path
) -> None:
    import shutil

    from kuavo_smolvla_ros.data.dataset import open_dataset
    from kuavo_smolvla_ros.errors import UserError

    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    theirs = opened(root)
    record(theirs, synthetic_episode(load_spec(small_spec), 8, 77))
    theirs.finalize()
    again = opened(root)
    assert again.num_episodes == 6
    assert read_number(as_picture(again[61 + 7]["observation.images.head_cam_h"])) == 7
    assert again[60]["frame_index"] == 11
    with pytest.raises(UserError, match="holds 6 episodes, of which this converter wrote 5"):
        open_dataset(root)


def test_lerobots_own_merge_takes_ours(dataset: Path, theirs: Path, tmp_path: Path) -> None:
    from lerobot.datasets.aggregate import aggregate_datasets

    aggregate_datasets(["test/ours", "test/theirs"], "test/both", [dataset, theirs], tmp_path / "both")
    both = opened(tmp_path / "both")
    assert both.num_episodes == 6
    assert len(both) == 61 + 14


def test_the_robot_and_the_tasks_are_recorded(dataset: Path, small_spec: str) -> None:
    spec = load_spec(small_spec)
    identity = read_identity(dataset)
    assert identity["fingerprint"] == spec.fingerprint
    assert identity["identity"] == json.loads(json.dumps(spec.identity))
    assert identity["robot"] == "kuavo_sim"
    assert identity["tasks"] == {
        "task1_moving_grasp": ["Pick up the moving object"],
        "task2_weighing": ["Weigh the package"],
    }
    assert identity["pictures"] == {
        "kind": "video",
        "codec": "libsvtav1",
        "crf": 30,
        "gop": 2,
        "preset": "10",
    }


def lengths_per_pack(root: Path) -> list[list[int]]:
    files = sorted(root.glob("meta/episodes/*/*.parquet"))
    return [pq.read_table(file, columns=["length"])["length"].to_pylist() for file in files]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (PackLimits(seconds=1000), [[14, 9, 25, 1, 12]]),
        (PackLimits(seconds=2.3), [[14, 9], [25], [1, 12]]),
        (PackLimits(seconds=0.1), [[14], [9], [25], [1], [12]]),
        (PackLimits(megabytes=1e-6), [[14], [9], [25], [1], [12]]),
    ],
)
def test_packs_end_at_their_limits_and_never_divide_an_episode(
    small_spec: str, tmp_path: Path, limits: PackLimits, expected: list[list[int]]
) -> None:
    root = write(tmp_path, small_spec, limits=limits)
    assert lengths_per_pack(root) == expected
    for number, lengths in enumerate(expected):
        for role in load_spec(small_spec).cameras:
            assert count_frames(root / video_path(role, number)) == sum(lengths)
    read = opened(root)
    assert read_number(as_picture(read[47]["observation.images.head_cam_h"])) == 24


def test_the_shipped_limit_keeps_lerobots_video_times_exact() -> None:
    """LeRobot compares times as 32-bit numbers with a tolerance of 0.1 ms."""
    longest = PackLimits().seconds
    assert np.spacing(np.float32(longest)) < 1e-4


def test_a_thousand_files_fill_a_chunk() -> None:
    assert data_path(999) == "data/chunk-000/file-999.parquet"
    assert data_path(1000) == "data/chunk-001/file-000.parquet"
    assert video_path("head_cam_h", 2034) == "videos/observation.images.head_cam_h/chunk-002/file-034.mp4"


@pytest.mark.parametrize("stills", [StillSettings(), StillSettings("jpeg")], ids=["png", "jpeg"])
def test_pictures_can_be_kept_one_by_one(small_spec: str, tmp_path: Path, stills: StillSettings) -> None:
    root = write(tmp_path, small_spec, stills, episodes=[{"length": 70, "seed": 1}, {"length": 3, "seed": 2}])
    read = opened(root)
    assert not (root / "videos").exists()
    assert read.meta.image_keys == [f"observation.images.{r}" for r in load_spec(small_spec).cameras]
    episode = synthetic_episode(load_spec(small_spec), 70, 1)
    for step in (0, 63, 64, 69):
        picture = as_picture(read[step]["observation.images.wrist_cam_r"])
        assert read_number(picture) == step
        if stills.format == "png":
            assert_array_equal(picture, list(episode.frames["wrist_cam_r"])[step])
    assert read[72]["frame_index"] == 2


@pytest.mark.slow  # LeRobot's own program takes most of it to start
def test_lerobot_train_takes_a_step(dataset: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("lerobot-train")),
            "--dataset.repo_id=test/ours",
            f"--dataset.root={dataset}",
            "--dataset.video_backend=pyav",
            "--policy.type=act",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
            "--policy.pretrained_backbone_weights=null",
            "--policy.dim_model=32",
            "--policy.dim_feedforward=32",
            "--policy.n_heads=2",
            "--policy.n_encoder_layers=1",
            "--policy.use_vae=false",
            "--policy.chunk_size=5",
            "--policy.n_action_steps=5",
            "--batch_size=2",
            "--steps=2",
            "--num_workers=0",
            "--log_freq=1",
            "--save_checkpoint=false",
            f"--output_dir={tmp_path / 'run'}",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "step:2" in run.stderr


def test_an_episode_that_does_not_fit_the_robot_is_a_defect_and_not_data(
    small_spec: str, tmp_path: Path, recipes: Callable[..., list[Recording]]
) -> None:
    settings = ConversionSettings(small_spec, extract={"size": [48, 96]})
    report = convert(recipes(a=[{"length": 3}]), tmp_path / "out", settings, extract_recipe)
    ((source, reason),) = report.left_out
    assert source == "a.bag#0"
    assert "the picture at step 0 is 96x48 uint8, declared is 96x64" in reason
