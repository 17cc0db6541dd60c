"""The only door to lerobot: base classes, processors, constants, under one roof and one version.

Everything else in this room is written against torch. When lerobot moves a name, this file follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import draccus
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    RenameObservationsProcessorStep,
    TransitionKey,
)
from lerobot.processor.converters import (
    policy_action_to_transition,
    transition_to_policy_action,
)
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor

__all__ = [
    "POLICY_POSTPROCESSOR_DEFAULT_NAME",
    "POLICY_PREPROCESSOR_DEFAULT_NAME",
    "AdamWConfig",
    "AddBatchDimensionProcessorStep",
    "CosineDecayWithWarmupSchedulerConfig",
    "DeviceProcessorStep",
    "FeatureType",
    "NormalizationMode",
    "PolicyFeature",
    "PolicyProcessorPipeline",
    "PreTrainedConfig",
    "PreTrainedPolicy",
    "ProcessorStep",
    "RenameObservationsProcessorStep",
    "TransitionKey",
    "decode_config",
    "make_plain_smolvla",
    "policy_action_to_transition",
    "transition_to_policy_action",
]


Config = TypeVar("Config", bound=PreTrainedConfig)


def decode_config(kind: type[Config], stored: Mapping[str, Any]) -> Config:
    """A configuration from its stored form. lerobot's own way builds a command line parser first: a second
    of work.
    """
    return draccus.decode(kind, {name: value for name, value in stored.items() if name != "type"})


def make_plain_smolvla(
    fields: dict[str, Any], statistics: dict[str, Tensor]
) -> tuple[PreTrainedConfig, tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]]:
    """lerobot's own SmolVLA configuration and processors, for a checkpoint written for it."""
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    stats: dict[str, dict[str, Tensor]] = {}
    for name, tensor in statistics.items():
        feature, kind = name.rsplit(".", 1)
        stats.setdefault(feature, {})[kind] = tensor
    config = SmolVLAConfig(**fields)
    return config, make_smolvla_pre_post_processors(config, stats)
