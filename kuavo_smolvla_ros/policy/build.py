"""From a configuration to a network with weights: sizes, random or backbone weights, foreign checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.architecture import Architecture, read_architecture
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.delta_network import DeltaNetwork, is_delta_name, trained_parts
from kuavo_smolvla_ros.policy.network import LM_HEAD, SmolVLANetwork

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VLM_PREFIX = "vlm_with_expert.vlm."
NETWORK_PREFIX = "model."


class WeightsError(UserError):
    """Weights do not fit the network."""


def ensure_architecture(config: KuavoSmolVLAConfig) -> Architecture:
    """The network's sizes; read from the backbone the first time and written into the configuration."""
    if config.architecture is None:
        config.architecture = read_architecture(
            resolve_backbone(config.backbone, weights=False).path,
            num_vlm_layers=config.num_vlm_layers,
            expert_width_multiplier=config.expert_width_multiplier,
            self_attn_every_n_layers=config.self_attn_every_n_layers,
        )
    config.architecture.image_tokens(*reversed(config.image_size))
    return config.architecture


def empty_network(config: KuavoSmolVLAConfig) -> SmolVLANetwork:
    """The network without memory behind its parameters, waiting for `load_network`."""
    with torch.device("meta"):
        return _network(config)


def _network(config: KuavoSmolVLAConfig) -> SmolVLANetwork:
    sizes = (ensure_architecture(config), config.max_state_dim, config.max_action_dim)
    return DeltaNetwork(*sizes, config.delta) if config.train_delta_expert else SmolVLANetwork(*sizes)


def new_network(config: KuavoSmolVLAConfig) -> SmolVLANetwork:
    """A network with random weights, over which the backbone's are laid where it has any."""
    network = _network(config)
    network.initialise()
    if config.load_backbone_weights:
        backbone = resolve_backbone(config.backbone)
        if backbone.pretrained:
            _load_backbone(network, backbone.path)
            logger.info("backbone weights read from %s", backbone.name)
    return network


def with_delta_of(
    config: KuavoSmolVLAConfig, weights: Mapping[str, Tensor], stored: KuavoSmolVLAConfig
) -> dict[str, Tensor]:
    """The weights of a checkpoint, `stored` being its configuration, with the delta expert `config` asks for.

    Parts the checkpoint never had begin afresh, parts that are not asked for are left out; the log says so.
    Parts it should have and has not remain missing.
    """
    wanted, had = trained_parts(config.delta), trained_parts(stored.delta)
    kept = {n: t for n, t in weights.items() if not is_delta_name(n) or n.split(".")[0] in wanted}
    if len(kept) < len(weights):
        left_out = sorted({name.split(".")[0] for name in weights.keys() - kept.keys()})
        logger.info("left out of the checkpoint, as configured: %s", ", ".join(left_out))
    absent = tuple(part for part in wanted if part not in had)
    if absent:
        network = empty_network(config)
        assert isinstance(network, DeltaNetwork)
        kept |= network.fresh(absent)
        logger.info("begun afresh, because the checkpoint has none: %s", ", ".join(absent))
    return kept


def load_network(network: SmolVLANetwork, weights: Mapping[str, Tensor]) -> bool:
    """Put weights under network names into place, all in float32; returns whether `lm_head` was among them.

    Every parameter must be there and nothing else may be; only the unused `lm_head` may be absent.
    """
    # Copied, because tensors read from a file are views of it: whoever rewrites the file would change the
    # policy.
    weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    wanted = dict(network.named_parameters())
    has_lm_head = LM_HEAD in weights
    if not has_lm_head:
        weights[LM_HEAD] = torch.zeros(wanted[LM_HEAD].shape)
    missing = sorted(wanted.keys() - weights.keys())
    unexpected = sorted(weights.keys() - wanted.keys())
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    for fault, names in (
        ("missing", missing),
        ("not known", unexpected),
        ("of another shape", sorted(misshapen)),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise WeightsError(
                f"{len(names)} parameters of the checkpoint are {fault}: {shown}. Was it made with another "
                f"backbone?"
            )
    network.load_state_dict(weights, assign=True)
    return has_lm_head


def read_policy_weights(file: Path) -> dict[str, Tensor]:
    """A policy's `model.safetensors` under network names (without the policy's own prefix)."""
    if not file.is_file():
        raise WeightsError(f"{file.parent} holds no {file.name}")
    return {name.removeprefix(NETWORK_PREFIX): tensor for name, tensor in load_file(file).items()}


def _load_backbone(network: SmolVLANetwork, folder: Path) -> None:
    weights = {VLM_PREFIX + name: tensor.to(torch.float32) for name, tensor in _read_shards(folder).items()}
    wanted = {name: p for name, p in network.named_parameters() if name.startswith(VLM_PREFIX)}
    if LM_HEAD not in weights:  # tied to the embeddings in the file, and unused here
        weights[LM_HEAD] = wanted[LM_HEAD].detach()
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise WeightsError(f"{folder} lacks {len(missing)} weights of the backbone, first {missing[0]}")
    network.load_state_dict({name: weights[name] for name in wanted}, strict=False)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS_FILE).is_file():
        return load_file(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise WeightsError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    shards = set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
    return {name: tensor for shard in sorted(shards) for name, tensor in load_file(folder / shard).items()}
