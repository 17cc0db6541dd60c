"""Checkpoints with a delta expert, without one, and from one to the other; lerobot's own command."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kuavo_smolvla_ros.policy.build import WeightsError
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError
from kuavo_smolvla_ros.policy.delta_network import CLS_PARTS, is_delta_name
from kuavo_smolvla_ros.policy.delta_settings import EXTRAS_OFF
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.plain_smolvla import export_plain

NOISE = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1))
DELTA = {"train_delta_expert": True, "use_cls_head": True, "delta_refine_steps": 1}


def stir(policy):
    with torch.no_grad():
        for parameter in policy.model.delta_parameters().values():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return policy


@pytest.fixture
def base(make_policy, tmp_path):
    make_policy(unfreeze_vision_layers=[-1], train_expert_only=False).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(make_policy, tmp_path):
    policy = stir(make_policy(**DELTA))
    policy.save_pretrained(tmp_path / "saved")
    return policy, tmp_path / "saved"


def test_saved_and_loaded_it_does_the_same(saved, make_batch):
    policy, folder = saved
    again = KuavoSmolVLAPolicy.from_pretrained(folder)
    for name, parameter in policy.model.delta_parameters().items():
        assert torch.equal(again.model.get_parameter(name), parameter), name
    batch = make_batch(policy)
    chunk = again.predict_action_chunk(batch, NOISE)
    assert torch.equal(chunk, policy.predict_action_chunk(batch, NOISE))
    assert not torch.allclose(chunk, again.refinable.chunk[..., :16], atol=1e-4)
    stored = json.loads((folder / "checkpoint.json").read_text())["freezing"]
    assert stored["trained_parts"] == []
    assert "delta_expert" in stored["extra_parts"]


@pytest.mark.parametrize("how", ["from_pretrained", "init_from"])
def test_a_checkpoint_without_one_gets_a_fresh_one_and_the_log_says_so(
    base, make_config, make_batch, how, caplog
):
    with caplog.at_level(logging.INFO):
        if how == "from_pretrained":
            policy = KuavoSmolVLAPolicy.from_pretrained(base, overrides=DELTA)
        else:
            policy = KuavoSmolVLAPolicy(make_config(init_from=str(base), **DELTA)).eval()
    said = [r.message for r in caplog.records if r.message.startswith("begun afresh")]
    assert len(said) == 1
    assert "delta_expert" in said[0]
    assert "pre_cls_param" in said[0]
    plain = KuavoSmolVLAPolicy.from_pretrained(base)
    batch = make_batch(plain)
    assert torch.equal(policy.predict_action_chunk(batch, NOISE), plain.predict_action_chunk(batch, NOISE))
    assert all(torch.isfinite(p).all() for p in policy.parameters())


def test_freezing_that_the_base_was_trained_with_is_told_to_be_void(base, caplog):
    with caplog.at_level(logging.INFO):
        policy = KuavoSmolVLAPolicy.from_pretrained(base, overrides={"train_delta_expert": True})
    assert "unfreeze_vision_layers is void" in caplog.text
    assert policy.freezing.unfrozen_layers == ()


def test_a_cls_head_can_be_added_to_a_trained_one(make_policy, tmp_path, caplog):
    policy = stir(make_policy(train_delta_expert=True))
    policy.save_pretrained(tmp_path / "without")
    with caplog.at_level(logging.INFO):
        more = KuavoSmolVLAPolicy.from_pretrained(tmp_path / "without", overrides={"use_cls_head": True})
    assert f"begun afresh, because the checkpoint has none: {', '.join(CLS_PARTS)}" in caplog.text
    for name, parameter in policy.model.delta_parameters().items():
        assert torch.equal(more.model.get_parameter(name), parameter), name


def test_weights_it_should_have_and_has_not_are_an_error(saved):
    _, folder = saved
    weights = load_file(folder / "model.safetensors")
    del weights["model.delta_action_in_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: delta_action_in_proj\.weight"):
        KuavoSmolVLAPolicy.from_pretrained(folder)


def test_without_its_extras_it_is_plain_and_can_be_exported(saved, make_batch, tmp_path, caplog):
    policy, folder = saved
    with pytest.raises(CheckpointError, match="plain SmolVLA has no delta expert"):
        export_plain(policy, tmp_path / "refused")
    with caplog.at_level(logging.INFO):
        plain = KuavoSmolVLAPolicy.from_pretrained(folder, overrides=EXTRAS_OFF)
    assert "left out of the checkpoint, as configured: act_cls_proj" in caplog.text
    assert not any(is_delta_name(name) for name in plain.model.state_dict())
    batch = make_batch(policy)
    policy.predict_action_chunk(batch, NOISE)
    assert torch.equal(plain.predict_action_chunk(batch, NOISE), policy.refinable.chunk[..., :16])
    export_plain(plain, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["type"] == "smolvla"
    assert not any("delta" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


@pytest.mark.slow
def test_the_notes_command_line(tmp_path):
    """The design note's first example through lerobot-train, on a data set and for steps of a test's size."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    joints = [f"joint_{i}" for i in range(16)]
    vector = {"dtype": "float32", "shape": (16,), "names": joints}
    picture = {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    data = LeRobotDataset.create(
        "local/tiny",
        fps=10,
        root=tmp_path / "data",
        use_videos=False,
        features={"observation.state": vector, "action": vector, "observation.images.head_cam_h": picture},
    )
    random = np.random.default_rng(0)
    for _ in range(12):
        data.add_frame(
            {
                "task": "pick up the parcel",
                "observation.state": random.normal(0, 1, 16).astype(np.float32),
                "action": random.normal(0, 1, 16).astype(np.float32),
                "observation.images.head_cam_h": random.integers(0, 256, (48, 64, 3), dtype=np.uint8),
            }
        )
    data.save_episode()
    data.finalize()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "lerobot.scripts.lerobot_train"),
            "--policy.discover_packages_path=kuavo_smolvla_ros.policy",
            "--policy.type=kuavo_smolvla",
            "--policy.backbone=tiny",
            "--policy.train_delta_expert=True",
            "--policy.use_cls_head=True",
            "--policy.num_cls_prefix=2",
            "--policy.num_cls_suffix=2",
            "--policy.vicreg_weight=0.01",
            "--policy.vicreg_lambda=25.0",
            "--policy.vicreg_mu=25.0",
            "--policy.vicreg_nu=1.0",
            "--policy.cls_noise_scale=0.01",
            "--dataset.repo_id=local/tiny",
            f"--dataset.root={tmp_path / 'data'}",
            f"--output_dir={tmp_path / 'out'}",
            "--batch_size=4",
            "--steps=2",
            "--num_workers=0",
            "--eval_freq=0",
            "--log_freq=1",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "out" / "checkpoints" / "last" / "pretrained_model"
    policy = KuavoSmolVLAPolicy.from_pretrained(folder)
    assert policy.config.use_cls_head
    assert policy.model.delta_action_out_proj.weight.abs().max() > 0
