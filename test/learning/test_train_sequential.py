"""The entry point on real data sets: two stages in a row, from the command line, and what it says of bad
input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic import extract_recipe, write_recipe
from kuavo_smolvla_ros.learning.outputs import read_rows
from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.robot.spec import load_spec

PROGRAM = Path(__file__).parents[2] / "training" / "train_sequential.py"
TASKS = ("task1_moving_grasp", "task2_weighing")
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
def train(datasets: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                str(PROGRAM),
                *SMALL,
                f"data.root={datasets}",
                f"run.output_root={tmp_path / 'out'}",
                *arguments,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


def test_two_stages_in_a_row_then_skipped(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, spec_path: str
) -> None:
    first = train("task=tasks/task1_moving_grasp", "policy.chunk_size=12")
    assert first.returncode == 0, first.stderr[-2000:]
    second = train("task=tasks/task2_weighing", "init=previous")
    assert second.returncode == 0, second.stderr[-2000:]
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
    again = train("task=tasks/task2_weighing", "init=previous")
    assert again.returncode == 0
    assert "task2_weighing: finished already" in again.stdout


def test_a_dry_run_says_everything_and_writes_nothing(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = train("stages=all", "--dry-run", "init=scratch")
    assert result.returncode == 0, result.stderr[-2000:]
    for part in (
        "task2_weighing (stage ",
        "3 steps of 10 samples (5 per device x 2 parts x 1 devices)",
        "20% of each batch (2 in the first)",
        "unfrozen 2/4: 2-3",
        "memory per device",
        "of training (",
    ):
        assert part in result.stdout, part
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
                "adapter={rank: 4, alpha: 4, dropout: 0.0, target_modules: [q_proj]}",
            ),
            2,
            "adapters are not supported",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    train: Callable[..., subprocess.CompletedProcess[str]],
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    result = train(*arguments)
    assert result.returncode == code, result.stderr[-2000:]
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
