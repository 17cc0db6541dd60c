"""lerobot's own training command finds the policy, trains it, continues it, and reads what it saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CAMERAS = ("head_cam_h", "wrist_cam_l")
PLUGIN = Path(__file__).parents[2] / "plugin" / "lerobot_policy_kuavo_smolvla"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "tiny"
    joints = [f"joint_{i}" for i in range(16)]
    vector = {"dtype": "float32", "shape": (16,), "names": joints}
    picture = {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    data = LeRobotDataset.create(
        "local/tiny",
        fps=10,
        root=root,
        use_videos=False,
        features={
            "observation.state": vector,
            "action": vector,
            **{f"observation.images.{name}": picture for name in CAMERAS},
        },
    )
    random = np.random.default_rng(0)
    for task in ("pick up the parcel", "push it away"):
        for _ in range(8):
            data.add_frame(
                {
                    "task": task,
                    "observation.state": random.normal(1.0, 2.0, 16).astype(np.float32),
                    "action": random.normal(-1.0, 0.5, 16).astype(np.float32),
                    **{
                        f"observation.images.{name}": random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                        for name in CAMERAS
                    },
                }
            )
        data.save_episode()
    data.finalize()
    return root


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which pip has installed the plugin, as a user would: lerobot reads its metadata."""
    target = tmp_path_factory.mktemp("site")
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("plugin") / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *options, "--target", target, source], check=True
    )
    return target


def train(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [sys.executable, "-m", "lerobot.scripts.lerobot_train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def common(dataset: Path, output: Path, steps: int) -> list[str]:
    return [
        "--dataset.repo_id=local/tiny",
        f"--dataset.root={dataset}",
        f"--output_dir={output}",
        f"--steps={steps}",
        "--batch_size=2",
        "--num_workers=0",
        "--eval_freq=0",
        "--log_freq=1",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
    ]


def test_train_save_load_and_continue(site, dataset, tmp_path):
    first = train(
        site,
        "--policy.type=kuavo_smolvla",
        "--policy.backbone=tiny",
        "--policy.train_expert_only=false",
        "--policy.unfreeze_vision_layers=[-1]",
        *common(dataset, tmp_path / "first", 2),
    )
    assert first.returncode == 0, first.stderr[-3000:]
    checkpoint = tmp_path / "first" / "checkpoints" / "last" / "pretrained_model"

    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.pretrained_path = checkpoint
    assert config.type == "kuavo_smolvla"
    assert config.cameras == list(CAMERAS)
    assert config.action_names == [f"joint_{i}" for i in range(16)]
    metadata = LeRobotDatasetMetadata("local/tiny", root=dataset)
    policy = make_policy(config, ds_meta=metadata)
    before, after = make_pre_post_processors(config, str(checkpoint))
    batch = before(
        {
            "observation.state": torch.zeros(16),
            "task": "push it away",
            **{f"observation.images.{name}": torch.rand(3, 48, 64) for name in CAMERAS},
        }
    )
    action = after(policy.select_action(batch, seed=0))
    assert action.shape == (1, 16)
    # Actions of the data lie around -1 with a deviation of 0.5, the network's around 0: the units came back.
    assert -2.5 < action.mean().item() < 0.5

    second = train(
        site,
        f"--policy.path={checkpoint}",
        "--policy.n_action_steps=4",
        *common(dataset, tmp_path / "second", 1),
    )
    assert second.returncode == 0, second.stderr[-3000:]
    continued = tmp_path / "second" / "checkpoints" / "last" / "pretrained_model"
    assert (continued / "statistics.json").read_bytes() == (checkpoint / "statistics.json").read_bytes()
    assert PreTrainedConfig.from_pretrained(continued).n_action_steps == 4


def test_found_by_package_path_and_contradictions_are_told(site, dataset, tmp_path):
    result = train(
        Path("/nonexistent"),
        "--policy.discover_packages_path=kuavo_smolvla_ros.policy",
        "--policy.type=kuavo_smolvla",
        "--policy.backbone=tiny",
        '--policy.cameras=["head_cam_h", "front"]',
        *common(dataset, tmp_path / "out", 1),
    )
    assert result.returncode != 0
    assert "missing: front; not known to the policy: wrist_cam_l" in result.stderr
