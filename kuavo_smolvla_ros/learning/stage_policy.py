"""The policy a stage begins with: settings from the stage, facts from the data, weights from its start."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.adapters import add_adapter, restore_adapter
from kuavo_smolvla_ros.learning.chance import key_of
from kuavo_smolvla_ros.learning.checkpointing import STATE_FOLDER
from kuavo_smolvla_ros.learning.drift import stage_statistics
from kuavo_smolvla_ros.learning.predecessor import inherited_statistics
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sources import Facts
from kuavo_smolvla_ros.learning.stage import Stage, StageError
from kuavo_smolvla_ros.policy.build import NETWORK_PREFIX, WEIGHTS_FILE, read_policy_weights
from kuavo_smolvla_ros.policy.checkpoint import fetch_folder
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.robot.spec import load_spec

logger = logging.getLogger(__name__)


def robot_fingerprint(facts: Facts, robot: str | None) -> str | None:
    """Whose policy it will be: what the data say, or the given robot where they say nothing."""
    if robot is None:
        if facts.fingerprint is None:
            logger.warning(
                "the data sets do not say which robot they are from, so the checkpoint will run on none; "
                "name it: run.robot=kuavo_sim"
            )
        return facts.fingerprint
    spec = load_spec(robot)
    for what, ours, theirs in (
        ("state", spec.state_names, facts.state_names),
        ("action", spec.action_names, facts.action_names),
        ("cameras", tuple(sorted(spec.cameras)), tuple(sorted(facts.cameras))),
    ):
        if ours != theirs:
            raise UserError(
                f"run.robot={robot} has the {what} {', '.join(ours)}, the data have {', '.join(theirs)}"
            )
    if facts.fingerprint not in (None, spec.fingerprint):
        raise UserError(
            f"the data were recorded on the robot with fingerprint {facts.fingerprint}, run.robot={robot} "
            f"has "
            f"{spec.fingerprint}; leave run.robot away, or convert the data with that description"
        )
    return spec.fingerprint


def stage_config(
    stage: Stage, facts: Facts, device: str, robot: str | None, init_from: str | None = None
) -> KuavoSmolVLAConfig:
    """The policy's configuration for a stage and its data."""
    config = stage.policy_config(
        device=device, robot_fingerprint=robot_fingerprint(facts, robot), init_from=init_from
    )
    if stage.training.precision == "no":
        config.compute_dtype = "float32"  # or it would choose bfloat16 on a GPU by itself
    config.set_features(len(facts.state_names), len(facts.action_names), dict(facts.cameras))
    config.state_names, config.action_names = list(facts.state_names), list(facts.action_names)
    return config


def begin_policy(
    stage: Stage, manager: ReplayDatasetManager, source: str | None, device: str, robot: str | None
) -> tuple[KuavoSmolVLAPolicy, Statistics | None]:
    """A policy at the stage's first step, and the statistics it inherited."""
    folder = None if source is None else fetch_folder(source)
    config = stage_config(stage, manager.facts, device, robot, None if folder is None else str(folder))
    inherited: Statistics | None = None
    if folder is not None:
        inherited = inherited_statistics(folder, manager.facts, config.robot_fingerprint)
    statistics = stage_statistics(manager.sources, inherited, config.std_floor)
    torch.manual_seed(key_of("weights", stage.training.seed) % 2**63)
    policy = KuavoSmolVLAPolicy(config, statistics=statistics)
    if stage.adapter is not None:
        add_adapter(policy.model, policy.freezing, stage.adapter)
    return policy, inherited


def resume_policy(last: Path, manager: ReplayDatasetManager, device: str) -> KuavoSmolVLAPolicy:
    """The policy of a checkpoint of the same stage."""
    policy = KuavoSmolVLAPolicy.from_pretrained(last, overrides={"device": device})
    expected = stage_statistics(manager.sources, policy.statistics, policy.config.std_floor)
    if policy.statistics is None or expected.sha256 != policy.statistics.sha256:
        raise StageError(
            f"{last} lacks statistics of some of the stage's dimensions; begin the stage anew (restart)"
        )
    if manager.stage.adapter is not None:
        add_adapter(policy.model, policy.freezing, manager.stage.adapter)
        restore_adapter(last / STATE_FOLDER, policy.model)
        policy.to(policy.config.device)
    return policy


def start_weights(stage: Stage, source: str | None) -> dict[str, Tensor]:
    """The weights a stage began with, under the policy's names; what `interpolate_previous` refers to."""
    if source is None:
        raise StageError(
            f"{stage.name} starts from random weights, so there is nothing to draw its result back to; set "
            "training.interpolate_previous to null"
        )
    weights = read_policy_weights(fetch_folder(source) / WEIGHTS_FILE)
    return {NETWORK_PREFIX + name: tensor.to(torch.float32) for name, tensor in weights.items()}
