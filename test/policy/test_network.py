from __future__ import annotations

import json

import pytest
import torch
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from kuavo_smolvla_ros.policy.architecture import ArchitectureError, expert_mlp_width, read_architecture
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.build import WeightsError, empty_network, load_network, new_network
from kuavo_smolvla_ros.policy.network import LM_HEAD, SmolVLANetwork, dead_parameter_names
from kuavo_smolvla_ros.policy.numerics import gated
from kuavo_smolvla_ros.policy.vision import encode_images, pixel_shuffle, position_ids

CHOICES = {"num_vlm_layers": 16, "expert_width_multiplier": 0.75, "self_attn_every_n_layers": 2}


def described(tmp_path, **changes):
    """A copy of the tiny backbone's description with entries replaced ("text_config.hidden_act")."""
    content = json.loads((resolve_backbone("tiny").path / "config.json").read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def test_published_sizes():
    sizes = read_architecture(resolve_backbone("smolvlm2-500m").path, **CHOICES)
    assert (sizes.vision.layers, sizes.vision.width, sizes.text.layers, sizes.text.width) == (
        12,
        768,
        16,
        960,
    )
    assert (sizes.expert_width, sizes.expert_mlp_width) == (720, 2048)
    assert sizes.image_tokens(512, 512) == 64
    with torch.device("meta"):
        network = SmolVLANetwork(sizes, 32, 32)
    assert sum(p.numel() for p in network.parameters()) == 450_046_176


@pytest.mark.parametrize(("width", "expected"), [(720, 2048), (48, 256), (960, 2560), (96, 256), (97, 256)])
def test_expert_mlp_width_follows_llamas_rule(width, expected):
    from lerobot.policies.smolvla.smolvlm_with_expert import get_intermediate_size

    assert expert_mlp_width(width) == get_intermediate_size(width) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"vision_config__hidden_act": "relu"}, "vision_config.hidden_act"),
        ({"text_config__attention_dropout": 0.1}, "text_config.attention_dropout"),
        ({"text_config__attention_bias": True}, "text_config.attention_bias"),
    ],
)
def test_a_backbone_that_is_not_implemented_is_refused(tmp_path, change, complaint):
    with pytest.raises(ArchitectureError, match=complaint):
        read_architecture(described(tmp_path, **change), **CHOICES)


def test_odd_expert_width_is_refused(tmp_path):
    with pytest.raises(ArchitectureError, match="even"):
        read_architecture(described(tmp_path), **{**CHOICES, "expert_width_multiplier": 0.55})


def test_a_folder_without_description_is_refused(tmp_path):
    with pytest.raises(ArchitectureError, match=r"config\.json"):
        read_architecture(tmp_path, **CHOICES)


def test_an_image_that_does_not_divide_is_refused():
    sizes = read_architecture(resolve_backbone("tiny").path, **CHOICES)
    with pytest.raises(ArchitectureError, match="48x50"):
        sizes.image_tokens(48, 50)


@pytest.mark.parametrize("side", [4, 8, 32])
def test_raster_ids_count_the_patches(side):
    ids = position_ids(side, side, side, "raster", torch.device("cpu"))
    assert torch.equal(ids, torch.arange(side * side))


@pytest.mark.parametrize("side", [8, 32])
def test_stock_ids_repeat_what_transformers_does_in_float32(side):
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    sizes = SmolVLMVisionConfig(hidden_size=8, image_size=side * 4, patch_size=4)
    theirs = SmolVLMVisionEmbeddings(sizes)
    taken = []
    theirs.position_embedding.register_forward_hook(lambda _m, inputs, _o: taken.append(inputs[0]))
    theirs(torch.zeros(1, 3, side * 4, side * 4), torch.ones(1, side, side, dtype=torch.bool))
    ours = position_ids(side, side, side, "stock", torch.device("cpu"))
    assert torch.equal(ours, taken[0][0])
    assert not torch.equal(ours, torch.arange(side * side)), (
        "transformers was mended: is the switch still needed?"
    )


def test_a_smaller_grid_is_spread_over_the_positions():
    ids = position_ids(2, 4, 4, "raster", torch.device("cpu")).view(2, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_unknown_position_mode_is_refused():
    with pytest.raises(ValueError, match="raster, stock"):
        position_ids(2, 2, 2, "random", torch.device("cpu"))


def test_pixel_shuffle_equals_the_published_one():
    hidden = torch.randn(2, 64, 5)
    expected = SmolVLMConnector.pixel_shuffle(None, hidden, 4)
    assert torch.equal(pixel_shuffle(hidden, 8, 8, 4), expected)


def test_pictures_need_not_be_square(make_config):
    network = new_network(make_config())
    assert encode_images(network, torch.zeros(2, 3, 32, 64)).shape[:2] == (2, 2)


def test_each_picture_is_encoded_by_itself(make_config):
    network = new_network(make_config())
    pictures = torch.rand(3, 3, 64, 64)
    together = encode_images(network, pictures)
    assert torch.allclose(together[1:2], encode_images(network, pictures[1:2]), atol=1e-5)


def test_initial_weights_have_the_published_spread(make_config):
    network = new_network(make_config())
    std = network.architecture.initializer_std
    assert network.text.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.05)
    assert network.expert.layers[0].self_attn.k_proj.weight.std().item() == pytest.approx(std, rel=0.1)
    assert network.expert.layers[1].self_attn.k_proj.weight.std().item() > 2 * std  # torch's own default
    assert network.vision.encoder.layers[0].mlp.fc1.bias.abs().max() == 0
    assert network.vision.post_layernorm.weight.eq(1).all()


def test_dead_parameters_really_are_dead(make_policy, make_batch):
    policy = make_policy()
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    loss, _ = policy.forward(make_batch(policy))
    loss.backward()
    without = {name.removeprefix("model.") for name, p in policy.named_parameters() if p.grad is None}
    assert without == dead_parameter_names(policy.model.architecture)


class TestLoading:
    def weights(self, make_config):
        network = new_network(make_config())
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def test_bfloat16_weights_become_float32(self, make_config):
        weights = {n: t.to(torch.bfloat16) for n, t in self.weights(make_config).items()}
        network = empty_network(make_config())
        assert load_network(network, weights) is True
        assert {p.dtype for p in network.parameters()} == {torch.float32}

    def test_only_the_head_may_be_absent(self, make_config):
        weights = self.weights(make_config)
        del weights[LM_HEAD]
        assert load_network(empty_network(make_config()), weights) is False

    def test_a_missing_name_is_told(self, make_config):
        weights = self.weights(make_config)
        del weights["state_proj.weight"]
        with pytest.raises(WeightsError, match=r"missing: state_proj\.weight"):
            load_network(empty_network(make_config()), weights)

    def test_an_unknown_name_is_told(self, make_config):
        weights = {**self.weights(make_config), "delta.weight": torch.zeros(1)}
        with pytest.raises(WeightsError, match=r"not known: delta\.weight"):
            load_network(empty_network(make_config()), weights)

    def test_another_shape_is_told(self, make_config):
        weights = {**self.weights(make_config), "state_proj.weight": torch.zeros(3, 4)}
        with pytest.raises(WeightsError, match=r"state_proj\.weight is \(3, 4\), not \(64, 32\)"):
            load_network(empty_network(make_config()), weights)


def test_backbone_weights_are_taken_where_there_are_any(make_config, tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder = shutil.copytree(resolve_backbone("tiny").path, tmp_path / "vlm")
    source = new_network(make_config())
    published = {
        name.removeprefix("vlm_with_expert.vlm."): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in source.state_dict().items()
        if name.startswith("vlm_with_expert.vlm.") and name != LM_HEAD
    }
    # The published model has more text layers than are used.
    extra = {
        name.replace("layers.0", "layers.31"): t.clone()
        for name, t in published.items()
        if ".text_model.layers.0" in name
    }
    save_file({**published, **extra}, folder / "model.safetensors")
    network = new_network(make_config(backbone=str(folder)))
    for name, tensor in published.items():
        assert torch.equal(network.get_parameter("vlm_with_expert.vlm." + name), tensor.float()), name
    ignored = new_network(make_config(backbone=str(folder), load_backbone_weights=False))
    assert not torch.equal(ignored.text.embed_tokens.weight, network.text.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gate_that_keeps_less_has_the_same_gradients(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(5, 7, dtype=dtype, requires_grad=True) for _ in range(2))
    plain = torch.nn.functional.silu(gate) * up
    weight = torch.randn(5, 7, dtype=dtype)
    wanted = torch.autograd.grad((plain * weight).sum(), (gate, up))
    made = gated(gate, up)
    got = torch.autograd.grad((made * weight).sum(), (gate, up))
    assert torch.equal(made, plain)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(gated(gate, up), plain)
