"""Plain lerobot SmolVLA checkpoints: reading theirs, writing ours for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.checkpoint import (
    CONFIG_FILE,
    CheckpointError,
    atomic_folder,
    read_json,
    write_weights,
)
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.images import IMAGE_PREFIX
from kuavo_smolvla_ros.policy.lerobot_adapter import (
    FeatureType,
    PolicyFeature,
    decode_config,
    make_plain_smolvla,
)
from kuavo_smolvla_ros.policy.network import LM_HEAD

if TYPE_CHECKING:
    from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

# Fields that mean the same in both configurations.
COMMON_FIELDS = (
    "chunk_size",
    "n_action_steps",
    "max_state_dim",
    "max_action_dim",
    "resize_imgs_with_padding",
    "tokenizer_max_length",
    "num_steps",
    "num_vlm_layers",
    "expert_width_multiplier",
    "self_attn_every_n_layers",
    "freeze_vision_encoder",
    "train_expert_only",
    "train_state_proj",
)
# What this policy does not implement, with the values that mean "not used".
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "adapt_to_pi_aloha": (False,),
    "use_delta_joint_actions_aloha": (False,),
    "add_image_special_tokens": (False,),
    "empty_cameras": (0,),
    "attention_mode": ("cross_attn",),
    "prefix_length": (-1, 0),
    "min_period": (4e-3,),
    "max_period": (4.0,),
}


@dataclass(frozen=True)
class StoredConfig:
    """The configuration found in a checkpoint, and whether it was a plain SmolVLA's."""

    config: KuavoSmolVLAConfig
    plain: bool


def read_config(folder: Path) -> StoredConfig:
    """The configuration of a checkpoint of ours or of plain SmolVLA."""
    described = read_json(folder / CONFIG_FILE)
    kind = described.get("type")
    if kind == "kuavo_smolvla":
        return StoredConfig(decode_config(KuavoSmolVLAConfig, described), plain=False)
    if kind == "smolvla":
        return StoredConfig(_from_plain(described, folder), plain=True)
    raise CheckpointError(
        f"{folder} holds a policy of type {kind!r}; this one reads 'kuavo_smolvla' and 'smolvla'"
    )


def export_plain(policy: KuavoSmolVLAPolicy, folder: Path) -> None:
    """Write a checkpoint that lerobot's own SmolVLA loads.

    There, padded action dimensions are not pinned, an instruction that is too long is cut, and in float32 the
    vision position ids are those of transformers: expect small differences in the output.
    """
    if policy.statistics is None:
        raise CheckpointError("the policy has no normalisation statistics to export")
    config = policy.config
    if config.train_delta_expert:
        raise CheckpointError(
            "plain SmolVLA has no delta expert: load the checkpoint without it "
            "(from_pretrained(folder, overrides=delta_settings.EXTRAS_OFF)) and export that"
        )
    backbone = resolve_backbone(config.backbone)
    name = config.backbone if _is_hub_id(config.backbone) else str(backbone.path)
    fields = {field: getattr(config, field) for field in COMMON_FIELDS}
    fields["resize_imgs_with_padding"] = config.image_size
    fields["pad_language_to"] = config.pad_language_to
    fields["input_features"] = {
        key: feature
        for key, feature in config.input_features.items()
        if feature.type is not FeatureType.VISUAL or key.removeprefix(IMAGE_PREFIX) in config.cameras
    }
    for camera in config.cameras:  # lerobot takes cameras in the order of the features
        key = IMAGE_PREFIX + camera
        fields["input_features"][key] = fields["input_features"].pop(key)
    fields["output_features"] = config.output_features
    fields["device"] = config.device
    plain, processors = make_plain_smolvla(
        {**fields, "vlm_model_name": name, "load_vlm_weights": backbone.pretrained},
        policy.statistics.to_flat(),
    )
    weights = {
        name: tensor
        for name, tensor in policy.state_dict().items()
        if policy.has_lm_head or not name.endswith(LM_HEAD)
    }
    with atomic_folder(folder) as fresh:
        plain.save_pretrained(fresh)
        for processor in processors:
            processor.save_pretrained(fresh)
        write_weights(fresh / "model.safetensors", weights)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).expanduser().exists()


def _from_plain(described: dict[str, Any], folder: Path) -> KuavoSmolVLAConfig:
    for field, allowed in REQUIRED_VALUES.items():
        value = described.get(field, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{folder}: {field} is {json.dumps(value)}, which this policy does not implement"
            )
    layers = described.get("num_vlm_layers", 16)
    if described.get("num_expert_layers", -1) not in (-1, 0, layers):
        raise CheckpointError(
            f"{folder}: the expert has fewer layers than the language model; not implemented"
        )
    fields = {field: described[field] for field in COMMON_FIELDS if field in described}
    if fields.get("resize_imgs_with_padding") is not None:
        fields["resize_imgs_with_padding"] = tuple(fields["resize_imgs_with_padding"])
    config = KuavoSmolVLAConfig(
        **fields, backbone=described["vlm_model_name"], device=described.get("device"), instructions=[]
    )
    for name in ("input_features", "output_features"):
        features = {
            key: PolicyFeature(FeatureType(feature["type"]), tuple(feature["shape"]))
            for key, feature in (described.get(name) or {}).items()
        }
        setattr(config, name, features)
    return config
