"""The entry point on real data sets: two stages in a row, from the command line, and what it says of bad
input.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic import extract_recipe, write_recipe
from kuavo_smolvla_ros.learning import lerobot_source
from kuavo_smolvla_ros.learning.lerobot_source import open_lerobot
from kuavo_smolvla_ros.learning.outputs import read_rows
from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.video_decoder import choose_video_backend

PROGRAM = Path(__file__).parents[2] / "training" / "train_sequential.py"
Train = Callable[..., tuple[int, str]]
TASKS = ("task1_moving_grasp", "task2_weighing")
LORA = "adapter={rank: 4, alpha: 4, lr: 1.0e-3, target_modules: [q_proj, v_proj]}"
SMALL = (
    "curriculum=[tasks/task1_moving_grasp,tasks/task2_weighing]",
    "policy.backbone=tiny",
    "policy.tokenizer_max_length=64",
    "policy.chunk_size=10",
    "policy.num_steps=2",
    "policy.unfreeze_vision_layers=[-1,-2]",
    "training.max_steps=3",
    "training.effective_batch_size=10",
    "training.precision='no'",
    "data.held_out_share=0.4",
    "init=scratch",
    "validation.max_frames_per_task=8",
    "validation.noise_samples=1",
    "run.batch_size=5",
    "run.num_workers=1",
    "run.device=cpu",
    "run.log_freq_steps=1",
    "run.min_free_gib=0.1",
)


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    streams = {"head_cam_h": "head_image", "wrist_cam_l": "left_image", "wrist_cam_r": "right_image"}
    path = tmp_path_factory.mktemp("spec") / "small.yaml"
    lines = [f"extends: {config_dir()}/robot/kuavo_sim.yaml", "cameras:"]
    lines += [f"  {camera}: {{stream: {s}, height: 64, width: 96}}" for camera, s in streams.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, spec_path: str) -> Path:
    """Three episodes of each task, converted as recordings are."""
    root = tmp_path_factory.mktemp("datasets")
    for number, task in enumerate(TASKS):
        bags = root / "bags" / task
        write_recipe(
            bags / "a.bag",
            *({"length": 12, "seed": 10 * number + e, "task": task, "instruction": "go"} for e in range(3)),
        )
        convert(find_recordings([bags]), root / task, ConversionSettings(spec_path), extract_recipe)
    return root


@pytest.fixture
def train(datasets: Path, tmp_path: Path, start_program: Callable[..., Any]) -> Train:
    """Run the program; its exit status, and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        printed = tmp_path / "printed"
        printed.unlink(missing_ok=True)
        places = (f"data.root={datasets}", f"run.output_root={tmp_path / 'out'}")
        process = start_program([str(PROGRAM), *SMALL, *places, *arguments], printed)
        process.join(280)
        return process.exitcode, printed.read_text()

    return run


def test_two_stages_in_a_row_then_skipped(train: Train, tmp_path: Path, spec_path: str) -> None:
    code, printed = train("task=tasks/task1_moving_grasp", "policy.chunk_size=12")
    assert code == 0, printed[-2000:]
    code, printed = train("task=tasks/task2_weighing", "init=previous")
    assert code == 0, printed[-2000:]
    out = tmp_path / "out"
    results = [json.loads((out / task / "training_results.json").read_text()) for task in TASKS]
    assert [r["task_id"] for r in results] == [1, 2]
    assert results[0]["statistics_sha256"] == results[1]["statistics_sha256"]
    assert results[1]["final_validation"].keys() == {"1", "2"}
    assert results[1]["shares_realised"] == pytest.approx({TASKS[0]: 0.2, TASKS[1]: 0.8})
    policy = KuavoSmolVLAPolicy.from_pretrained(out / TASKS[1] / "best")
    spec = load_spec(spec_path)
    assert policy.config.robot_fingerprint == spec.fingerprint
    assert tuple(policy.config.action_names) == spec.action_names
    assert policy.config.unfreeze_vision_layers == [-1, -2]
    assert [row["step"] for row in read_rows(out / TASKS[1], "train")] == [1, 2, 3]
    assert (out / "report.html").is_file()
    code, printed = train("task=tasks/task2_weighing", "init=previous")
    assert code == 0
    assert "task2_weighing: finished already" in printed


def test_a_dry_run_says_everything_and_writes_nothing(train: Train, tmp_path: Path) -> None:
    code, printed = train("stages=all", "--dry-run", "init=scratch", LORA)
    assert code == 0, printed[-2000:]
    for part in (
        "task2_weighing (stage ",
        "3 steps of 10 samples (5 per device x 2 parts x 1 devices)",
        "20% of each batch (2 in the first)",
        "unfrozen 2/4: 2-3",
        "LoRA of rank 4 at 0.001 beside q_proj, v_proj; action_heads, state_proj in full at 5e-05",
        "memory per device",
        "of training (",
    ):
        assert part in printed, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "say which stage to train"),
        (("task=tasks/task2_weighing", "init=previous"), 1, "train it first"),
        (
            ("task=tasks/task1_moving_grasp", "data.root=/nowhere"),
            1,
            "the data set of task1_moving_grasp is not at",
        ),
        (
            ("task=tasks/task1_moving_grasp", "run.batch_size=3"),
            1,
            "set run.batch_size so that 1 times it divides",
        ),
        (
            ("task=tasks/task1_moving_grasp", "run.robot=kuavo_sim_left"),
            1,
            "run.robot=kuavo_sim_left has the",
        ),
        (("task=tasks/task1_moving_grasp", "policy.max_action_dim=8"), 1, "16"),
        (
            (
                "task=tasks/task1_moving_grasp",
                "adapter={rank: 4, alpha: 4, target_modules: [qkv]}",
            ),
            1,
            "adapter.target_modules names qkv",
        ),
        (("task=tasks/task1_moving_grasp", "run.shard=true"), 2, "among several devices, and there is one"),
        (("task=tasks/task1_moving_grasp", "run.feature_cache=always"), 2, "it is one of auto, deep, off"),
        (("task=tasks/task1_moving_grasp", "run.push_to_hub=a/b/c"), 1, "which is no hub id"),
    ],
)
def test_bad_input_is_one_sentence(
    train: Train,
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    status, printed = train(*arguments)
    assert status == code, printed[-2000:]
    assert sentence in printed
    assert "Traceback" not in printed


def test_a_data_set_without_its_pictures_is_the_same_data_set(datasets: Path) -> None:
    source = open_lerobot("task1", str(datasets / TASKS[0]), 10, choose_video_backend())
    assert source.vectors is not None
    assert len(source.vectors) == len(source.frames)
    whole, bare = source.frames[7], source.vectors[7]
    cameras = {f"observation.images.{name}" for name in source.facts.cameras}
    assert whole.keys() - bare.keys() == cameras
    for name in bare.keys() & {"observation.state", "action", "action_is_pad"}:
        assert torch.equal(whole[name], bare[name])
    assert source.stamp == open_lerobot("task1", str(datasets / TASKS[0]), 10, None).stamp
    assert source.stamp != open_lerobot("task2", str(datasets / TASKS[1]), 10, None).stamp


def test_cameras_decoded_at_the_same_time_are_the_same_pictures(
    datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_lerobot("task1", str(datasets / TASKS[0]), 10, choose_video_backend())
    plain = copy.copy(source.frames)
    plain.__class__ = LeRobotDataset  # type: ignore[attr-defined]
    monkeypatch.setattr(lerobot_source, "DECODERS", 1)  # the cache is emptied again and again
    for index in (0, 13, 5, 30):
        one, other = source.frames[index], plain[index]
        assert one.keys() == other.keys()
        for camera in source.facts.cameras:
            assert torch.equal(one[f"observation.images.{camera}"], other[f"observation.images.{camera}"])
