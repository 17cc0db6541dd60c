"""With our additions switched off, chunk, loss and gradients are lerobot's."""

from __future__ import annotations

import pytest
import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

STOCK = {"vision_position_ids": "stock", "pin_padding": False}
TOLERANCE = 1e-5


def make_pair(make_config, state_dim=16, action_dim=16, **fields):
    """lerobot's policy with random weights in float32, and ours with the same."""
    config = make_config(state_dim, action_dim, **{**STOCK, **fields})
    probe = resolve_backbone(config.backbone)
    side = 64 if config.backbone == "tiny" else 512
    plain = SmolVLAPolicy(
        SmolVLAConfig(
            vlm_model_name=str(probe.path),
            resize_imgs_with_padding=(side, side),
            device="cpu",
            input_features=config.input_features,
            output_features=config.output_features,
        )
    )
    plain = plain.float().eval()
    weights = {name.removeprefix("model."): w.clone() for name, w in plain.state_dict().items()}
    return plain, KuavoSmolVLAPolicy(
        config, weights=weights, statistics=Statistics.identity(config.widths)
    ).eval()


def make_batches(ours, raw):
    """What ours gets from its preprocessor, and the same for lerobot's."""
    before, _ = make_kuavo_smolvla_pre_post_processors(ours.config, statistics=ours.statistics)
    batch = before(dict(raw))
    language = {name: value for name, value in batch.items() if "language" in name}
    return batch, {**raw, **language}


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunk_equals_lerobots(make_config, make_raw, padding, batch_size):
    plain, ours = make_pair(make_config, pad_language_to=padding)
    batch, stock_batch = make_batches(ours, make_raw(batch_size))
    noise = torch.randn(batch_size, 50, 32)
    expected = plain.predict_action_chunk(stock_batch, noise=noise)
    assert (ours.predict_action_chunk(batch, noise=noise) - expected).abs().max() < TOLERANCE


def test_the_comparison_would_notice_a_difference(make_config, make_raw):
    plain, ours = make_pair(make_config, vision_position_ids="raster")
    batch, stock_batch = make_batches(ours, make_raw())
    noise = torch.randn(3, 50, 32)
    difference = ours.predict_action_chunk(batch, noise=noise) - plain.predict_action_chunk(
        stock_batch, noise=noise
    )
    assert difference.abs().max() > TOLERANCE


def test_loss_and_gradients_equal_lerobots_where_nothing_is_padded(make_config, make_raw):
    plain, ours = make_pair(make_config, 32, 32)
    batch, stock_batch = make_batches(ours, make_raw(3, 32, 32))
    noise, time = torch.randn(3, 50, 32), torch.tensor([0.1, 0.5, 0.9])
    plain.train()  # returns None in lerobot 0.4
    expected, _ = plain.forward(stock_batch, noise=noise, time=time)
    loss, _ = ours.train().forward(batch, noise=noise, time=time)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    expected.backward()
    loss.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert any("state_proj" in name for name in got)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def test_a_frozen_prefix_carries_no_gradient_and_the_state_does(make_config, make_raw):
    _, ours = make_pair(make_config)
    batch, _ = make_batches(ours, make_raw())
    context = ours.context(batch)
    assert not any(t.requires_grad for t in (*context.keys, *context.values))
    prefix = ours.prefill(batch, context)
    assert all(t.requires_grad for t in prefix.keys)


def test_gradients_reach_an_unfrozen_vision_layer_and_stop_below_it(make_config, make_raw):
    _, ours = make_pair(make_config, unfreeze_vision_layers=[-1], train_expert_only=False)
    batch, _ = make_batches(ours, make_raw())
    loss, _ = ours.train().forward(batch)
    loss.backward()
    touched = {name for name, p in ours.named_parameters() if p.grad is not None}
    layers = len(ours.model.vision.encoder.layers)
    assert any(f"vision_model.encoder.layers.{layers - 1}." in name for name in touched)
    assert not any(f"vision_model.encoder.layers.{layers - 2}." in name for name in touched)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert touched == trained, "a parameter that trains but gets no gradient stalls distributed training"


def test_names_equal_lerobots(make_config):
    plain, ours = make_pair(make_config)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert {n: tuple(p.shape) for n, p in ours.state_dict().items()} == {
        n: tuple(p.shape) for n, p in plain.state_dict().items()
    }


@pytest.mark.slow
def test_full_size_chunk_equals_lerobots(make_config, make_raw, record_property):
    plain, ours = make_pair(make_config, backbone="smolvlm2-500m")
    batch, stock_batch = make_batches(ours, make_raw(2))
    noise = torch.randn(2, 50, 32)
    difference = ours.predict_action_chunk(batch, noise=noise) - plain.predict_action_chunk(
        stock_batch, noise=noise
    )
    worst = difference.abs().max().item()
    record_property("max_abs_difference", worst)
    print(f"full size, float32, max abs difference {worst:.2e}")
    assert worst < TOLERANCE
    assert sum(p.numel() for p in ours.parameters()) == 450_046_176
