"""The policy as training and robot use it: losses, freezing in action, chunks, precision."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.data import default_collate

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import ConfigError, KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import DIMENSION_PADDING, Statistics, mix_samples
from kuavo_smolvla_ros.policy.images import CameraError
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

NOISE, TIME = (
    torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0.2, 0.6, 0.95]),
)


class TestLoss:
    @pytest.mark.parametrize("poison", [100.0, math.nan])
    def test_padded_steps_and_dimensions_do_not_matter(self, make_policy, make_batch, poison):
        policy = make_policy(action_dim=20)
        batch = make_batch(policy)
        batch["action_is_pad"][:, 40:] = True
        batch[DIMENSION_PADDING["action"]] = (torch.arange(20) >= 16).expand(3, -1)
        expected, _ = policy.forward(batch, noise=NOISE, time=TIME)
        batch["action"] = batch["action"].clone()
        batch["action"][:, 40:] = poison
        batch["action"][:, :, 16:] = poison
        loss, _ = policy.forward(batch, noise=NOISE, time=TIME)
        assert torch.equal(loss, expected)
        batch["action"][:, :40, :16] += 1.0
        assert not torch.equal(policy.forward(batch, noise=NOISE, time=TIME)[0], expected)

    def test_a_batch_of_two_widths_equals_its_parts(self, make_policy, make_raw):
        policy = make_policy(action_dim=20)
        from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

        before, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
        raws = [make_raw(1, action_dim=width, seed=width) for width in (16, 20)]
        singles = [{key: value[0] for key, value in raw.items()} for raw in raws]
        mixed = before(default_collate(mix_samples(singles)))
        together, _ = policy.forward(mixed, noise=NOISE[:2], time=TIME[:2], reduction="none")
        for i, raw in enumerate(raws):
            raw = {**raw, "task": ["go"]}
            alone, _ = policy.forward(before({**raws[i]}), noise=NOISE[i : i + 1], time=TIME[i : i + 1])
            assert together[i].item() == pytest.approx(alone.item(), rel=1e-5), raw["action"].shape

    def test_reductions_agree(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        mean, log = policy.forward(batch, noise=NOISE, time=TIME)
        each, _ = policy.forward(batch, noise=NOISE, time=TIME, reduction="none")
        assert each.shape == (3,)
        assert each.mean().item() == pytest.approx(mean.item(), rel=1e-5)
        assert torch.equal(log["loss"], mean)
        assert log["valid_share"].item() == 0.5
        assert not log["loss"].requires_grad

    @pytest.mark.parametrize(
        "key", ["action_is_pad", "action", "observation.state", "observation.language.tokens"]
    )
    def test_what_is_missing_is_named(self, make_policy, make_batch, key):
        policy = make_policy()
        batch = make_batch(policy)
        del batch[key]
        with pytest.raises(UsageError, match=f"no '{key}'"):
            policy.forward(batch)

    def test_a_chunk_of_another_length_is_refused(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        batch["action"] = batch["action"][:, :40]
        with pytest.raises(UsageError, match=r"\(batch, 50, width\)"):
            policy.forward(batch)

    @pytest.mark.parametrize("mask", [torch.zeros(3, 50), torch.zeros(3, 49, dtype=torch.bool)])
    def test_a_padding_mask_of_another_kind_is_refused(self, make_policy, make_batch, mask):
        policy = make_policy()
        with pytest.raises(UsageError, match="action_is_pad must be boolean"):
            policy.forward({**make_batch(policy), "action_is_pad": mask})

    def test_training_lowers_it(self, make_policy, make_batch):
        policy = make_policy().train()
        batch = make_batch(policy)
        batch["action"] = torch.full_like(batch["action"], 0.5)
        optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
        losses = []
        for _ in range(40):
            loss, _ = policy.forward(batch, noise=NOISE, time=TIME)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


class TestFreezing:
    def test_frozen_parameters_do_not_change_by_one_bit(self, make_policy, make_batch):
        policy = make_policy(unfreeze_vision_layers=[-1, -2], train_expert_only=False).train()
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-2, weight_decay=0.1)
        batch = make_batch(policy)
        for _ in range(3):
            loss, _ = policy.forward(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, parameter in policy.named_parameters():
            assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
        held = {id(p) for p in optimizer.state}
        assert held == {id(p) for p in policy.parameters() if p.requires_grad}

    def test_vision_layers_have_their_own_rate(self, make_policy):
        policy = make_policy(unfreeze_vision_layers=[-1], train_expert_only=False, optimizer_vision_lr=2e-6)
        vision = {id(p) for p in policy.model.vision.parameters() if p.requires_grad}
        rates = {id(p): group["lr"] for group in policy.get_optim_params() for p in group["params"]}
        assert {rates[i] for i in vision} == {2e-6}
        assert {rate for i, rate in rates.items() if i not in vision} == {policy.config.optimizer_lr}

    def test_frozen_layers_stay_in_evaluation_mode(self, make_policy):
        policy = make_policy(unfreeze_vision_layers=[-1], train_expert_only=False)
        assert policy.train() is policy
        layers = policy.model.vision.encoder.layers
        assert [layer.training for layer in layers] == [False] * (len(layers) - 1) + [True]
        assert policy.model.expert.training
        assert not any(m.training for m in policy.eval().modules())

    def test_what_is_frozen_is_logged(self, make_policy, caplog):
        with caplog.at_level(logging.INFO):
            make_policy(unfreeze_vision_layers=[-1], train_expert_only=False)
        assert "frozen   3/4: 0-2" in caplog.text
        assert "unfrozen 1/4: 3" in caplog.text

    def test_settings_reach_the_plan(self, make_policy):
        assert make_policy(freeze_preset="expert_only").freezing.unfrozen_layers == ()
        plan = make_policy(freeze_vision_ratio=0.5, train_expert_only=False).freezing
        assert len(plan.unfrozen_layers) == plan.num_vision_layers / 2


class TestChunk:
    def test_shape_and_width(self, make_policy, make_batch):
        policy = make_policy(action_dim=20)
        assert policy.predict_action_chunk(make_batch(policy, 2)).shape == (2, 50, 20)

    def test_a_seed_repeats_it_and_another_changes_it(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        first = policy.predict_action_chunk(batch, seed=7)
        torch.randn(11)  # the global generator does not matter
        assert torch.equal(policy.predict_action_chunk(batch, seed=7), first)
        assert not torch.equal(policy.predict_action_chunk(batch, seed=8), first)

    def test_without_noise_it_is_always_the_same(self, make_policy, make_batch):
        policy = make_policy(noise_scale=0.0)
        batch = make_batch(policy)
        first = policy.predict_action_chunk(batch)
        assert torch.equal(policy.predict_action_chunk(batch, seed=8), first)
        assert torch.equal(policy.predict_action_chunk(batch, torch.zeros_like(NOISE)), first)

    def test_less_noise_is_nearer_to_none(self, make_policy, make_batch):
        policy = make_policy()
        batch, chunks = make_batch(policy), []
        for scale in (0.0, 0.1, 1.0):
            policy.config.noise_scale = scale
            chunks.append(policy.predict_action_chunk(batch, seed=7))
        none, little, much = chunks
        assert 0 < (little - none).square().mean() < (much - none).square().mean()

    def test_the_callers_own_noise_stays_as_it_is(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        first = policy.predict_action_chunk(batch, NOISE)
        policy.config.noise_scale = 0.5
        assert torch.equal(policy.predict_action_chunk(batch, NOISE), first)

    @pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
    def test_a_scale_that_is_none(self, make_policy, scale):
        with pytest.raises(ConfigError, match="noise_scale"):
            make_policy(noise_scale=scale)

    def test_a_batch_equals_its_samples(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        together = policy.predict_action_chunk(batch, NOISE)
        for i in range(3):
            single = {k: v[i : i + 1] for k, v in batch.items() if isinstance(v, torch.Tensor)}
            assert torch.allclose(
                policy.predict_action_chunk(single, NOISE[i : i + 1])[0], together[i], atol=1e-5
            )

    def test_language_padding_does_not_matter(self, make_config, make_raw):
        from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

        chunks = []
        config = make_config()
        policy = KuavoSmolVLAPolicy(config, statistics=Statistics.identity(config.widths)).eval()
        for padding in ("longest", "max_length"):
            before, _ = make_kuavo_smolvla_pre_post_processors(
                make_config(pad_language_to=padding), statistics=policy.statistics
            )
            chunks.append(policy.predict_action_chunk(before(make_raw()), NOISE))
        assert torch.allclose(*chunks, atol=1e-5)

    def test_pictures_instruction_and_state_all_matter(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        base = policy.predict_action_chunk(batch, NOISE)
        for key in ("observation.pixels", "observation.state"):
            changed = policy.predict_action_chunk({**batch, key: batch[key] * 0.5}, NOISE)
            assert not torch.allclose(changed, base, atol=1e-5), key
        tokens = batch["observation.language.tokens"].flip(0)
        assert not torch.allclose(
            policy.predict_action_chunk({**batch, "observation.language.tokens": tokens}, NOISE),
            base,
            atol=1e-6,
        )

    def test_a_kept_context_gives_the_same_chunk(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        with torch.no_grad():
            context = policy.context(batch)
        blind = {key: value for key, value in batch.items() if "pixels" not in key and "language" not in key}
        assert torch.equal(
            policy.predict_action_chunk(blind, NOISE, context=context),
            policy.predict_action_chunk(batch, NOISE),
        )

    def test_padded_dimensions_follow_the_line_seen_in_training(self, make_policy, make_batch):
        """What the network is never taught (padded dimensions carry no loss) must not feed back into it."""
        policy = make_policy()
        batch = make_batch(policy)
        expected = policy.predict_action_chunk(batch, NOISE)
        with torch.no_grad():
            policy.model.action_out_proj.weight[16:] += 5.0
        assert torch.equal(policy.predict_action_chunk(batch, NOISE), expected)
        policy.config.pin_padding = False
        assert not torch.allclose(policy.predict_action_chunk(batch, NOISE), expected, atol=1e-3)

    def test_a_narrower_robot_says_so_in_the_batch(self, make_policy, make_batch):
        wide = make_policy(action_dim=20)
        batch = make_batch(wide)
        batch[DIMENSION_PADDING["action"]] = (torch.arange(20) >= 16).expand(3, -1)
        narrow = wide.predict_action_chunk(batch, NOISE)
        with torch.no_grad():
            wide.model.action_out_proj.weight[16:] += 5.0
        assert torch.equal(wide.predict_action_chunk(batch, NOISE)[..., :16], narrow[..., :16])

    def test_noise_of_another_shape_is_refused(self, make_policy, make_batch):
        policy = make_policy()
        with pytest.raises(UsageError, match=r"\(3, 50, 32\)"):
            policy.predict_action_chunk(make_batch(policy), NOISE[:, :, :16])

    def test_a_prefix_is_followed(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        before = policy.predict_action_chunk(batch, seed=1)
        plain = policy.predict_action_chunk(batch, seed=2)
        followed = policy.predict_action_chunk(batch, seed=2, prefix=before[:, 8:], delay=4)
        assert (followed[:, :4] - before[:, 8:12]).abs().max() < 0.1 * (
            plain[:, :4] - before[:, 8:12]
        ).abs().max()

    def test_cameras_must_be_the_policys(self, make_policy, make_raw, make_batch):
        policy = make_policy()
        batch = {**make_raw(), **{k: v for k, v in make_batch(policy).items() if "language" in k}}
        policy.predict_action_chunk(batch)  # pictures straight from the camera are taken as well
        batch["observation.images.front"] = batch.pop("observation.images.head_cam_h")
        with pytest.raises(CameraError, match="missing: head_cam_h; not known to the policy: front"):
            policy.predict_action_chunk(batch)


class TestSelectAction:
    def test_takes_each_chunks_first_steps(self, make_policy, make_batch):
        policy = make_policy(n_action_steps=3)
        batch = make_batch(policy)
        chunk = policy.predict_action_chunk(batch, NOISE)
        taken = [policy.select_action(batch, NOISE) for _ in range(7)]
        assert all(torch.equal(taken[i], chunk[:, i % 3]) for i in range(7))

    def test_reset_asks_anew(self, make_policy, make_batch):
        policy = make_policy()
        batch = make_batch(policy)
        first = policy.select_action(batch, seed=1)
        policy.reset()
        assert torch.equal(policy.select_action(batch, seed=1), first)

    def test_another_batch_size_needs_a_reset(self, make_policy, make_batch):
        policy = make_policy()
        policy.select_action(make_batch(policy, 3))
        with pytest.raises(UsageError, match=r"2 observations, but the queued actions are for 3; call reset"):
            policy.select_action(make_batch(policy, 2))


class TestPrecision:
    def test_parameters_are_single_precision_whatever_computes(self, make_policy, make_batch):
        policy = make_policy(compute_dtype="bfloat16").train()
        loss, _ = policy.forward(make_batch(policy))
        loss.backward()
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}
        assert loss.dtype == torch.float32

    def test_bfloat16_computes_nearly_the_same_and_float32_ignores_an_outer_autocast(
        self, make_policy, make_batch
    ):
        policy = make_policy(compute_dtype="float32")
        batch = make_batch(policy)
        exact = policy.predict_action_chunk(batch, NOISE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(policy.predict_action_chunk(batch, NOISE), exact)
        policy.config.compute_dtype = "bfloat16"
        rounded = policy.predict_action_chunk(batch, NOISE)
        assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
        policy.config.compute_dtype = "auto"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(policy.predict_action_chunk(batch, NOISE), rounded)
        assert torch.equal(policy.predict_action_chunk(batch, NOISE), exact)

    def test_position_ids_do_not_depend_on_it(self, make_policy, make_batch):
        """In transformers they do, which moves the output more than all rounding."""
        policy = make_policy()
        batch = make_batch(policy)
        raster = policy.predict_action_chunk(batch, NOISE)
        policy.config.vision_position_ids = "stock"
        assert not torch.allclose(policy.predict_action_chunk(batch, NOISE), raster, atol=1e-4)


@pytest.mark.parametrize("unfrozen", [None, [-1]])
def test_nothing_waits_for_the_device(make_config, unfrozen):
    """Fake tensors have no values: whatever asks for one (`item`, a branch, a mask index) raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = make_config(unfreeze_vision_layers=unfrozen, train_expert_only=unfrozen is None)
        policy = KuavoSmolVLAPolicy(config)
        batch = {
            "observation.pixels": torch.rand(2, 2, 3, 64, 64),
            "observation.state": torch.rand(2, 16),
            "observation.language.tokens": torch.zeros(2, 48, dtype=torch.long),
            "observation.language.attention_mask": torch.ones(2, 48, dtype=torch.bool),
            "action": torch.rand(2, 50, 16),
            "action_is_pad": torch.zeros(2, 50, dtype=torch.bool),
        }
        loss, _ = policy.forward(batch)
        loss.backward()
        chunk = policy.predict_action_chunk(batch, prefix=torch.rand(2, 20, 16), delay=2)
        assert chunk.shape == (2, 50, 16)
        with pytest.raises(DataDependentOutputException):  # the test would notice
            loss.item()


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"n_obs_steps": 2}, "one observation"),
            ({"n_action_steps": 51}, "between 1 and chunk_size"),
            ({"n_action_steps": 0}, "between 1 and chunk_size"),
            ({"num_steps": 0}, "at least one"),
            ({"compute_dtype": "float16"}, "auto, float32, bfloat16"),
            ({"vision_position_ids": "x"}, "raster, stock"),
            ({"pad_language_to": "left"}, "max_length, longest"),
            ({"std_floor": 0.0}, "positive"),
            ({"cameras": ["a", "a"]}, "twice"),
        ],
    )
    def test_contradictions_are_refused(self, fields, complaint):
        with pytest.raises(ConfigError, match=complaint):
            KuavoSmolVLAConfig(device="cpu", **fields)

    def test_vectors_that_do_not_fit_are_refused(self, make_config):
        with pytest.raises(ConfigError, match="action is 33 wide; the network takes at most 32"):
            make_config(action_dim=33).validate_features()

    def test_cameras_must_agree_with_the_data(self, make_config):
        config = make_config()
        config.cameras = ["head_cam_h"]
        with pytest.raises(CameraError, match="wrist_cam_l"):
            config.validate_features()
        config.unused_cameras = ["wrist_cam_l"]
        config.validate_features()

    def test_cameras_of_the_data_are_written_down(self, make_config):
        config = make_config()
        config.cameras = []
        config.validate_features()
        assert config.cameras == ["head_cam_h", "wrist_cam_l"]

    def test_state_action_and_a_camera_are_needed(self, make_config):
        config = make_config(cameras={})
        with pytest.raises(ConfigError, match="no camera"):
            config.validate_features()
        config.input_features = {}
        with pytest.raises(ConfigError, match=r"no observation\.state"):
            config.validate_features()

    def test_the_camera_order_is_the_prefixs(self, make_policy, make_raw, make_batch):
        """Swapping the cameras in the configuration, not in the batch, changes what is computed."""
        policy = make_policy()
        batch = {**make_raw(), **{k: v for k, v in make_batch(policy).items() if "language" in k}}
        before = policy.predict_action_chunk(batch, NOISE)
        reordered = dict(sorted(batch.items(), reverse=True))
        assert torch.equal(policy.predict_action_chunk(reordered, NOISE), before)
        policy.config.cameras = policy.config.cameras[::-1]
        assert not torch.allclose(policy.predict_action_chunk(batch, NOISE), before, atol=1e-4)
