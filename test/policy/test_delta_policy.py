"""The delta expert in a policy: its loss, what it can learn, chunks refined at once and later."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.delta_policy import (
    BASE_CHUNKS,
    IMAGE_TOKENS,
    KNOWN_AGES,
    LATER_STATES,
    _digit,
    _uniform,
    cls_tokens,
    refine_rest,
)
from kuavo_smolvla_ros.policy.delta_runtime import refine_remaining
from kuavo_smolvla_ros.policy.delta_settings import DeltaError
from kuavo_smolvla_ros.policy.dimensions import DIMENSION_PADDING
from kuavo_smolvla_ros.policy.flow import sample_time
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import (
    KuavoSmolVLAPolicy,
    make_att_2d_masks_with_cls,
    vicreg_loss,
)
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors
from kuavo_smolvla_ros.policy.runtime import PolicyRunner

NOISE = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1))
TIME = torch.tensor([0.2, 0.6, 0.95])
DEMONSTRATION = {"train_delta_expert": True, "delta_target": "demonstration"}


class TestLoss:
    def test_undoing_the_noise_costs_the_noise_at_first(self, make_policy, make_batch):
        policy = make_policy(train_delta_expert=True, cls_noise_scale=0.1)
        loss, log = policy.forward(make_batch(policy), noise=NOISE, time=TIME)
        assert loss.item() == pytest.approx((0.1 * NOISE[..., :16]).square().mean().item(), rel=1e-4)
        assert log.keys() == {
            "loss",
            "delta_loss",
            "delta_losses_after_forward",
            "delta_losses_after_in_ep_bound",
            "delta_losses_after_rm_padding",
        }
        assert not any(value.requires_grad for value in log.values())

    def test_towards_the_demonstration_it_costs_the_bases_error(self, make_policy, make_batch):
        policy = make_policy(**DEMONSTRATION, cls_noise_scale=0.0)
        batch = make_batch(policy)
        batch[BASE_CHUNKS] = torch.zeros(3, 1, 50, 32)
        loss, _ = policy.forward(batch, noise=NOISE, time=TIME)
        assert loss.item() == pytest.approx(batch["action"].square().mean().item(), rel=1e-5)

    def test_the_three_means(self, make_policy, make_batch):
        """Over all entries, over steps inside the episode, and over what was demonstrated."""
        policy = make_policy(**DEMONSTRATION, cls_noise_scale=0.0)
        batch = make_batch(policy)
        batch["action"] = torch.ones_like(batch["action"])
        batch["action_is_pad"][:, 25:] = True
        batch[BASE_CHUNKS] = torch.zeros(3, 1, 50, 32)
        _, log = policy.forward(batch, noise=NOISE, time=TIME)
        means = [
            log[f"delta_losses_after_{name}"].item() for name in ("forward", "in_ep_bound", "rm_padding")
        ]
        assert means == pytest.approx([0.25, 0.5, 1.0])

    @pytest.mark.parametrize("target", ["base", "demonstration"])
    def test_padding_does_not_matter(self, make_policy, make_batch, target):
        policy = make_policy(action_dim=20, train_delta_expert=True, delta_target=target)
        torch.nn.init.normal_(policy.model.delta_action_out_proj.weight, std=0.5)
        batch = make_batch(policy)
        batch["action_is_pad"][:, 40:] = True
        batch[DIMENSION_PADDING["action"]] = (torch.arange(20) >= 16).expand(3, -1)
        batch[BASE_CHUNKS] = torch.nn.functional.pad(0.3 * NOISE[:, None, :, :16], (0, 16))
        expected, _ = policy.forward(batch, noise=NOISE, time=TIME)
        batch["action"] = batch["action"].clone()
        batch["action"][:, 40:] = torch.nan
        batch["action"][:, :, 16:] = torch.nan
        loss, _ = policy.forward(batch, noise=NOISE, time=TIME)
        assert torch.equal(loss, expected)

    def test_reductions_agree_and_total_is_denoising_plus_weighted_vicreg(self, make_policy, make_batch):
        policy = make_policy(**DEMONSTRATION, use_cls_head=True, vicreg_weight=0.5).train()
        batch = make_batch(policy)
        batch[BASE_CHUNKS] = 0.3 * NOISE[:, None]
        mean, log = policy.forward(batch, noise=NOISE, time=TIME)
        each, _ = policy.forward(batch, noise=NOISE, time=TIME, reduction="none")
        assert each.mean().item() == pytest.approx(mean.item(), rel=1e-5)
        vicreg = 25 * log["vicreg_invariance"] + 25 * log["vicreg_variance"] + log["vicreg_covariance"]
        total = log["delta_losses_after_rm_padding"] + 0.5 * vicreg
        assert mean.item() == log["delta_loss"].item() == pytest.approx(total.item(), rel=1e-5)
        assert -1 <= log["cls_cosine"] <= 1
        assert log["vicreg_covariance"] >= log["vicreg_covariance_floor"] > 0

    def test_it_needs_neither_pictures_nor_the_base_where_both_are_given(self, make_policy, make_batch):
        policy = make_policy(**DEMONSTRATION, use_cls_head=True).train()
        batch = make_batch(policy)
        with torch.no_grad():
            tokens = policy.image_tokens(batch)
        batch[BASE_CHUNKS] = 0.3 * NOISE[:, None]
        expected, _ = policy.forward(batch, noise=NOISE, time=TIME)
        blind = {k: v for k, v in batch.items() if "pixels" not in k} | {IMAGE_TOKENS: tokens}
        assert torch.equal(policy.forward(blind, noise=NOISE, time=TIME)[0], expected)
        policy.model.expert.layers = None  # would fail if it were run
        assert torch.equal(policy.forward(blind, noise=NOISE, time=TIME)[0], expected)

    def test_validation_leaves_vicreg_out(self, make_policy, make_batch):
        policy = make_policy(**DEMONSTRATION, use_cls_head=True)
        loss, log = policy.forward(make_batch(policy, 1), reduction="none")
        assert loss.shape == (1,)
        assert "vicreg_invariance" not in log

    def test_a_batch_of_one_is_refused_and_a_small_one_warned_of_once(self, make_policy, make_batch, caplog):
        policy = make_policy(**DEMONSTRATION, use_cls_head=True).train()
        with pytest.raises(UsageError, match="at least 2 samples"):
            policy.forward(make_batch(policy, 1))
        with caplog.at_level(logging.WARNING):
            policy.forward(make_batch(policy, 4))
            policy.forward(make_batch(policy, 4))
        assert caplog.text.count("VICReg sees 4 samples") == 1
        assert "cls_expander_width is 128 for 4 samples at a time" in caplog.text

    def test_ages_and_draws_are_chosen_evenly_by_the_time(self):
        chance = _uniform(sample_time(20_000, torch.device("cpu"), torch.Generator().manual_seed(0)))
        counts = torch.zeros(4, 3)
        chance, first = _digit(chance, 4)
        _, second = _digit(chance, 3)
        counts.index_put_((first, second), torch.ones(len(first)), accumulate=True)
        assert (counts / len(first) - 1 / 12).abs().max() < 0.01
        assert _digit(torch.tensor([0.0, 1.0]), 5)[1].tolist() == [0, 4]

    def test_an_older_chunk_is_refined_from_the_newer_state_and_its_past_costs_nothing(
        self, make_policy, make_batch
    ):
        policy = make_policy(**DEMONSTRATION, delta_max_age=9, cls_noise_scale=0.0)
        batch = make_batch(policy)
        batch[BASE_CHUNKS] = torch.zeros(3, 1, 50, 32)
        batch[LATER_STATES] = torch.randn(3, 10, 16)
        batch[KNOWN_AGES] = torch.tensor([10, 10, 3])
        time = torch.full((3,), 0.9999)  # the oldest
        with torch.no_grad():
            expected = batch["action"].square()
            per_sample = torch.stack([expected[0, 9:].mean(), expected[1, 9:].mean(), expected[2, 2:].mean()])
            loss, _ = policy.forward(batch, noise=NOISE, time=time, reduction="none")
        assert torch.allclose(loss, per_sample, rtol=1e-5)


def toy(policy, batch, seed):
    """Demonstrations, and base chunks that miss them by an offset that depends on the state."""
    random = torch.Generator().manual_seed(seed)
    state = torch.randn(batch, 16, generator=random)
    slope = torch.linspace(0, 1, 50)[None, :, None]
    truth = torch.nn.functional.pad(0.5 * torch.randn(batch, 1, 16, generator=random) * slope, (0, 16))
    error = torch.nn.functional.pad(0.4 + 0.3 * torch.tanh(state)[:, None] * slope, (0, 16))
    width = policy.model.architecture.text.width
    return {
        "observation.state": state,
        "action": truth[..., :16],
        "action_is_pad": torch.zeros(batch, 50, dtype=torch.bool),
        IMAGE_TOKENS: torch.zeros(batch, 2, width),
        "observation.language.tokens": torch.ones(batch, 3, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(batch, 3, dtype=torch.bool),
        BASE_CHUNKS: (truth + error)[:, None],
    }


@pytest.mark.parametrize("refine_steps", [1, 2])
def test_a_systematic_error_of_the_base_is_learnt_and_taken_away(make_policy, refine_steps):
    from kuavo_smolvla_ros.policy.delta_expert import read_context, refine

    policy = make_policy(
        **DEMONSTRATION, delta_refine_steps=refine_steps, delta_num_layers=2, optimizer_lr=3e-3
    ).train()
    optimizer = torch.optim.AdamW(policy.get_optim_params())
    losses = []
    for step in range(60):
        loss, _ = policy.forward(toy(policy, 32, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])
    fresh = toy(policy, 32, 10_000)
    base = fresh[BASE_CHUNKS][:, 0]
    with torch.no_grad():
        context = read_context(policy.model, policy.context(fresh, fresh[IMAGE_TOKENS]))
        age = torch.zeros(32, dtype=torch.long)
        movable = (torch.arange(32) < 16)[None, None]
        better = refine(policy.model, context, base, policy._state(fresh), age, refine_steps, movable)
    before = (base[..., :16] - fresh["action"]).abs().mean()
    after = (better[..., :16] - fresh["action"]).abs().mean()
    assert after < before / 2, (before, after)
    assert torch.equal(better[..., 16:], base[..., 16:])


@pytest.fixture
def refiner(make_policy):
    policy = make_policy(**DEMONSTRATION, delta_refine_steps=2, delta_max_age=8)
    torch.nn.init.normal_(policy.model.delta_action_out_proj.weight, std=0.3)
    return policy


class TestRefining:
    def test_it_changes_the_chunk_and_nothing_a_robot_does_not_have(self, refiner, make_batch):
        batch = make_batch(refiner)
        chunk = refiner.predict_action_chunk(batch, NOISE)
        base = refiner.refinable.chunk
        assert chunk.shape == (3, 50, 16)
        assert not torch.allclose(chunk, base[..., :16], atol=1e-3)
        assert base[..., 16:].abs().max() == 0

    def test_what_is_being_executed_stays(self, refiner, make_batch):
        batch = make_batch(refiner)
        before = refiner.predict_action_chunk(batch, seed=1)
        chunk = refiner.predict_action_chunk(batch, NOISE, prefix=before[:, 8:], delay=4)
        base = refiner.refinable.chunk[..., :16]
        assert torch.equal(chunk[:, :4], base[:, :4])
        assert not torch.equal(chunk[:, 4:], base[:, 4:])

    def test_at_once_and_later_agree_where_nothing_has_happened(self, refiner, make_batch):
        batch = make_batch(refiner)
        chunk = refiner.predict_action_chunk(batch, NOISE)
        assert torch.equal(refine_rest(refiner, batch["observation.state"], 0), chunk)

    def test_the_past_stays_and_the_rest_follows_the_new_state(self, refiner, make_batch):
        batch = make_batch(refiner)
        refiner.predict_action_chunk(batch, NOISE)
        base = refiner.refinable.chunk[..., :16]
        one = refine_rest(refiner, batch["observation.state"], 5)
        other = refine_rest(refiner, batch["observation.state"] + 0.5, 5)
        assert torch.equal(one[:, :5], base[:, :5])
        assert not torch.allclose(one[:, 5:], other[:, 5:], atol=1e-4)
        assert torch.equal(
            refine_rest(refiner, batch["observation.state"], 5), one
        )  # from the base each time

    def test_neither_pictures_nor_language_are_looked_at_again(self, refiner, make_batch, monkeypatch):
        batch = make_batch(refiner)
        refiner.predict_action_chunk(batch, NOISE)
        for stage in ("context", "image_tokens", "prefill", "expert_cache"):
            monkeypatch.setattr(refiner, stage, None)
        refine_rest(refiner, batch["observation.state"], 1)

    @pytest.mark.parametrize(
        ("age", "complaint"), [(9, "9 steps old; .* delta_max_age = 8"), (-1, "-1 steps")]
    )
    def test_ages_it_was_not_trained_for_are_refused(self, refiner, make_batch, age, complaint):
        batch = make_batch(refiner)
        refiner.predict_action_chunk(batch, NOISE)
        with pytest.raises(DeltaError, match=complaint):
            refine_rest(refiner, batch["observation.state"], age)

    def test_without_a_chunk_there_is_nothing_to_refine(self, refiner, make_policy, make_batch):
        batch = make_batch(refiner)
        with pytest.raises(DeltaError, match="no chunk to refine"):
            refine_rest(refiner, batch["observation.state"], 0)
        refiner.predict_action_chunk(batch, NOISE)
        refiner.reset()
        with pytest.raises(DeltaError, match="no chunk to refine"):
            refine_rest(refiner, batch["observation.state"], 0)
        plain = make_policy()
        plain.predict_action_chunk(batch, NOISE)
        with pytest.raises(DeltaError, match="no chunk to refine"):
            refine_rest(plain, batch["observation.state"], 0)

    def test_another_number_of_robots_is_refused(self, refiner, make_batch):
        refiner.predict_action_chunk(make_batch(refiner), NOISE)
        with pytest.raises(UsageError, match="for 3 robots"):
            refine_rest(refiner, torch.zeros(2, 16), 0)

    def test_in_the_robots_units(self, refiner, tmp_path):
        refiner.config.robot_fingerprint = "0123abcd"
        refiner.save_pretrained(tmp_path / "refiner")
        runner = PolicyRunner.load(tmp_path / "refiner")
        picture = np.zeros((48, 64, 3), np.uint8)
        images = dict.fromkeys(runner.policy.config.cameras, picture)
        chunk = runner.chunk(images, np.zeros(16), "go", seed=0)
        assert np.array_equal(refine_remaining(runner, np.zeros(16), 0), chunk)
        assert refine_remaining(runner, np.ones(16), 6).shape == (44, 16)
        with pytest.raises(UsageError, match="not finite"):
            refine_remaining(runner, np.full(16, np.nan), 0)
        with pytest.raises(UsageError, match=r"needs \(16,\)"):
            refine_remaining(runner, np.zeros(15), 0)


def test_cls_tokens_for_analysis(make_policy, make_batch):
    policy = make_policy(**DEMONSTRATION, use_cls_head=True, num_cls_prefix=1, num_cls_suffix=3)
    seen, done = cls_tokens(policy, make_batch(policy), NOISE)
    assert (seen.shape, done.shape) == ((3, 1, 64), (3, 3, 24))
    without = make_policy(**DEMONSTRATION)
    with pytest.raises(DeltaError, match="no CLS head"):
        cls_tokens(without, make_batch(without), NOISE)


class TestTheNotesExamples:
    def test_training_step(self):
        """The design note's second example, with this package's names; the batch carries what ours needs."""
        config = KuavoSmolVLAConfig(
            train_delta_expert=True,
            use_cls_head=True,
            num_cls_prefix=2,
            num_cls_suffix=2,
            vicreg_weight=0.01,
            vicreg_lambda=25.0,
            vicreg_mu=25.0,
            vicreg_nu=1.0,
            cls_noise_scale=0.01,
            chunk_size=50,
            n_action_steps=50,
            max_state_dim=32,
            max_action_dim=32,
            backbone="tiny",
            device="cpu",
        )
        config.set_features(14, 14, {"camera0": (480, 640)})
        policy = KuavoSmolVLAPolicy(config)
        policy.train()
        batch = {
            "observation.images.camera0": torch.rand(4, 3, 480, 640),
            "observation.state": torch.randn(4, 14),
            "observation.language.tokens": torch.randint(0, 1000, (4, 48)),
            "observation.language.attention_mask": torch.ones(4, 48, dtype=torch.bool),
            "action": torch.randn(4, 50, 14),
            "action_is_pad": torch.zeros(4, 50, dtype=torch.bool),
        }
        loss, loss_dict = policy.forward(batch)
        loss.backward()
        assert torch.isfinite(loss)
        assert loss_dict["delta_loss"] == loss
        assert any(p.requires_grad and p.grad is not None for p in policy.parameters())

    def test_custom_weights_and_masks(self):
        z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
        loss = vicreg_loss(z1=z1, z2=z2, lambda_param=50.0, mu_param=10.0, nu_param=2.0, gamma=0.5)
        assert loss.ndim == 0
        masks = make_att_2d_masks_with_cls(
            pad_masks=torch.ones(2, 60, dtype=torch.bool),
            att_masks=torch.zeros(2, 60, dtype=torch.long),
            num_cls_prefix=2,
            num_cls_suffix=2,
            num_action_context=5,
        )
        assert masks.shape == (2, 60, 60)

    def test_without_cls_head(self, make_policy, make_batch):
        policy = make_policy(train_delta_expert=True, use_cls_head=False).train()
        loss, log = policy.forward(make_batch(policy, 1))
        assert loss == log["delta_losses_after_rm_padding"]

    def test_the_preprocessor_needs_nothing_new(self, make_policy, make_raw):
        policy = make_policy(train_delta_expert=True)
        before, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
        assert torch.isfinite(policy.forward(before(make_raw()))[0])
