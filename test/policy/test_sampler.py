"""The fast path gives the policy's own chunks, notices new weights, and says why where it is not taken."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.policy.sampler import Sampler, SamplerError, SamplerOptions, make_sampler
from kuavo_smolvla_ros.policy.sampler_linear import OneDnnLinear, why_not_onednn

TOLERANCE = 1e-5
DENSE, TRIMMED_NOT = SamplerOptions(forms="dense"), SamplerOptions(trim=False)


def noise_for(batch, policy):
    return torch.randn(len(batch["observation.state"]), 50, policy.config.max_action_dim)


def difference(sampler, policy, batch, **how):
    noise = noise_for(batch, policy)
    return (sampler.chunk(batch, noise, **how) - policy.predict_action_chunk(batch, noise, **how)).abs().max()


@pytest.fixture
def everywhere(monkeypatch):
    """oneDNN's products also for a network as narrow as the tiny one."""
    monkeypatch.setattr("kuavo_smolvla_ros.policy.sampler.WIDE", 0)
    monkeypatch.setattr("kuavo_smolvla_ros.policy.sampler_attention.WORTH_IT", 0)
    monkeypatch.setattr("kuavo_smolvla_ros.policy.sampler_attention.SCORES", 64 * 20)  # several blocks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its attention is for one
    yield
    torch.set_num_threads(threads)


class TestChunk:
    @pytest.mark.parametrize("options", [SamplerOptions(), TRIMMED_NOT], ids=["trimmed", "padded"])
    @pytest.mark.parametrize("batch_size", [1, 2, 3])  # sentences of different lengths
    def test_equals_the_plain_path(self, make_policy, make_batch, batch_size, options):
        policy = make_policy()
        batch = make_batch(policy, batch_size)
        sampler = Sampler(policy, options)
        assert difference(sampler, policy, batch) < TOLERANCE
        prefix = torch.randn(1, 20, 16)
        assert difference(sampler, policy, batch, prefix=prefix, delay=4) < TOLERANCE
        assert difference(sampler, policy, batch) < TOLERANCE, "nothing is left of the last chunk"

    def test_equals_it_with_onednns_products(self, make_policy, make_batch, everywhere):
        policy = make_policy()
        sampler = Sampler(policy)
        assert sampler.form == ("dense" if why_not_onednn(torch.float32) else "oneDNN")
        for batch_size in (1, 3):
            assert difference(sampler, policy, make_batch(policy, batch_size)) < TOLERANCE

    @pytest.mark.parametrize(
        "fields",
        [
            {"vision_position_ids": "stock"},
            {"pin_padding": False},
            {"self_attn_every_n_layers": 3},
            {"self_attn_every_n_layers": 0},
            {"num_steps": 3, "pad_language_to": "longest"},
            {"resize_imgs_with_padding": (96, 64)},
            {"rtc_schedule": "EXP", "rtc_max_guidance_weight": 3.0},
        ],
        ids=str,
    )
    def test_follows_the_configuration(self, make_policy, make_batch, fields):
        policy = make_policy(**fields)
        batch = make_batch(policy, 2)
        how = {"prefix": torch.randn(1, 9, 16), "delay": 2}
        assert difference(Sampler(policy), policy, batch, **how) < TOLERANCE

    def test_settings_may_change_afterwards(self, make_policy, make_batch):
        policy = make_policy()
        batch, sampler = make_batch(policy, 1), Sampler(policy)
        policy.config.num_steps = 4
        assert difference(sampler, policy, batch) < TOLERANCE
        policy.config.vision_position_ids = "stock"
        assert difference(sampler, policy, batch) < TOLERANCE

    def test_padded_dimensions_are_pinned_per_sample(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy, 2)
        batch["action_dim_is_pad"] = torch.zeros(2, 16, dtype=torch.bool)
        batch["action_dim_is_pad"][1, 14:] = True
        assert difference(Sampler(policy), policy, batch) < TOLERANCE

    def test_is_the_same_again_and_leaves_autocast_outside(self, make_policy, make_batch):
        policy = make_policy()
        batch, sampler = make_batch(policy, 1), Sampler(policy)
        first = sampler.chunk(batch, seed=5)
        assert torch.equal(sampler.chunk(batch, seed=5), first)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sampler.chunk(batch, seed=5), first)

    def test_its_result_can_be_trained_on(self, make_policy, make_batch):
        policy = make_policy()
        chunk = Sampler(policy).chunk(make_batch(policy, 1), seed=1)
        weight = torch.ones(16, requires_grad=True)
        (chunk * weight).sum().backward()
        assert weight.grad is not None

    @pytest.mark.parametrize(("state", "action"), [(1, 32), (32, 1), (16, 20)])
    def test_any_widths(self, make_policy, make_batch, state, action):
        policy = make_policy(state, action)
        assert difference(Sampler(policy), policy, make_batch(policy, 1)) < TOLERANCE

    @pytest.mark.slow
    def test_compiled_stages_give_the_same(self, make_policy, make_batch, monkeypatch, tmp_path, caplog):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        policy = make_policy()
        sampler = Sampler(policy, SamplerOptions(compile=True))
        assert difference(sampler, policy, make_batch(policy, 1)) < TOLERANCE
        assert any(tmp_path.iterdir()), "what was compiled is kept"

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
    def test_full_size(self, make_policy, make_batch, record_property, dtype):
        policy = make_policy(backbone="smolvlm2-500m")
        batch = make_batch(policy, 1)
        worst = difference(Sampler(policy, SamplerOptions(dtype=dtype)), policy, batch).item()
        record_property("max_abs_difference", worst)
        assert worst < {"float32": TOLERANCE, "bfloat16": 0.05, "int8": 0.15}[dtype]


class TestPrecision:
    def test_bfloat16_is_no_further_off_than_autocast(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy, 3)
        noise = noise_for(batch, policy)
        exact = policy.predict_action_chunk(batch, noise)
        policy.config.compute_dtype = "bfloat16"
        sampler = Sampler(policy)
        assert sampler.dtype == torch.bfloat16
        autocast = (policy.predict_action_chunk(batch, noise) - exact).abs().max()
        assert 0 < (sampler.chunk(batch, noise) - exact).abs().max() < max(2 * autocast, 0.02)

    def test_int8_is_an_approximation(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy, 1)
        error = difference(Sampler(policy, SamplerOptions(dtype="int8")), policy, batch)
        assert 1e-4 < error < 0.1

    def test_fewer_steps_are_as_if_the_policy_had_them(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy, 1)
        noise = noise_for(batch, policy)
        how = {"prefix": torch.randn(1, 9, 16), "delay": 2}
        chunk = Sampler(policy, SamplerOptions(steps=4)).chunk(batch, noise, **how)
        policy.config.num_steps = 4
        assert (chunk - policy.predict_action_chunk(batch, noise, **how)).abs().max() < TOLERANCE


class TestWeights:
    @pytest.fixture
    def pair(self, make_policy, make_batch):
        policy = make_policy()
        return policy, Sampler(policy), make_batch(policy, 1)

    def test_are_packed_once(self, pair):
        _, sampler, batch = pair
        for _ in range(3):
            sampler.chunk(batch, seed=0)
        assert sampler.builds == 1
        assert not sampler.refresh()

    @pytest.mark.parametrize("optimizer", ["plain", "foreach", "fused"])
    def test_an_optimizers_step_is_noticed(self, pair, optimizer):
        policy, sampler, batch = pair
        kind = {} if optimizer == "plain" else {optimizer: True}
        weights = [p for p in policy.parameters() if p.requires_grad]
        steps = torch.optim.AdamW(weights, lr=1e-2, **kind)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        before = sampler.chunk(batch, seed=0)
        steps.step()
        assert difference(sampler, policy, batch) < TOLERANCE
        assert not torch.allclose(sampler.chunk(batch, seed=0), before, atol=1e-3)

    @pytest.mark.parametrize("assign", [False, True])
    def test_another_checkpoint_is_noticed(self, pair, make_policy, assign):
        policy, sampler, batch = pair
        torch.manual_seed(1)
        other = {name: weight.clone() for name, weight in make_policy().state_dict().items()}
        policy.load_state_dict(other, assign=assign)
        assert difference(sampler, policy, batch) < TOLERANCE
        assert sampler.builds == 2

    def test_every_single_tensor_is_watched(self, pair):
        policy, sampler, _ = pair
        for name, weight in policy.model.named_parameters():
            with torch.no_grad():
                weight.mul_(1.0)
            assert sampler.refresh(), name

    def test_a_replaced_network_or_layer_is_noticed(self, pair, make_policy):
        policy, sampler, batch = pair
        layer = policy.model.expert.layers[1]
        layer.mlp.down_proj = torch.nn.Linear(layer.mlp.down_proj.in_features, 48, bias=False)
        assert difference(sampler, policy, batch) < TOLERANCE
        policy.model = copy.deepcopy(policy.model)
        with torch.no_grad():
            policy.model.state_proj.weight.add_(0.5)
        assert difference(sampler, policy, batch) < TOLERANCE

    def test_moved_storage_is_noticed(self, pair):
        policy, sampler, batch = pair
        weight = policy.model.action_out_proj.weight
        weight.data = weight.data * 2.0
        assert difference(sampler, policy, batch) < TOLERANCE

    def test_a_write_behind_torchs_back_is_noticed_or_cured_by_a_rebuild(self, pair):
        policy, sampler, batch = pair
        weight = policy.model.expert.layers[0].mlp.up_proj.weight.data
        weight.mul_(3.0)
        assert difference(sampler, policy, batch) < TOLERANCE
        weight[0, 0] += 5.0  # a single entry: nobody looks there
        sampler.rebuild()
        assert difference(sampler, policy, batch) < TOLERANCE


class TestFallback:
    def test_a_layer_of_another_kind_takes_the_plain_path(self, make_policy, caplog):
        class Adapted(torch.nn.Linear):
            pass

        policy = make_policy()
        old = policy.model.expert.layers[0].mlp.down_proj
        policy.model.expert.layers[0].mlp.down_proj = Adapted(old.in_features, old.out_features, bias=False)
        with caplog.at_level(logging.WARNING):
            assert make_sampler(policy) is None
        (line,) = [r.getMessage() for r in caplog.records if "plain path" in r.getMessage()]
        assert "layers.0.mlp.down_proj is a Adapted" in line
        with pytest.raises(SamplerError, match="Adapted"):
            Sampler(policy)

    def test_parameters_in_half_precision_take_the_plain_path(self, make_policy, caplog):
        assert make_sampler(make_policy().bfloat16()) is None
        assert "not in single precision" in caplog.text

    def test_without_onednn_products_are_torchs_own(
        self, make_policy, make_batch, everywhere, monkeypatch, caplog
    ):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        policy = make_policy()
        with caplog.at_level(logging.INFO):
            sampler = Sampler(policy)
        assert "without packed weights: this torch has no oneDNN" in caplog.text
        assert sampler.form == "dense"
        assert difference(sampler, policy, make_batch(policy, 1)) < TOLERANCE

    @pytest.mark.parametrize("fields", [{"dtype": "int4"}, {"forms": "fast"}, {"steps": 0}])
    def test_options_are_checked(self, fields):
        with pytest.raises(SamplerError):
            SamplerOptions(**fields)


@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 70), seed=st.integers(0, 99)
)
@settings(max_examples=20)
def test_packed_products_equal_torchs(rows, inputs, outputs, seed):
    if why_not_onednn(torch.float32):
        pytest.skip("no oneDNN here")
    torch.manual_seed(seed)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    kept, layer, expected = (
        x.clone(),
        OneDnnLinear(weight, bias, 8),
        torch.nn.functional.linear(x, weight, bias),
    )
    other = torch.randn_like(expected)
    for got, wanted in (
        (layer(x), expected),
        (layer.gelu(x), torch.nn.functional.gelu(expected, approximate="tanh")),
        (layer.silu(x), torch.nn.functional.silu(expected)),
        (layer.plus(x, other), expected + other),
    ):
        assert torch.allclose(got, wanted, atol=1e-4)
    assert torch.equal(x, kept)
