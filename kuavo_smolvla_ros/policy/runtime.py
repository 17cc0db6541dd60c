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
    RenameObservationsProcessorStep,
    policy_action_to_transition,
    transition_to_policy_action,
)
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.sampler import SamplerOptions, make_sampler
from kuavo_smolvla_ros.policy.sampler_cameras import CameraTokens
from kuavo_smolvla_ros.policy.steps import NormaliseVectors, PrepareImages


class PolicyRunner:
    """A policy with its two pipelines."""

    def __init__(
        self,
        policy: KuavoSmolVLAPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
        *,
        fast: bool = True,
        options: SamplerOptions | None = None,
    ) -> None:
        """With `fast`, chunks are computed by `Sampler`, as `options` say, wherever it can; what it cannot
        compute, and everything without `fast`, takes the policy's own path.
        """
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.sampler = make_sampler(policy, options) if fast else None
        self._cameras: CameraTokens | None = None
        if self.sampler is not None:
            (images,) = (step for step in preprocessor.steps if isinstance(step, PrepareImages))
            self._cameras = CameraTokens(
                self.sampler, images.cameras, tuple(images.size), images.unused_cameras
            )
            self._renamed = {
                old.removeprefix(IMAGE_PREFIX): new.removeprefix(IMAGE_PREFIX)
                for step in preprocessor.steps
                if isinstance(step, RenameObservationsProcessorStep)
                for old, new in step.rename_map.items()
            }
            # All but the pictures, which the cameras' tokens stand for.
            self._without_images = PolicyProcessorPipeline(
                steps=[step for step in preprocessor.steps if step is not images], name=preprocessor.name
            )

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        robot_fingerprint: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        fast: bool = True,
        options: SamplerOptions | None = None,
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
        return cls(policy, preprocessor, postprocessor, fast=fast, options=options)

    def encode_camera(self, role: str, image: np.ndarray, stamp: int) -> bool:
        """Encode one camera's picture (RGB uint8, height x width x 3) as soon as it has arrived.

        The next chunk that is asked for with this stamp for this camera finds it done; any number will do
        that no other picture of the camera bears. Of each camera the newest picture is kept. Waits while a
        chunk is being computed. False: the plain path encodes nothing ahead.
        """
        if self._cameras is None:
            return False
        self._cameras.put(self._renamed.get(role, role), _tensor(image), stamp)
        return True

    def _rename(self, by_camera: Mapping[str, Any]) -> dict[str, Any]:
        return {self._renamed.get(name, name): value for name, value in by_camera.items()}

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
        stamps: Mapping[str, int] | None = None,
    ) -> np.ndarray:
        """Actions (chunk_size, width) in robot units for one observation.

        `images` are RGB uint8, height x width x 3, by camera name. `prefix` (steps, width), in robot units,
        is the rest of the previous chunk from this observation's time on (`rtc.remaining_chunk`), `delay` the
        number of its steps that will have been executed when the new chunk arrives. `stamps` say when the
        pictures were taken, by camera: one that `encode_camera` was given with the same stamp is not encoded
        again, nor looked at.
        """
        width = self.policy.config.widths[STATE]
        state = np.asarray(state, dtype=np.float32)
        if state.shape != (width,):
            raise UsageError(f"the state has shape {state.shape}, the policy needs ({width},)")
        if not np.isfinite(state).all():
            raise UsageError("the state holds values that are not finite")
        raw: dict[str, Any] = {STATE: torch.from_numpy(state), "task": instruction}
        pictures = {name: _tensor(image) for name, image in images.items()}
        held = None
        if prefix is not None:
            prefix = np.asarray(prefix, dtype=np.float32)
            held = normalise(torch.from_numpy(prefix)[None], self.policy.statistics[ACTION])
        how: dict[str, Any] = {
            "prefix": held,
            "delay": delay,
            "execution_horizon": execution_horizon,
            "seed": seed,
        }
        if self.sampler is None or self._cameras is None:
            raw |= {IMAGE_PREFIX + name: picture for name, picture in pictures.items()}
            actions = self.policy.predict_action_chunk(self.preprocessor(raw), **how)
        else:
            batch = self._without_images(raw)
            tokens = self._cameras.tokens(self._rename(pictures), self._rename(stamps or {}))
            actions = self.sampler.chunk(batch, image_tokens=tokens, **how)
        return self.postprocessor(actions)[0].numpy()


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image))


def _require_same_statistics(preprocessor: PolicyProcessorPipeline, policy: KuavoSmolVLAPolicy) -> None:
    steps = [step for step in preprocessor.steps if isinstance(step, NormaliseVectors)]
    if len(steps) != 1 or steps[0].statistics.sha256 != policy.statistics.sha256:
        raise CheckpointError(
            "the checkpoint's preprocessor does not normalise with the checkpoint's statistics; "
            "one of its files was replaced. Save it again, or restore the original folder"
        )
