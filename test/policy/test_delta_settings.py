"""Settings of the delta expert that make no sense are refused where they are written."""

from __future__ import annotations

import math

import pytest

from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.delta_network import read_layers, trained_parts
from kuavo_smolvla_ros.policy.delta_settings import EXTRAS_OFF, DeltaError


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"use_cls_head": True}, "there is no delta expert: set train_delta_expert to true, or use_cls_head"),
        ({"delta_refine_steps": 1}, "delta_refine_steps is 1, but there is no delta expert"),
        ({"train_delta_expert": "yes"}, "it is true or false"),
        ({"train_delta_expert": True, "num_cls_prefix": 0}, "num_cls_prefix is 0; .* at least 1"),
        ({"train_delta_expert": True, "num_cls_suffix": 1.5}, "num_cls_suffix is 1.5"),
        ({"train_delta_expert": True, "num_action_context": 0}, "num_action_context is 0"),
        ({"train_delta_expert": True, "num_action_context": 51}, "a chunk has 50 actions"),
        ({"train_delta_expert": True, "delta_target": "truth"}, "one of base, demonstration"),
        ({"train_delta_expert": True, "cls_noise_scale": -0.1}, "cls_noise_scale is -0.1"),
        ({"train_delta_expert": True, "vicreg_weight": math.nan}, "vicreg_weight is nan"),
        ({"train_delta_expert": True, "vicreg_mu": math.inf}, "vicreg_mu is inf"),
        ({"train_delta_expert": True, "cls_noise_scale": 0.0}, "nothing to undo"),
        ({"train_delta_expert": True, "delta_refine_steps": True}, "delta_refine_steps is True"),
        ({"train_delta_expert": True, "delta_max_age": 50}, "is over by then"),
        ({"train_delta_expert": True, "delta_num_layers": 0}, "delta_num_layers is 0"),
        ({"train_delta_expert": True, "delta_width_multiplier": 0.0}, "must be positive"),
        ({"train_delta_expert": True, "cls_expander_width": 0}, "cls_expander_width is 0"),
    ],
)
def test_refused_when_the_configuration_is_made(fields, complaint):
    with pytest.raises(DeltaError, match=complaint):
        KuavoSmolVLAConfig(**fields)


def test_no_noise_is_fine_towards_the_demonstration():
    KuavoSmolVLAConfig(train_delta_expert=True, delta_target="demonstration", cls_noise_scale=0.0)


def test_the_notes_own_values_are_the_defaults():
    settings = KuavoSmolVLAConfig().delta
    assert (settings.num_cls_prefix, settings.num_cls_suffix, settings.num_action_context) == (2, 2, 5)
    assert (settings.vicreg_weight, settings.vicreg_lambda, settings.vicreg_mu, settings.vicreg_nu) == (
        0.01,
        25.0,
        25.0,
        1.0,
    )
    assert (settings.cls_noise_scale, settings.delta_target, settings.delta_refine_steps) == (0.01, "base", 0)
    assert trained_parts(settings) == ()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"delta_num_layers": 5}, "delta_num_layers is 5; .* there are 4"),
        ({"delta_width_multiplier": 0.02}, "makes the delta expert 1 wide"),
    ],
)
def test_refused_when_the_backbone_is_known(make_policy, fields, complaint):
    with pytest.raises(DeltaError, match=complaint):
        make_policy(train_delta_expert=True, **fields)


@pytest.mark.parametrize(("count", "expected"), [(1, (3,)), (2, (1, 3)), (3, (0, 1, 3)), (4, (0, 1, 2, 3))])
def test_text_layers_are_read_evenly_up_to_the_last(make_policy, count, expected):
    policy = make_policy(train_delta_expert=True, delta_num_layers=count)
    assert read_layers(policy.model.architecture, policy.config.delta) == expected == policy.model.read_layers


def test_extras_off_is_enough_to_be_without(make_config):
    config = make_config(train_delta_expert=True, use_cls_head=True, delta_refine_steps=2, delta_max_age=3)
    for name, value in EXTRAS_OFF.items():
        setattr(config, name, value)
    assert trained_parts(config.delta) == ()
