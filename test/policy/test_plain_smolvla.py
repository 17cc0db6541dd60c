"""Checkpoints travel between plain lerobot SmolVLA and ours, in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.plain_smolvla import export_plain

STOCK = {"vision_position_ids": "stock", "pin_padding": False, "backbone": "tiny"}
STATS = {key: {"mean": torch.zeros(16), "std": torch.ones(16)} for key in ("observation.state", "action")}


@pytest.fixture
def plain(make_config, tmp_path):
    """A plain SmolVLA with random weights, and the folder it was saved in."""
    config = make_config()
    policy = SmolVLAPolicy(
        SmolVLAConfig(
            vlm_model_name=str(resolve_backbone("tiny").path),
            resize_imgs_with_padding=(64, 64),
            n_action_steps=10,
            device="cpu",
            input_features=config.input_features,
            output_features=config.output_features,
        )
    )
    policy = policy.float().eval()
    policy.save_pretrained(tmp_path / "plain")
    return policy, tmp_path / "plain"


def test_a_plain_checkpoint_becomes_ours(plain, make_batch, make_raw):
    theirs, folder = plain
    ours = KuavoSmolVLAPolicy.from_pretrained(folder, overrides=STOCK)
    ours.statistics = Statistics.identity(ours.config.widths)
    assert ours.has_lm_head
    assert (ours.config.n_action_steps, ours.config.image_size) == (10, (64, 64))
    assert ours.config.cameras == ["head_cam_h", "wrist_cam_l"]
    batch, noise = make_batch(ours), torch.randn(3, 50, 32)
    stock = {**make_raw(), **{key: value for key, value in batch.items() if "language" in key}}
    expected = theirs.predict_action_chunk(stock, noise=noise)
    assert (ours.predict_action_chunk(batch, noise) - expected).abs().max() < 1e-5


def test_training_starts_from_plain_weights(plain, make_config, caplog):
    theirs, folder = plain
    ours = KuavoSmolVLAPolicy(make_config(init_from=str(folder)), dataset_stats=STATS)
    assert "a tokenizer of its own" in caplog.text, "published weights do not know our small tokenizer's ids"
    weights = ours.state_dict()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in theirs.state_dict().items())
    assert ours.statistics == Statistics.from_dataset(STATS, ours.config.widths)


def test_lerobots_own_way_to_plain_weights_is_refused(plain, make_config):
    """make_policy with pretrained_path would go on to load plain SmolVLA's processors."""
    _, folder = plain
    config = make_config()
    config.pretrained_path = folder
    with pytest.raises(UsageError, match="init_from"):
        KuavoSmolVLAPolicy.from_pretrained(folder, config=config, dataset_stats=STATS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapt_to_pi_aloha", True),
        ("add_image_special_tokens", True),
        ("empty_cameras", 1),
        ("attention_mode", "self_attn"),
        ("prefix_length", 300),
        ("min_period", 0.01),
        ("num_expert_layers", 8),
    ],
)
def test_what_is_not_implemented_is_refused(plain, field, value):
    _, folder = plain
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=r"not implement|fewer layers"):
        KuavoSmolVLAPolicy.from_pretrained(folder)


def test_lerobot_runs_what_we_export(make_policy, make_batch, make_raw, tmp_path):
    ours = make_policy(**STOCK)
    export_plain(ours, tmp_path / "export")
    theirs = SmolVLAPolicy.from_pretrained(tmp_path / "export", strict=True).float()
    before, after = make_pre_post_processors(theirs.config, str(tmp_path / "export"))
    noise, raw = torch.randn(3, 50, 32), make_raw()
    expected = ours.predict_action_chunk(make_batch(ours), noise)
    got = theirs.predict_action_chunk(before(dict(raw)), noise=noise)
    assert (got - expected).abs().max() < 1e-5
    assert after(got).shape == (3, 50, 16)


def test_nothing_is_exported_without_statistics(make_policy, tmp_path):
    ours = make_policy()
    ours.statistics = None
    with pytest.raises(CheckpointError, match="no normalisation statistics"):
        export_plain(ours, tmp_path / "export")
