"""A checkpoint as one thing to ask: pictures, state and a sentence in, a chunk in the robot's units out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError, fetch_folder, require_robot
from kuavo_smolvla_ros.policy.dimensions import ACTION, STATE, normalise
from kuavo_smolvla_ros.policy.images import IMAGE_PREFIX
from kuavo_smolvla_ros.policy.lerobot_adapter import (
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
    PolicyProcessorPipeline,
    policy_action_to_transition,
    transition_to_policy_action,
)
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.steps import NormaliseVectors


class PolicyRunner:
    """A policy with its two pipelines."""

    def __init__(
        self,
        policy: KuavoSmolVLAPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
    ) -> None:
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        robot_fingerprint: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> PolicyRunner:
        """Load a checkpoint of ours; with a fingerprint, refuse one that was made for another robot."""
        folder = fetch_folder(checkpoint)
        changes = dict(overrides or {})
        if device is not None:
            changes["device"] = device
        policy = KuavoSmolVLAPolicy.from_pretrained(folder, overrides=changes)
        if robot_fingerprint is not None:
            require_robot(policy.config.robot_fingerprint, robot_fingerprint, what=str(checkpoint))
        if policy.statistics is None:
            raise CheckpointError(f"{checkpoint} has no normalisation statistics, so it cannot drive a robot")
        preprocessor = PolicyProcessorPipeline.from_pretrained(
            folder,
            f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json",
            overrides={"device_processor": {"device": policy.config.device}},
        )
        postprocessor = PolicyProcessorPipeline.from_pretrained(
            folder,
            f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json",
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        )
        _require_same_statistics(preprocessor, policy)
        return cls(policy, preprocessor, postprocessor)

    def chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        instruction: str,
        *,
        prefix: np.ndarray | None = None,
        delay: int = 0,
        execution_horizon: int | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """Actions (chunk_size, width) in robot units for one observation.

        `images` are RGB uint8, height x width x 3, by camera name. `prefix` (steps, width), in robot units,
        is the rest of the previous chunk from this observation's time on (`rtc.remaining_chunk`), `delay` the
        number of its steps that will have been executed when the new chunk arrives.
        """
        width = self.policy.config.widths[STATE]
        state = np.asarray(state, dtype=np.float32)
        if state.shape != (width,):
            raise UsageError(f"the state has shape {state.shape}, the policy needs ({width},)")
        if not np.isfinite(state).all():
            raise UsageError("the state holds values that are not finite")
        raw: dict[str, Any] = {STATE: torch.from_numpy(state), "task": instruction}
        for name, image in images.items():
            raw[IMAGE_PREFIX + name] = torch.from_numpy(np.ascontiguousarray(image))
        batch = self.preprocessor(raw)
        held = None
        if prefix is not None:
            prefix = np.asarray(prefix, dtype=np.float32)
            held = normalise(torch.from_numpy(prefix)[None], self.policy.statistics[ACTION])
        actions = self.policy.predict_action_chunk(
            batch, prefix=held, delay=delay, execution_horizon=execution_horizon, seed=seed
        )
        return self.postprocessor(actions)[0].numpy()


def _require_same_statistics(preprocessor: PolicyProcessorPipeline, policy: KuavoSmolVLAPolicy) -> None:
    steps = [step for step in preprocessor.steps if isinstance(step, NormaliseVectors)]
    if len(steps) != 1 or steps[0].statistics.sha256 != policy.statistics.sha256:
        raise CheckpointError(
            "the checkpoint's preprocessor does not normalise with the checkpoint's statistics; "
            "one of its files was replaced. Save it again, or restore the original folder"
        )
