"""`KuavoSmolVLAPolicy`: the network as lerobot, the training and the robot use it."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.build import (
    NETWORK_PREFIX,
    WEIGHTS_FILE,
    empty_network,
    load_network,
    new_network,
    read_policy_weights,
    with_delta_of,
)
from kuavo_smolvla_ros.policy.checkpoint import (
    fetch_folder,
    read_statistics,
    write_identity,
    write_statistics,
    write_weights,
)
from kuavo_smolvla_ros.policy.cls_masks import make_att_2d_masks_with_cls
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.delta_policy import IMAGE_TOKENS, Refinable, delta_forward, refined
from kuavo_smolvla_ros.policy.dimensions import (
    ACTION,
    ACTION_STEP_PADDING,
    DIMENSION_PADDING,
    STATE,
    Statistics,
    dimension_padding,
    pad_last,
)
from kuavo_smolvla_ros.policy.expert import ExpertCache, prepare_expert, velocity
from kuavo_smolvla_ros.policy.features import embed_features
from kuavo_smolvla_ros.policy.flow import euler, mix, sample_noise, sample_time
from kuavo_smolvla_ros.policy.freezing import (
    apply_plan,
    count_parameters,
    format_table,
    parameter_groups,
    set_train_mode,
)
from kuavo_smolvla_ros.policy.images import FEATURES, PIXELS, camera_images, prepare_pixels
from kuavo_smolvla_ros.policy.language import TOKEN_MASK, TOKENS
from kuavo_smolvla_ros.policy.lerobot_adapter import PreTrainedPolicy
from kuavo_smolvla_ros.policy.loss import first_values, flow_loss, valid_entries
from kuavo_smolvla_ros.policy.network import LM_HEAD
from kuavo_smolvla_ros.policy.plain_smolvla import read_config
from kuavo_smolvla_ros.policy.prefix import (
    KeyValues,
    append_state,
    context_embeddings,
    embed_images,
    run_context,
)
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import (
    initial_statistics,
    make_kuavo_smolvla_pre_post_processors,
)
from kuavo_smolvla_ros.policy.rtc import Guidance, make_guide
from kuavo_smolvla_ros.policy.vicreg import vicreg_loss

__all__ = ["ChunkRequest", "KuavoSmolVLAPolicy", "make_att_2d_masks_with_cls", "vicreg_loss"]

logger = logging.getLogger(__name__)


class ChunkRequest(NamedTuple):
    """State (B, padded width), noise (B, C, padded width), the correction of real-time chunking if a previous
    chunk is to be followed, and which action dimensions the network decides (None: all).
    """

    state: Tensor
    noise: Tensor
    guide: Guidance | None
    free: Tensor | None


class KuavoSmolVLAPolicy(PreTrainedPolicy):
    """SmolVLA with Kuavo's widths, freezing, honest losses and one statement about precision.

    Parameters are float32 whatever made them; computing follows `config.compute_dtype`. Batches come from the
    preprocessor (`make_kuavo_smolvla_pre_post_processors`): actions in and out are normalised.
    """

    config_class = KuavoSmolVLAConfig
    name = "kuavo_smolvla"

    def __init__(
        self,
        config: KuavoSmolVLAConfig,
        *,
        weights: Mapping[str, Tensor] | None = None,
        statistics: Statistics | None = None,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        if dataset_meta is not None:
            _take_names(config, dataset_meta)
        self.has_lm_head = True
        if weights is None and config.init_from is not None:
            folder = fetch_folder(config.init_from)
            stored = read_config(folder)
            weights = with_delta_of(config, read_policy_weights(folder / WEIGHTS_FILE), stored.config)
            if stored.plain:
                _warn_of_stand_in_tokenizer(config)
        if weights is None:
            if config.train_delta_expert:
                logger.warning(
                    "the delta expert will refine a base that nobody has trained for this robot; name "
                    "one with init_from"
                )
            self.model = new_network(config)
        else:
            self.model = empty_network(config)
            self.has_lm_head = load_network(self.model, weights)
        self.freezing = config.freeze_plan(len(self.model.vision.encoder.layers))
        apply_plan(self.model, self.freezing)
        logger.info("%s", format_table(self.freezing, count_parameters(self.model, self.freezing)))
        self.statistics = initial_statistics(config, dataset_stats, statistics)
        self.warned_of_small_batch = False
        self.reset()

    # Training

    def train(self, mode: bool = True) -> KuavoSmolVLAPolicy:
        """As in torch, except that frozen parts stay in evaluation mode."""
        super().train(mode)
        set_train_mode(self.model, self.freezing, mode)
        return self

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Parameter groups: vision layers at their own rate, frozen parameters in none."""
        return parameter_groups(
            self.model, self.freezing, self.config.optimizer_lr, self.config.optimizer_vision_lr
        )

    def forward(
        self,
        batch: Mapping[str, Any],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "mean",
        counted: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss over what was demonstrated, and numbers to log (tensors: nothing waits for
        them). With `counted` the loss is of the first so many values of an action; the network sees all.
        """
        if self.config.train_delta_expert:
            return delta_forward(self, batch, noise, time, reduction, counted)
        actions, valid = self._targets(batch)
        if noise is None:
            noise = sample_noise(tuple(actions.shape), actions.device)
        if time is None:
            time = sample_time(actions.shape[0], actions.device)
        sample = mix(actions, noise, time)
        with self._precision(actions.device):
            predicted = velocity(self.model, self.expert_cache(self.prefill(batch)), sample.noisy, time)
        loss = flow_loss(predicted, sample.target, first_values(valid, counted), reduction)
        return loss, {"loss": loss.detach().mean(), "valid_share": valid.to(torch.float32).mean()}

    # Inference

    def reset(self) -> None:
        """Forget the queued actions; to be called when an episode, or another instruction, begins."""
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)
        self.refinable: Refinable | None = None

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: Mapping[str, Any],
        noise: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        delay: int = 0,
        execution_horizon: int | None = None,
        context: KeyValues | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """A chunk (B, chunk_size, action width) in normalised units.

        `prefix` (B or 1, steps, width), normalised, is the not yet executed rest of the previous chunk,
        beginning at this observation; `delay` says how many of its steps will have been executed when this
        chunk arrives. `context` may be kept from `self.context(batch)` while pictures and instruction stay
        the same. The noise is `noise` as it stands, or drawn under `seed`, or freely, and scaled by
        `config.noise_scale`.
        """
        config = self.config
        request = self.chunk_request(batch, noise, prefix, delay, execution_horizon, seed)
        with self._precision(request.noise.device):
            context = self.context(batch) if context is None else context
            cache = self.expert_cache(self.prefill(batch, context))
            actions = euler(
                lambda x, time: velocity(self.model, cache, x, time),
                request.noise,
                config.num_steps,
                guide=request.guide,
                free=request.free,
            )
            if config.delta_refine_steps:
                actions = refined(self, batch, context, actions, held=0 if prefix is None else delay)
        return actions[:, :, : config.widths[ACTION]]

    def chunk_request(
        self,
        batch: Mapping[str, Any],
        noise: Tensor | None = None,
        prefix: Tensor | None = None,
        delay: int = 0,
        execution_horizon: int | None = None,
        seed: int | None = None,
    ) -> ChunkRequest:
        """What the walk from noise to actions needs besides the prefix; arguments as in
        `predict_action_chunk`.
        """
        config = self.config
        state = self._state(batch)
        batch_size, device = state.shape[0], state.device
        shape = (batch_size, config.chunk_size, config.max_action_dim)
        if noise is None:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            noise = config.noise_scale * sample_noise(shape, device, generator)
        elif tuple(noise.shape) != shape:
            raise UsageError(f"noise has shape {tuple(noise.shape)}, the policy needs {shape}")
        guide = None
        if prefix is not None:
            guide = make_guide(
                prefix.to(device).expand(batch_size, -1, -1),
                delay,
                config.rtc,
                chunk_size=config.chunk_size,
                padded_width=config.max_action_dim,
                num_steps=config.num_steps,
                execution_horizon=execution_horizon,
            )
        free = self._free_dimensions(batch, device) if config.pin_padding else None
        return ChunkRequest(state, noise.to(device, torch.float32), guide, free)

    @torch.no_grad()
    def select_action(self, batch: Mapping[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next action (B, width); a new chunk is computed after every `n_action_steps`."""
        batch_size = self._state(batch).shape[0]
        if self._queue and self._queue[0].shape[0] != batch_size:
            raise UsageError(
                f"{batch_size} observations, but the queued actions are for {self._queue[0].shape[0]}; "
                "call reset() when another episode begins"
            )
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    # Stages of the computation, for whoever caches them

    def image_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Prefix tokens of all cameras, (B, tokens, width); those a batch brings along are taken."""
        if IMAGE_TOKENS in batch:
            return batch[IMAGE_TOKENS]
        if FEATURES in batch:
            return embed_features(self.model, batch[FEATURES], self.freezing, self.config.image_size)
        return embed_images(self.model, self._pixels(batch), self.config.vision_position_ids)

    def context(self, batch: Mapping[str, Any], image_tokens: Tensor | None = None) -> KeyValues:
        """Keys and values of pictures and instruction; without gradient where all of it is frozen."""
        if image_tokens is None:
            image_tokens = self.image_tokens(batch)
        tokens, mask = (self._entry(batch, key) for key in (TOKENS, TOKEN_MASK))
        return run_context(self.model, *context_embeddings(self.model, image_tokens, tokens, mask))

    def prefill(self, batch: Mapping[str, Any], context: KeyValues | None = None) -> KeyValues:
        """Keys and values of the whole prefix: the context and the state."""
        context = self.context(batch) if context is None else context
        return append_state(self.model, context, self._state(batch))

    def expert_cache(self, prefix: KeyValues) -> ExpertCache:
        """What all denoising steps of one chunk share."""
        return prepare_expert(self.model, prefix, self.config.chunk_size)

    # Reading a batch

    def _entry(self, batch: Mapping[str, Any], key: str) -> Tensor:
        if key not in batch:
            raise UsageError(
                f"the batch has no {key!r}; run it through the policy's preprocessor first (it has "
                f"{', '.join(batch)})"
            )
        return batch[key]

    def _pixels(self, batch: Mapping[str, Any]) -> Tensor:
        if PIXELS in batch:
            return batch[PIXELS]
        cameras = self.config.cameras
        images = camera_images(batch, cameras, self.config.unused_cameras)
        return prepare_pixels(images, self.config.image_size, cameras)

    def _state(self, batch: Mapping[str, Any]) -> Tensor:
        state = self._entry(batch, STATE)
        if state.ndim == 3:  # a time axis of one
            state = state[:, -1]
        return pad_last(state.to(torch.float32), self.config.max_state_dim)

    def _targets(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        actions, width = self._entry(batch, ACTION), self.config.max_action_dim
        if actions.ndim != 3 or actions.shape[1] != self.config.chunk_size:
            raise UsageError(
                f"actions have shape {tuple(actions.shape)}, the policy needs (batch, "
                f"{self.config.chunk_size}, width)"
            )
        step_is_pad = self._entry(batch, ACTION_STEP_PADDING)
        if step_is_pad.dtype != torch.bool or step_is_pad.shape != actions.shape[:2]:
            raise UsageError(
                f"{ACTION_STEP_PADDING} must be boolean of shape {tuple(actions.shape[:2])}, "
                f"it is {step_is_pad.dtype} of shape {tuple(step_is_pad.shape)}"
            )
        valid = valid_entries(step_is_pad, dimension_padding(batch, ACTION, width))
        # Whatever stands in the padding must not reach the network either.
        return torch.where(valid, pad_last(actions.to(torch.float32), width), 0.0), valid

    def _free_dimensions(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        width = self.config.max_action_dim
        padding = batch.get(DIMENSION_PADDING[ACTION])
        if padding is not None:
            real = ~torch.nn.functional.pad(padding, (0, width - padding.shape[-1]), value=True)
            return real[:, None, :]
        return (torch.arange(width, device=device) < self.config.widths[ACTION])[None, None, :]

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        wanted = self.config.compute_dtype
        if wanted == "float32":
            return torch.autocast(device.type, enabled=False)
        if wanted == "bfloat16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        if torch.is_autocast_enabled(device.type):  # whoever trains has already decided
            return nullcontext()
        if device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    # Checkpoints

    def _save_pretrained(self, save_directory: Path) -> None:
        """Weights, configuration, processors, statistics and identity; each file is replaced in one step."""
        folder = Path(save_directory)
        if self.statistics is None:
            raise UserError(
                "the policy has no normalisation statistics, so its checkpoint could not be run; construct "
                "it with "
                "dataset_stats=..., or set policy.statistics (Statistics.identity(config.widths) for raw "
                "values)"
            )
        self.statistics.require(self.config.widths)
        if self.config.save_lm_head and not self.has_lm_head:
            raise UserError(
                "save_lm_head is set, but this policy was loaded from a checkpoint without lm_head"
            )
        weights = {
            NETWORK_PREFIX + name: tensor
            for name, tensor in self.model.state_dict().items()
            if name != LM_HEAD or self.config.save_lm_head
        }
        write_weights(folder / WEIGHTS_FILE, weights)
        write_statistics(folder, self.statistics)
        write_identity(
            folder,
            robot_fingerprint=self.config.robot_fingerprint,
            statistics=self.statistics,
            freezing=self.freezing.to_dict(),
        )
        for processor in make_kuavo_smolvla_pre_post_processors(self.config, statistics=self.statistics):
            processor.save_pretrained(folder)
        # Where these weights once came from is a path of one machine, and no longer needed.
        dataclasses.replace(self.config, init_from=None, pretrained_path=None).save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: KuavoSmolVLAConfig | None = None,
        overrides: Mapping[str, Any] | None = None,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        strict: bool = True,
        **hub: Any,
    ) -> KuavoSmolVLAPolicy:
        """A policy from a folder or hub id of ours or of plain SmolVLA, in evaluation mode.

        `overrides` replaces fields of the stored configuration (for example `{"backbone": "tiny"}`). Loading
        is always strict; the argument exists because lerobot passes it.
        """
        folder = fetch_folder(pretrained_name_or_path, **hub)
        stored = read_config(folder)
        if config is None:
            config = stored.config
        elif stored.plain and dataset_stats is not None and config.pretrained_path is not None:
            raise UsageError(
                f"{pretrained_name_or_path} is a plain SmolVLA checkpoint: lerobot would take its "
                f"processors, which cut "
                "long instructions and may lack statistics. Use --policy.init_from instead of "
                "--policy.pretrained_path"
            )
        if overrides:
            config = dataclasses.replace(config, **overrides)
        if config.architecture is None and not stored.plain:
            config.architecture = stored.config.architecture
        if stored.plain:
            _warn_of_stand_in_tokenizer(config)
        policy = cls(
            config,
            weights=with_delta_of(config, read_policy_weights(folder / WEIGHTS_FILE), stored.config),
            statistics=None if stored.plain else read_statistics(folder),
            dataset_stats=dataset_stats,
            dataset_meta=dataset_meta,
        )
        policy.to(config.device)
        return policy.eval()


def _warn_of_stand_in_tokenizer(config: KuavoSmolVLAConfig) -> None:
    if resolve_backbone(config.backbone, weights=False).stand_in_tokenizer:
        logger.warning(
            "the weights come from plain SmolVLA, but the backbone %s brings a tokenizer of its own: the "
            "network will "
            "not understand instructions. Good for tests and benchmarks only",
            config.backbone,
        )


def _take_names(config: KuavoSmolVLAConfig, dataset_meta: Any) -> None:
    """Remember the joints' names, so that a checkpoint can say which vector it speaks of."""
    for key, attribute in ((STATE, "state_names"), (ACTION, "action_names")):
        names = dataset_meta.features[key].get("names")
        if isinstance(names, dict):  # older data sets group them
            names = [name for group in names.values() for name in group]
        if names:
            setattr(config, attribute, list(names))
