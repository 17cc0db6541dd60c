"""The delta expert's own computation: what it starts as, what sees what, and that the base stays as it is."""

from __future__ import annotations

import pytest
import torch

from kuavo_smolvla_ros.policy.cls_masks import make_att_2d_masks_with_cls
from kuavo_smolvla_ros.policy.delta_expert import displacement, observe, read_context
from kuavo_smolvla_ros.policy.delta_network import CLS_PARTS, EXPERT_PARTS, is_delta_name
from kuavo_smolvla_ros.policy.network import LM_HEAD
from kuavo_smolvla_ros.policy.numerics import (
    attend,
    fold_mask,
    gated_mlp,
    join_heads,
    rope_tables,
    rotate,
    split_heads,
)
from kuavo_smolvla_ros.policy.prefix import context_embeddings

NOISE = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_delta(make_policy):
    """A policy with a delta expert that does something: its last projection is not zero any more."""

    def make(**fields):
        policy = make_policy(**{"train_delta_expert": True, "use_cls_head": True, **fields})
        torch.nn.init.normal_(policy.model.delta_action_out_proj.weight, std=0.5)
        return policy

    return make


def looked(policy, batch, **changes):
    network = policy.model
    with torch.no_grad():
        context = changes.get("context") or policy.context(batch)
        return displacement(
            network,
            read_context(network, context),
            changes.get("chunk", 0.3 * NOISE),
            changes.get("time", torch.ones(3)),
            changes.get("state", policy._state(batch)),
            changes.get("age", torch.zeros(3, dtype=torch.long)),
            changes.get("num_action_context"),
        )


@pytest.mark.parametrize("cls", [False, True])
def test_exactly_these_train(make_policy, cls):
    policy = make_policy(train_delta_expert=True, use_cls_head=cls)
    trained = {
        n.removeprefix("model.").split(".")[0] for n, p in policy.named_parameters() if p.requires_grad
    }
    expected = {
        "delta_expert",
        "delta_action_in_proj",
        "delta_action_out_proj",
        "delta_action_time_mlp_in",
        "delta_action_time_mlp_out",
        "action_context_encoder",
    }
    if cls:
        expected |= {"pre_cls_param", "suf_cls_param", "obs_cls_proj", "act_cls_proj"}
    assert trained == expected == set(EXPERT_PARTS + (CLS_PARTS if cls else ()))
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == is_delta_name(name), name
    (group,) = policy.get_optim_params()
    assert {id(p) for p in group["params"]} == {id(p) for p in policy.model.delta_parameters().values()}


def test_all_of_them_get_a_gradient_and_nothing_else_does(make_delta, make_batch):
    policy = make_delta(delta_target="demonstration").train()
    loss, _ = policy.forward(make_batch(policy))
    loss.backward()
    assert {n for n, p in policy.model.named_parameters() if p.grad is not None} == set(
        policy.model.delta_parameters()
    )
    assert all(p.grad.abs().sum() > 0 for p in policy.model.delta_parameters().values())


def test_frozen_parts_stay_in_evaluation_mode_and_unchanged(make_delta, make_batch):
    policy = make_delta(delta_target="demonstration", optimizer_lr=1e-2).train()
    assert policy.model.delta_expert.training
    assert not any(m.training for m in policy.model.vlm_with_expert.modules())
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.get_optim_params(), weight_decay=0.1)
    batch = make_batch(policy)
    for _ in range(2):
        optimizer.zero_grad()
        policy.forward(batch)[0].backward()
        optimizer.step()
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_delta_name(name), name


@pytest.mark.parametrize("refine_steps", [0, 1, 3])
def test_a_fresh_one_leaves_the_bases_chunk_bit_for_bit(make_policy, make_batch, refine_steps):
    policy = make_policy(train_delta_expert=True, use_cls_head=True, delta_refine_steps=refine_steps)
    plain = make_policy()
    shared = {n: p for n, p in policy.model.state_dict().items() if not is_delta_name(n)}
    plain.model.load_state_dict(shared)
    batch = make_batch(plain)
    assert torch.equal(policy.predict_action_chunk(batch, NOISE), plain.predict_action_chunk(batch, NOISE))
    assert {LM_HEAD, *shared} == set(plain.model.state_dict())


def test_the_bases_chunk_does_not_depend_on_anything_of_it(make_delta, make_batch):
    policy = make_delta()
    batch = make_batch(policy)
    expected = policy.predict_action_chunk(batch, NOISE)
    with torch.no_grad():
        for parameter in policy.model.delta_parameters().values():
            parameter.add_(1.0)
    assert torch.equal(policy.predict_action_chunk(batch, NOISE), expected)


def test_cls_tokens_do_not_change_the_displacement(make_delta, make_batch):
    policy = make_delta()
    batch = make_batch(policy)
    without = looked(policy, batch)
    with_cls = looked(policy, batch, num_action_context=5)
    assert without.cls is None
    assert with_cls.cls.shape == (3, 2, 24)
    assert torch.allclose(with_cls.value, without.value, atol=1e-6)
    with torch.no_grad():
        policy.model.suf_cls_param.add_(5.0)
    again = looked(policy, batch, num_action_context=5)
    assert torch.equal(again.value, with_cls.value)
    assert not torch.allclose(again.cls, with_cls.cls)


def test_suffix_tokens_see_the_last_actions_only(make_delta, make_batch):
    policy = make_delta(delta_num_layers=1)  # with more layers, actions tell each other
    batch = make_batch(policy)
    first = looked(policy, batch, num_action_context=5)
    for step, same in ((44, True), (45, False), (49, False)):
        chunk = 0.3 * NOISE
        chunk[:, step] += 1.0
        other = looked(policy, batch, chunk=chunk, num_action_context=5)
        assert torch.equal(other.cls, first.cls) == same, step
        assert not torch.allclose(other.value, first.value)


def test_everything_it_is_given_matters(make_delta, make_batch):
    policy = make_delta()
    batch = make_batch(policy)
    base = looked(policy, batch).value
    other = {**batch, "observation.pixels": 0.5 * batch["observation.pixels"]}
    for what, value in (
        ("pictures", looked(policy, other).value),
        ("chunk", looked(policy, batch, chunk=0.1 * NOISE).value),
        ("time", looked(policy, batch, time=torch.full((3,), 0.5)).value),
        ("state", looked(policy, batch, state=policy._state(batch) + 0.5).value),
        ("age", looked(policy, batch, age=torch.full((3,), 7)).value),
    ):
        assert not torch.allclose(value, base, atol=1e-5), what


def test_language_padding_does_not_matter(make_delta, make_batch):
    policy = make_delta()
    batch = make_batch(policy)
    mask = batch["observation.language.attention_mask"]
    tokens = torch.where(mask, batch["observation.language.tokens"], 7)
    other = {**batch, "observation.language.tokens": tokens}
    assert torch.allclose(looked(policy, other).value, looked(policy, batch).value, atol=1e-6)


def test_prefix_tokens_are_those_of_one_sequence_with_the_mask(make_delta, make_batch):
    """The pass over cached keys equals a whole sequence in which the mask hides the CLS tokens from all
    others, and in which they take no positions.
    """
    policy = make_delta()
    batch, network, sizes = make_batch(policy), policy.model, policy.model.architecture.text
    with torch.no_grad():
        context = policy.context(batch)
        tokens, mask = (batch[f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
        embedded, valid = context_embeddings(network, policy.image_tokens(batch), tokens, mask)
        count = len(network.pre_cls_param)
        hidden = torch.cat((network.pre_cls_param.expand(3, -1, -1), embedded), dim=1)
        pad = torch.cat((torch.ones(3, count, dtype=torch.bool), valid), dim=1)
        positions = torch.cat((torch.zeros(3, count, dtype=torch.long), valid.long().cumsum(1) - 1), dim=1)
        allowed = make_att_2d_masks_with_cls(pad, torch.zeros_like(pad, dtype=torch.long), count, 0)
        allowed |= torch.eye(pad.shape[1], dtype=torch.bool)  # padding may look at itself, else NaN
        folded = fold_mask(allowed[:, None], sizes.heads // sizes.kv_heads)
        tables = rope_tables(positions, sizes.head_dim)
        for index, layer in enumerate(network.text.layers):
            inner = layer.input_layernorm(hidden)
            q, k, v = (
                split_heads(getattr(layer.self_attn, f"{name}_proj")(inner), sizes.head_dim) for name in "qkv"
            )
            q, k = rotate(q, tables), rotate(k, tables)
            real = valid[:, None, :, None]
            assert torch.allclose((k[:, :, count:] * real), (context.keys[index] * real), atol=1e-5)
            hidden = gated_mlp(layer, hidden + layer.self_attn.o_proj(join_heads(attend(q, k, v, folded))))
        expected = network.text.norm(hidden)[:, :count]
        assert torch.allclose(observe(network, context), expected, atol=1e-5)


def test_prefix_tokens_see_pictures_and_language_not_the_state(make_delta, make_batch):
    policy = make_delta()
    batch = make_batch(policy)
    with torch.no_grad():
        base = observe(policy.model, policy.context(batch))
        moved = {**batch, "observation.state": batch["observation.state"] + 1.0}
        assert torch.equal(observe(policy.model, policy.context(moved)), base)
        for key in ("observation.pixels", "observation.language.tokens"):
            other = {**batch, key: batch[key].flip(0)}
            assert not torch.allclose(observe(policy.model, policy.context(other)), base, atol=1e-6), key
