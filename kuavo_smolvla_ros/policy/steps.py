"""Processor steps: what happens to a batch before and after the network, stored with every checkpoint.

The steps are stored by their import path, so a checkpoint's processors load wherever this package is
installed, without anything having been registered before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.dimensions import (
    ACTION,
    DEFAULT_STD_FLOOR,
    DIMENSION_PADDING,
    STATE,
    Statistics,
    StatisticsError,
    denormalise,
    normalise,
)
from kuavo_smolvla_ros.policy.images import FEATURES, IMAGE_PREFIX, PIXELS, camera_images, prepare_pixels
from kuavo_smolvla_ros.policy.language import TOKEN_MASK, TOKENS, InstructionTokenizer, check_instructions
from kuavo_smolvla_ros.policy.lerobot_adapter import ProcessorStep, TransitionKey

logger = logging.getLogger(__name__)

Transition = dict[TransitionKey, Any]


class FeaturePreservingStep(ProcessorStep):
    """A step that does not change which features there are."""

    def transform_features(self, features: Any) -> Any:
        return features


@dataclass
class TokenizeInstruction(FeaturePreservingStep):
    """The batch's `task` sentences to token ids; a sentence that does not fit is an error.

    The tokenizer is taken from the named backbone once, then stored as the step's state: a checkpoint can be
    used without the backbone.
    """

    backbone: str
    max_length: int
    padding: str
    instructions: list[str] = field(default_factory=list)
    _tokenizer: InstructionTokenizer | None = field(default=None, init=False, repr=False)

    @property
    def tokenizer(self) -> InstructionTokenizer:
        if self._tokenizer is None:
            self._use(InstructionTokenizer.from_folder(resolve_backbone(self.backbone, weights=False).path))
        assert self._tokenizer is not None
        return self._tokenizer

    def _use(self, tokenizer: InstructionTokenizer) -> None:
        check_instructions(tokenizer, self.instructions, self.max_length)
        self._tokenizer = tokenizer

    def __call__(self, transition: Transition) -> Transition:
        task = (transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get("task")
        if task is None:
            raise UsageError("the batch has no `task`: the policy acts on an instruction")
        ids, mask = self.tokenizer([task] if isinstance(task, str) else task, self.max_length, self.padding)
        observation = {**(transition.get(TransitionKey.OBSERVATION) or {}), TOKENS: ids, TOKEN_MASK: mask}
        return {**transition, TransitionKey.OBSERVATION: observation}

    def get_config(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone,
            "max_length": self.max_length,
            "padding": self.padding,
            "instructions": list(self.instructions),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.tokenizer.to_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._use(InstructionTokenizer.from_state(state))


@dataclass
class PrepareImages(FeaturePreservingStep):
    """The cameras' pictures, bound by name, to one tensor in prefix order."""

    cameras: list[str]
    size: tuple[int, int]
    unused_cameras: list[str] = field(default_factory=list)

    def __call__(self, transition: Transition) -> Transition:
        observation = transition.get(TransitionKey.OBSERVATION) or {}
        if FEATURES in observation:
            return transition
        images = camera_images(observation, self.cameras, self.unused_cameras)
        kept = {key: value for key, value in observation.items() if not key.startswith(IMAGE_PREFIX)}
        kept[PIXELS] = prepare_pixels(images, tuple(self.size), self.cameras)
        return {**transition, TransitionKey.OBSERVATION: kept}

    def get_config(self) -> dict[str, Any]:
        return {"cameras": self.cameras, "size": list(self.size), "unused_cameras": self.unused_cameras}


@dataclass
class _WithStatistics(FeaturePreservingStep):
    """Shared by both directions: statistics that, once stored, can be extended but not replaced.

    `stats`, `features` and `norm_map` are what lerobot's training passes when it continues from a checkpoint:
    the statistics of the data set at hand. They only serve for dimensions the checkpoint does not know.
    """

    stats: dict[str, dict[str, Any]] | None = None
    features: dict[str, Any] | None = None
    norm_map: dict[Any, Any] | None = None
    std_floor: float = DEFAULT_STD_FLOOR
    statistics: Statistics = field(default_factory=Statistics)

    def get_config(self) -> dict[str, Any]:
        return {"std_floor": self.std_floor}

    def state_dict(self) -> dict[str, Tensor]:
        return self.statistics.to_flat()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        stored = Statistics.from_flat(state)
        offered = self._offered()
        changed = stored.differs_on_known(offered)
        if changed:
            logger.warning(
                "keeping the checkpoint's normalisation statistics of %s; those of the data set differ and "
                "are not used",
                ", ".join(changed),
            )
        self.statistics = stored.extended_by(offered)

    def _offered(self) -> Statistics:
        if not self.stats:
            return Statistics()
        widths = {key: len(self.stats[key]["mean"]) for key in (STATE, ACTION) if key in self.stats}
        return Statistics.from_dataset(self.stats, widths, self.std_floor)

    def _of(self, key: str, width: int) -> Any:
        if key not in self.statistics:
            raise StatisticsError(
                f"no normalisation statistics for {key}: it would reach the network unscaled"
            )
        self.statistics.require({key: width})
        return self.statistics[key]


class NormaliseVectors(_WithStatistics):
    """State and action to deviations from their mean; padding stays zero."""

    _logged: bool = False

    def __call__(self, transition: Transition) -> Transition:
        observation = dict(transition.get(TransitionKey.OBSERVATION) or {})
        extra = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        result = {**transition, TransitionKey.OBSERVATION: observation}
        if STATE in observation:
            observation[STATE] = self._normalised(STATE, observation[STATE], observation)
        action = transition.get(TransitionKey.ACTION)
        if action is not None:
            result[TransitionKey.ACTION] = self._normalised(ACTION, action, extra)
        if not self._logged:
            self._log_first(result)
        return result

    def _normalised(self, key: str, value: Tensor, masks: dict[str, Any]) -> Tensor:
        return normalise(value, self._of(key, value.shape[-1]), masks.get(DIMENSION_PADDING[key]))

    def _log_first(self, transition: Transition) -> None:
        self._logged = True
        for key, value in (
            (STATE, transition[TransitionKey.OBSERVATION].get(STATE)),
            (ACTION, transition.get(TransitionKey.ACTION)),
        ):
            if value is not None:
                logger.info(
                    "first batch, normalised %s: mean %.2f, largest %.2f deviations",
                    key,
                    value.mean().item(),
                    value.abs().max().item(),
                )


class DenormaliseActions(_WithStatistics):
    """The network's actions back to the robot's units."""

    def __call__(self, transition: Transition) -> Transition:
        action = transition[TransitionKey.ACTION]
        return {**transition, TransitionKey.ACTION: denormalise(action, self._of(ACTION, action.shape[-1]))}


# lerobot-train overrides steps by the last component of their stored path, and knows these two under
# lerobot's names.
NormaliseVectors.__name__ = "normalizer_processor"
DenormaliseActions.__name__ = "unnormalizer_processor"
normalizer_processor = NormaliseVectors
unnormalizer_processor = DenormaliseActions
