"""The pipelines around the network, under the name by which lerobot looks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuavo_smolvla_ros.policy.build import ensure_architecture
from kuavo_smolvla_ros.policy.checkpoint import STATISTICS_FILE, fetch_folder, read_statistics
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import Statistics, StatisticsError
from kuavo_smolvla_ros.policy.lerobot_adapter import (
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    policy_action_to_transition,
    transition_to_policy_action,
)
from kuavo_smolvla_ros.policy.steps import (
    DenormaliseActions,
    NormaliseVectors,
    PrepareImages,
    TokenizeInstruction,
)

Pipelines = tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[Any, Any]]


def initial_statistics(
    config: KuavoSmolVLAConfig,
    dataset_stats: Mapping[str, Mapping[str, Any]] | None,
    stored: Statistics | None = None,
) -> Statistics | None:
    """The statistics a policy starts with, or None.

    Those it was stored with, or those of the checkpoint it is initialised from, extended (never replaced) by
    the data set's.
    """
    if stored is None and config.init_from is not None:
        folder = fetch_folder(config.init_from)
        if (folder / STATISTICS_FILE).is_file():
            stored = read_statistics(folder)
    if dataset_stats is None:
        return stored
    offered = Statistics.from_dataset(dataset_stats, config.widths, config.std_floor)
    return offered if stored is None else stored.extended_by(offered)


def make_kuavo_smolvla_pre_post_processors(
    config: KuavoSmolVLAConfig,
    dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    statistics: Statistics | None = None,
) -> Pipelines:
    """From a data set's or a camera's values to the network's input, and from its output to robot units.

    In: `observation.state`, `observation.images.<camera>` (uint8 or 0..1), `task`, and in training `action`.
    Statistics come from the data set or are given ready; without any this is an error.
    """
    config.validate_features()
    ensure_architecture(config)
    if statistics is None:
        statistics = initial_statistics(config, dataset_stats)
    if statistics is None:
        raise StatisticsError("no normalisation statistics: pass dataset_stats (dataset.meta.stats)")
    statistics.require(config.widths)
    tokenize = TokenizeInstruction(
        backbone=config.backbone,
        max_length=config.tokenizer_max_length,
        padding=config.pad_language_to,
        instructions=list(config.instructions),
    )
    # Reads the tokenizer, and with it checks the instructions, now rather than in the first batch.
    tokenize.state_dict()
    before = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
        steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            tokenize,
            DeviceProcessorStep(device=config.device),
            PrepareImages(list(config.cameras), config.image_size, list(config.unused_cameras)),
            NormaliseVectors(statistics=statistics, std_floor=config.std_floor),
        ],
        name=POLICY_PREPROCESSOR_DEFAULT_NAME,
    )
    after = PolicyProcessorPipeline[Any, Any](
        steps=[
            DenormaliseActions(statistics=statistics, std_floor=config.std_floor),
            DeviceProcessorStep(device="cpu"),
        ],
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
