"""Settings come from the robot's description, and a contradiction in them is found when they are made."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.control.settings import Settings, settings_for
from kuavo_smolvla_ros.robot.spec import load_spec, spec_names


@pytest.mark.parametrize("name", spec_names())
def test_every_shipped_robot_has_settings(name: str) -> None:
    spec = load_spec(name)
    settings = settings_for(spec)
    assert settings.chunk_names == spec.action_names
    assert settings.names == (*spec.action_names, *spec.hold_names)
    assert settings.fingerprint == spec.fingerprint
    assert settings.period_s == pytest.approx(1 / spec.command_rate_hz)
    assert len(settings.pose_names) == 14
    assert not any("gripper" in n or "base" in n for n in settings.pose_names)


def test_both_arms_stop_as_one_and_grippers_and_base_by_themselves() -> None:
    settings = settings_for(load_spec("kuavo_mobile"))
    by_name = dict(zip(settings.names, settings.groups, strict=True))
    assert by_name["zarm_l1_joint"] == by_name["zarm_r7_joint"] == "arms"
    assert by_name["left_gripper"] != by_name["right_gripper"]
    assert by_name["base_x"] != "arms"


def test_default_limits_leave_room_for_the_promise_on_a_dead_policy() -> None:
    settings = settings_for(load_spec("kuavo_sim"))
    at = settings.index(settings.pose_names)
    braking_s = float((settings.limits.velocity[at] / settings.limits.acceleration[at]).max())
    assert settings.policy_max_silence_s + settings.period_s + braking_s <= 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pose_names": ("elbow",)}, "elbow"),
        ({"measured_names": ("zarm_l1_joint", "zarm_l1_joint")}, "twice"),
        ({"chunk_names": ("unknown",)}, "unknown"),
        ({"groups": ("arms",)}, "groups"),
        ({"measured_names": ()}, "nobody measures"),
        ({"chunk_names": (), "measured_names": (), "pose_names": ()}, "no pose to keep"),
    ],
)
def test_contradictions_are_named(settings: Settings, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(settings, **change)


@pytest.mark.parametrize("name", [f.name for f in fields(Settings) if f.type == "float"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_every_bound_is_above_zero(settings: Settings, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(settings, **{name: value})


def test_an_unknown_bound_is_an_error() -> None:
    with pytest.raises(TypeError, match="ramp_abov"):
        settings_for(load_spec("kuavo_sim"), ramp_abov=0.1)
