"""`KuavoSmolVLAConfig`: every choice about the policy, as lerobot reads, overrides and stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.architecture import Architecture
from kuavo_smolvla_ros.policy.delta_freezing import plan_delta
from kuavo_smolvla_ros.policy.delta_network import trained_parts
from kuavo_smolvla_ros.policy.delta_settings import DeltaSettings
from kuavo_smolvla_ros.policy.dimensions import ACTION, DEFAULT_STD_FLOOR, STATE
from kuavo_smolvla_ros.policy.freezing import FreezePlan, FreezeSettings, plan_freezing
from kuavo_smolvla_ros.policy.images import IMAGE_PREFIX, require_cameras
from kuavo_smolvla_ros.policy.language import PADDINGS, TASK_INSTRUCTIONS
from kuavo_smolvla_ros.policy.lerobot_adapter import (
    AdamWConfig,
    CosineDecayWithWarmupSchedulerConfig,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
    PreTrainedConfig,
)
from kuavo_smolvla_ros.policy.rtc import RTCSettings
from kuavo_smolvla_ros.policy.vision import POSITION_ID_MODES

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


class ConfigError(UserError):
    """The policy's configuration contradicts itself or the data."""


@PreTrainedConfig.register_subclass("kuavo_smolvla")
@dataclass
class KuavoSmolVLAConfig(PreTrainedConfig):
    """SmolVLA for Kuavo.

    Deliberately not derived from lerobot's `SmolVLAConfig`, whose subclasses silently get the stock
    processors; fields that mean the same have the same names.
    """

    # What goes in and out
    n_obs_steps: int = 1
    chunk_size: int = 50
    n_action_steps: int = 8
    max_state_dim: int = 32
    max_action_dim: int = 32
    # Camera names in prefix order; empty: those of the data set, which are then written down here.
    cameras: list[str] = field(default_factory=list)
    # Cameras the data may have and the policy does not look at.
    unused_cameras: list[str] = field(default_factory=list)
    resize_imgs_with_padding: tuple[int, int] | None = None  # (width, height); None: the backbone's own
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    std_floor: float = DEFAULT_STD_FLOOR  # in the units of the data (rad, gripper opening)

    # Language
    tokenizer_max_length: int = 48
    pad_language_to: str = "max_length"  # static shapes; "longest" is lerobot's default
    # Sentences that must fit, checked as soon as the tokenizer is at hand.
    instructions: list[str] = field(default_factory=lambda: list(TASK_INSTRUCTIONS.values()))
    # Names of the tasks trained on, each with its sentences, its own first; empty: the four tasks'.
    tasks: dict[str, list[str]] = field(default_factory=dict)

    # Network. `backbone` is a name, never a path of one machine; `architecture` is filled from it and stored.
    backbone: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    load_backbone_weights: bool = True  # where the backbone has any and no other weights are given
    init_from: str | None = None  # weights to start from: a folder or hub id of ours or of plain SmolVLA
    num_vlm_layers: int = 16
    expert_width_multiplier: float = 0.75
    self_attn_every_n_layers: int = 2
    architecture: Architecture | None = None

    # Numerics
    compute_dtype: str = "auto"  # parameters are always float32; "auto": bfloat16 autocast on CUDA
    vision_position_ids: str = "raster"  # "stock" repeats transformers 4.57 in float32
    pin_padding: bool = True  # padded action dimensions follow the line seen in training
    save_lm_head: bool = False

    # Inference
    num_steps: int = 10
    noise_scale: float = 1.0  # of the noise a chunk begins with; 0: always the same chunk, a likely one
    rtc_execution_horizon: int = 10
    rtc_max_guidance_weight: float = 10.0
    rtc_schedule: str = "LINEAR"

    # What is trained
    unfreeze_vision_layers: list[int] | None = None
    freeze_vision_layers: list[int] | None = None
    freeze_vision_ratio: float | None = None
    freeze_preset: str | None = None
    freeze_on_conflict: str = "error"  # "priority": the first of the above that is set, with a warning
    freeze_vision_encoder: bool = True
    train_expert_only: bool = True
    train_state_proj: bool = True
    train_language_model: bool = True  # false: frozen, while vision layers and the connector may train

    # Delta expert (docs/delta_expert.md): a second, small expert that refines the chunk of the frozen base.
    train_delta_expert: bool = False  # there is one, and nothing else trains
    delta_target: str = "base"  # undo the noise; "demonstration": correct the base towards what was shown
    delta_refine_steps: int = 0  # at run time; 0: the base's chunk as it is
    delta_max_age: int = 0  # steps; how old a chunk may be when it is refined from a newer state
    delta_num_layers: int = 4  # each reads one of the text layers
    delta_width_multiplier: float = 0.375  # of the language model's width
    cls_noise_scale: float = 0.01  # of the noise on the base's chunk in training, in normalised units
    use_cls_head: bool = False  # learned tokens for pictures and language and for actions, compared by VICReg
    num_cls_prefix: int = 2  # before the prefix; 1 to 4 make sense
    num_cls_suffix: int = 2  # behind the actions
    num_action_context: int = 5  # last actions that the tokens behind them see
    cls_expander_width: int = 128  # at most twice the samples of a batch
    vicreg_weight: float = 0.01  # of all three terms in the loss
    vicreg_lambda: float = 25.0  # invariance
    vicreg_mu: float = 25.0  # variance
    vicreg_nu: float = 1.0  # covariance

    optimizer_lr: float = 5e-5
    optimizer_vision_lr: float = 5e-6
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 5e-7
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1500
    scheduler_decay_steps: int = 25_000
    scheduler_decay_lr: float = 1e-6

    # Whose policy this is
    robot_fingerprint: str | None = None
    state_names: list[str] = field(default_factory=list)
    action_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_obs_steps != 1:
            raise ConfigError(f"n_obs_steps is {self.n_obs_steps}; the policy sees one observation")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ConfigError(
                f"n_action_steps is {self.n_action_steps}; it must lie between 1 and chunk_size "
                f"({self.chunk_size})"
            )
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}; at least one denoising step is needed")
        if not (math.isfinite(self.noise_scale) and self.noise_scale >= 0):
            raise ConfigError(f"noise_scale is {self.noise_scale}; it must be finite and not negative")
        for name, value, allowed in (
            ("compute_dtype", self.compute_dtype, COMPUTE_DTYPES),
            ("vision_position_ids", self.vision_position_ids, POSITION_ID_MODES),
            ("pad_language_to", self.pad_language_to, PADDINGS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; it is one of {', '.join(allowed)}")
        if not self.std_floor > 0:
            raise ConfigError(f"std_floor is {self.std_floor}; it must be positive")
        if len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"a camera is listed twice: {', '.join(self.cameras)}")
        _ = self.rtc
        _ = self.delta

    @property
    def delta(self) -> DeltaSettings:
        return DeltaSettings(**{name.name: getattr(self, name.name) for name in fields(DeltaSettings)})

    @property
    def rtc(self) -> RTCSettings:
        return RTCSettings(self.rtc_execution_horizon, self.rtc_max_guidance_weight, self.rtc_schedule)

    @property
    def freezing(self) -> FreezeSettings:
        return FreezeSettings(
            unfreeze_vision_layers=self.unfreeze_vision_layers,
            freeze_vision_layers=self.freeze_vision_layers,
            freeze_vision_ratio=self.freeze_vision_ratio,
            preset=self.freeze_preset,
            freeze_vision_encoder=self.freeze_vision_encoder,
            train_expert_only=self.train_expert_only,
            train_state_proj=self.train_state_proj,
            train_language_model=self.train_language_model,
            on_conflict=self.freeze_on_conflict,
        )

    def freeze_plan(self, num_vision_layers: int) -> FreezePlan:
        """What trains of a network with so many vision layers; with a delta expert, it alone."""
        if self.train_delta_expert:
            return plan_delta(self.freezing, num_vision_layers, trained_parts(self.delta))
        return plan_freezing(self.freezing, num_vision_layers)

    @property
    def widths(self) -> dict[str, int]:
        """Real widths of state and action, as far as the features are known."""
        features = {STATE: self.robot_state_feature, ACTION: self.action_feature}
        return {key: feature.shape[0] for key, feature in features.items() if feature is not None}

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) the pictures are brought to."""
        if self.resize_imgs_with_padding is not None:
            return self.resize_imgs_with_padding
        if self.architecture is None:
            raise ConfigError("the picture size is not known before the backbone has been read")
        side = self.architecture.vision.image_size
        return (side, side)

    def set_features(self, state_dim: int, action_dim: int, cameras: dict[str, tuple[int, int]]) -> None:
        """Describe the data: widths, and each camera's (height, width) in prefix order."""
        self.input_features = {STATE: PolicyFeature(FeatureType.STATE, (state_dim,))}
        for name, (height, width) in cameras.items():
            self.input_features[IMAGE_PREFIX + name] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
        self.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))}
        self.cameras = list(cameras)

    def validate_features(self) -> None:
        """Fail unless state, action and cameras are described, fit, and agree with `cameras`."""
        for key, limit in ((STATE, self.max_state_dim), (ACTION, self.max_action_dim)):
            if key not in self.widths:
                raise ConfigError(f"the data has no {key}; the policy needs it")
            if self.widths[key] > limit:
                raise ConfigError(f"{key} is {self.widths[key]} wide; the network takes at most {limit}")
        described = [key.removeprefix(IMAGE_PREFIX) for key in self.image_features]
        if not described:
            raise ConfigError(f"the data has no camera ({IMAGE_PREFIX}<name>); the policy needs at least one")
        if not self.cameras:
            self.cameras = [name for name in described if name not in self.unused_cameras]
        require_cameras(described, self.cameras, self.unused_cameras)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """As lerobot's, which reads the type from the file and therefore only works when called on its
        base class.
        """
        return PreTrainedConfig.from_pretrained(*args, **kwargs)

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None
