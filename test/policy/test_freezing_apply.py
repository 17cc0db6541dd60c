"""A plan on real models: lerobot's SmolVLA and ours, small; and an encoder of 27 layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import nn

from kuavo_smolvla_ros.policy.architecture import Architecture, read_architecture
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.freezing import (
    FreezeSettings,
    FreezingError,
    apply_plan,
    count_parameters,
    format_table,
    num_vision_layers,
    parameter_groups,
    plan_freezing,
    set_train_mode,
)
from kuavo_smolvla_ros.policy.network import SmolVLANetwork, dead_parameter_names

LAYERS = "vlm_with_expert.vlm.model.vision_model.encoder.layers."
EMBEDDINGS = "vlm_with_expert.vlm.model.vision_model.embeddings."
POST_NORM = "vlm_with_expert.vlm.model.vision_model.post_layernorm."
STEPS = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny(cache: None) -> Architecture:
    return read_architecture(
        resolve_backbone("tiny").path,
        num_vlm_layers=16,
        expert_width_multiplier=0.75,
        self_attn_every_n_layers=2,
    )


@pytest.fixture
def make_stock(cache: None) -> Callable[[], SmolVLAPolicy]:
    """lerobot's own policy on the tiny backbone."""

    def make() -> SmolVLAPolicy:
        config = SmolVLAConfig(
            vlm_model_name=str(resolve_backbone("tiny").path),
            load_vlm_weights=False,
            resize_imgs_with_padding=(64, 64),
            chunk_size=8,
            n_action_steps=8,
            num_vlm_layers=4,
            device="cpu",
            input_features={
                "observation.state": PolicyFeature(FeatureType.STATE, (16,)),
                "observation.images.head_cam_h": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (16,))},
        )
        return SmolVLAPolicy(config)

    return make


@pytest.fixture
def stock_batch() -> dict[str, Any]:
    return {
        "observation.state": torch.randn(2, 16),
        "observation.images.head_cam_h": torch.rand(2, 3, 64, 64),
        "observation.language.tokens": torch.randint(3, 900, (2, 12)),
        "observation.language.attention_mask": torch.ones(2, 12, dtype=torch.bool),
        "action": torch.randn(2, 8, 16),
    }


def meta_network(architecture: Architecture) -> SmolVLANetwork:
    with torch.device("meta"):
        return SmolVLANetwork(architecture, 32, 32)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_prefix(names: set[str]) -> set[str]:
    return {name.removeprefix("model.") for name in names}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }


SETTINGS = {
    "last": FreezeSettings(unfreeze_vision_layers=[-1]),
    "first": FreezeSettings(freeze_vision_layers=[1, 2, 3]),
    "half": FreezeSettings(freeze_vision_ratio=0.5),
    "gap": FreezeSettings(unfreeze_vision_layers=[1, 3]),
    "expert_only": FreezeSettings(preset="expert_only"),
    "expert_without_state": FreezeSettings(train_expert_only=True, train_state_proj=False),
    "language_frozen": FreezeSettings(unfreeze_vision_layers=[-1], train_language_model=False),
    "vision_frozen": FreezeSettings(freeze_vision_encoder=True),
    "all": FreezeSettings(freeze_vision_encoder=False),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frozen_is_bit_exact_and_all_else_moves_ours(
    settings: FreezeSettings, make_policy: Callable[..., Any], make_batch: Callable[..., dict[str, Any]]
) -> None:
    policy = make_policy()
    policy.freezing = plan_freezing(settings, 4)
    apply_plan(policy.model, policy.freezing)
    batch = make_batch(policy)
    _train_and_check(policy, policy.model, policy.freezing, lambda: policy(batch)[0])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frozen_is_bit_exact_and_all_else_moves_lerobots(
    settings: FreezeSettings, make_stock: Callable[[], SmolVLAPolicy], stock_batch: dict[str, Any]
) -> None:
    policy = make_stock()
    plan = plan_freezing(settings, num_vision_layers(policy))
    apply_plan(policy, plan)
    _train_and_check(policy, policy, plan, lambda: policy.forward(stock_batch)[0])


def _train_and_check(
    policy: nn.Module, model: nn.Module, plan: Any, loss: Callable[[], torch.Tensor]
) -> None:
    set_train_mode(policy, plan) if policy is model else policy.train()
    trained = trainable(model)
    before = bits(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan, 1e-3, 1e-4), weight_decay=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
        optimizer.step()
    after = bits(model)
    # Weight decay alone would move a parameter that the optimizer holds and no gradient reaches.
    assert {name for name in after if after[name] != before[name]} == trained
    parameters = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameters[name]) for name in trained}
    assert {id(p) for p in optimizer.state} == held


def test_what_trains_is_the_same_set_of_names_in_lerobots_model_and_ours(
    make_stock: Callable[[], SmolVLAPolicy], tiny: Architecture
) -> None:
    stock, ours = make_stock(), meta_network(tiny)
    for settings in SETTINGS.values():
        plan = plan_freezing(settings, 4)
        apply_plan(stock, plan)
        apply_plan(ours, plan)
        assert without_prefix(trainable(stock)) == trainable(ours)
        assert count_parameters(stock, plan) == count_parameters(ours, plan)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_exact_names_that_train(settings: FreezeSettings, tiny: Architecture) -> None:
    """Written down a second time, from names alone."""
    model = meta_network(tiny)
    plan = plan_freezing(settings, 4)
    apply_plan(model, plan)
    expert_only = settings.train_expert_only or settings.preset == "expert_only"
    unfrozen = plan.unfrozen_layers

    def expected(name: str) -> bool:
        if name in dead_parameter_names(tiny):
            return False
        if name.startswith(LAYERS):
            return int(name.removeprefix(LAYERS).split(".")[0]) in unfrozen
        if name.startswith(EMBEDDINGS):
            return 0 in unfrozen
        if name.startswith(POST_NORM):
            return 3 in unfrozen
        if name.startswith("state_proj."):
            return settings.train_state_proj
        if name.startswith("vlm_with_expert.vlm.model.text_model."):
            return settings.train_language_model and not expert_only
        return not (name.startswith("vlm_with_expert.vlm.") and expert_only)

    assert trainable(model) == {name for name, _ in model.named_parameters() if expected(name)}


def test_plain_switches_train_what_lerobot_trains_apart_from_unused_weights(
    make_stock: Callable[[], SmolVLAPolicy], tiny: Architecture
) -> None:
    """lerobot's default set; and with everything on, all but what no output depends on."""
    stock = make_stock()
    by_lerobot = trainable(stock)
    apply_plan(stock, plan_freezing(FreezeSettings(train_expert_only=True), 4))
    assert trainable(stock) == by_lerobot
    apply_plan(stock, plan_freezing(FreezeSettings(freeze_vision_encoder=False), 4))
    everything = without_prefix({name for name, _ in stock.named_parameters()})
    assert without_prefix(trainable(stock)) == everything - dead_parameter_names(tiny)


def test_applying_twice_or_after_another_plan_gives_the_same(tiny: Architecture) -> None:
    model = meta_network(tiny)
    for settings in (SETTINGS["all"], SETTINGS["last"], SETTINGS["last"]):
        plan = plan_freezing(settings, 4)
        apply_plan(model, plan)
    fresh = meta_network(tiny)
    apply_plan(fresh, plan)
    assert trainable(model) == trainable(fresh)


def test_freezing_drops_a_gradient_that_was_there(make_policy: Callable[..., Any], make_batch: Any) -> None:
    policy = make_policy(freeze_vision_encoder=False, train_expert_only=False)
    policy(make_batch(policy))[0].backward()
    layer = policy.model.vision.encoder.layers[0]
    assert layer.mlp.fc1.weight.grad is not None
    apply_plan(policy.model, plan_freezing(SETTINGS["last"], 4))
    assert layer.mlp.fc1.weight.grad is None


# Modes


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_frozen_layers_stay_in_eval_mode_after_train(make_stock: Callable[[], SmolVLAPolicy]) -> None:
    policy = make_stock()
    plan = plan_freezing(SETTINGS["gap"], 4)
    apply_plan(policy, plan)
    policy.eval()
    set_train_mode(policy, plan)
    found = modes(policy)
    prefix = "model." + LAYERS
    for layer in range(4):
        below = {training for name, training in found.items() if f"{name}.".startswith(f"{prefix}{layer}.")}
        assert below == {layer in plan.unfrozen_layers}
    assert not found["model." + EMBEDDINGS.rstrip(".")]
    assert found["model." + POST_NORM.rstrip(".")]
    assert found[""]
    assert found["model.vlm_with_expert.lm_expert.layers.0"]
    assert found["model.vlm_with_expert.vlm.model.connector"]


def test_a_frozen_language_model_is_in_eval_mode_with_all_its_layers(
    make_stock: Callable[[], SmolVLAPolicy],
) -> None:
    policy = make_stock()
    plan = plan_freezing(SETTINGS["expert_without_state"], 4)
    apply_plan(policy, plan)
    set_train_mode(policy, plan)
    found = modes(policy)
    assert not any(training for name, training in found.items() if ".vlm." in f"{name}.")
    assert not found["model.state_proj"]
    assert found["model.action_in_proj"]


def test_our_policy_keeps_modes_through_train_and_eval(make_policy: Callable[..., Any]) -> None:
    policy = make_policy(unfreeze_vision_layers=[-1], train_expert_only=False)
    policy.train()
    training = modes(policy.model)
    assert [training[f"{LAYERS}{i}"] for i in range(4)] == [False, False, False, True]
    policy.eval()
    assert not any(modes(policy.model).values())
    policy.train()
    assert modes(policy.model) == training


def test_eval_mode_is_eval_mode_everywhere(make_stock: Callable[[], SmolVLAPolicy]) -> None:
    policy = make_stock()
    plan = plan_freezing(SETTINGS["all"], 4)
    set_train_mode(policy, plan)
    set_train_mode(policy, plan, mode=False)
    assert not any(modes(policy).values())


def test_a_module_without_parameters_follows_what_it_is_part_of() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.dropout = nn.Dropout()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = Layer()
            self.trained = Layer()

    model = Model()
    plan = plan_freezing(FreezeSettings(), 12).with_extra({"frozen": False, "trained": True})
    set_train_mode(model, plan)
    assert not model.frozen.dropout.training
    assert model.trained.dropout.training


# Groups


def test_vision_has_its_own_rate_and_frozen_parameters_no_group(tiny: Architecture) -> None:
    model = meta_network(tiny)
    plan = plan_freezing(SETTINGS["last"], 4)
    apply_plan(model, plan)
    main, vision = parameter_groups(model, plan, lr=5e-5, vision_lr=5e-6)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (main["name"], main["lr"]) == ("main", 5e-5)
    assert (vision["name"], vision["lr"]) == ("vision", 5e-6)
    assert all("vision_model" in names[id(p)] for p in vision["params"])
    assert not any("vision_model" in names[id(p)] for p in main["params"])
    assert {names[id(p)] for p in (*main["params"], *vision["params"])} == trainable(model)
    order = [name for name, _ in model.named_parameters()]
    assert [names[id(p)] for p in main["params"]] == [
        name for name in order if name in trainable(model) and "vision_model" not in name
    ]


def test_without_vision_there_is_one_group_and_without_a_rate_they_share_one(tiny: Architecture) -> None:
    model = meta_network(tiny)
    plan = plan_freezing(SETTINGS["expert_only"], 4)
    apply_plan(model, plan)
    assert [group["name"] for group in parameter_groups(model, plan, 1e-4, 1e-6)] == ["main"]
    plan = plan_freezing(SETTINGS["last"], 4)
    apply_plan(model, plan)
    assert [group["lr"] for group in parameter_groups(model, plan, 1e-4)] == [1e-4, 1e-4]


def test_groups_before_the_plan_is_applied_are_refused(tiny: Architecture) -> None:
    with pytest.raises(FreezingError, match="apply the freezing plan"):
        parameter_groups(meta_network(tiny), plan_freezing(SETTINGS["last"], 4), 1e-4)


# Models that do not fit


def test_a_plan_for_another_encoder_is_refused(tiny: Architecture) -> None:
    with pytest.raises(FreezingError, match="for 12 vision layers, the model has 4"):
        apply_plan(meta_network(tiny), plan_freezing(FreezeSettings(preset="balanced"), 12))


def test_an_unknown_parameter_is_refused_unless_the_plan_names_it(tiny: Architecture) -> None:
    model = meta_network(tiny)
    model.delta_expert = nn.Linear(2, 2)
    plan = plan_freezing(SETTINGS["expert_only"], 4)
    with pytest.raises(FreezingError, match=r"delta_expert\.weight is no part of SmolVLA"):
        apply_plan(model, plan)
    apply_plan(model, plan.everything_frozen().with_extra({"delta_expert": True}))
    assert trainable(model) == {"delta_expert.weight", "delta_expert.bias"}
    apply_plan(model, plan.with_extra({"delta_expert": False}))
    assert not any(name.startswith("delta_expert") for name in trainable(model))


def test_a_part_that_the_model_lacks_is_refused(tiny: Architecture) -> None:
    model = meta_network(tiny)
    plan = plan_freezing(SETTINGS["expert_only"], 4)
    with pytest.raises(FreezingError, match="no parameters in delta_expert"):
        apply_plan(model, plan.with_extra({"delta_expert": True}))
    del model.vlm_with_expert.vlm.model.connector
    with pytest.raises(FreezingError, match="no parameters in connector"):
        apply_plan(model, plan)


def test_something_that_is_no_smolvla_is_refused() -> None:
    with pytest.raises(FreezingError, match="no part of SmolVLA"):
        apply_plan(nn.Linear(2, 2), plan_freezing(FreezeSettings(), 12))
    with pytest.raises(FreezingError, match="numbered"):
        num_vision_layers(nn.Linear(2, 2))


# 27 layers


@pytest.mark.parametrize(
    ("settings", "unfrozen"),
    [
        (FreezeSettings(unfreeze_vision_layers=list(range(-1, -10, -1))), range(18, 27)),
        (FreezeSettings(freeze_vision_ratio=0.33), range(9, 27)),
        (FreezeSettings(preset="balanced"), range(7, 27)),
    ],
)
def test_an_encoder_of_27_layers(tiny: Architecture, settings: FreezeSettings, unfrozen: range) -> None:
    """Shaped like SigLIP so400m (27 layers, patches of 14), narrow."""
    vision = replace(tiny.vision, layers=27, width=72, heads=4, mlp_width=272, image_size=112, patch_size=14)
    model = meta_network(replace(tiny, vision=vision))
    plan = plan_freezing(settings, num_vision_layers(model))
    apply_plan(model, plan)
    layers = {int(n.removeprefix(LAYERS).split(".")[0]) for n in trainable(model) if n.startswith(LAYERS)}
    assert layers == set(unfrozen)
    assert f"unfrozen {len(unfrozen)}/27" in format_table(plan)


# The log


def test_table_states_layers_counts_and_warnings(tiny: Architecture) -> None:
    model = meta_network(tiny)
    plan = plan_freezing(FreezeSettings(unfreeze_vision_layers=[0, 2]), 4)
    apply_plan(model, plan)
    counts = count_parameters(model, plan)
    table = format_table(plan, counts)
    assert "vision encoder of 4 layers, by unfreeze_vision_layers" in table
    assert "frozen   2/4: 1, 3" in table
    assert "unfrozen 2/4: 0, 2" in table
    assert "warning: frozen above the trained layer 0: 1, 3" in table
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (line,) = [line for line in table.splitlines() if line.startswith("total")]
    assert line.split()[1:] == [f"{total:,}", f"{trained:,}", f"{total - trained:,}"]
    assert (sum(c.total for c in counts), sum(c.trained for c in counts)) == (total, trained)
