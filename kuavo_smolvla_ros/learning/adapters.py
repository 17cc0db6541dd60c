"""LoRA in place of full training: the freezing plan says where something trains, the adapter says how.

In the parts and layers that train by the plan, the weights of the chosen modules stand still and small
matrices beside them train (peft). What leaves a stage is an ordinary checkpoint: the matrices are added to
their weights, so that the robot, the next stage and lerobot see a policy like any other. What continues a
stage is kept beside it (`training_state/adapter.safetensors`): the matrices, and the weights they stand
beside, because a sum cannot be taken apart again to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kuavo_smolvla_ros.learning.stage import Adapter, Stage, StageError
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError, write_weights
from kuavo_smolvla_ros.policy.freeze_plan import RULES
from kuavo_smolvla_ros.policy.freezing import FreezePlan, count_parameters, format_table, trained_names

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
BASE = ".base_layer."
LORA = ".lora_"
_NAME = "default"  # peft can hold several adapters in a module; here it is always one


def add_adapter(network: nn.Module, plan: FreezePlan, adapter: Adapter) -> None:
    """Put adapters beside the target modules of what trains, and let nothing else train but `adapter.full`.

    Works on a network without memory ("meta") too.
    """
    from peft import LoraConfig, inject_adapter_in_model

    planned = trained_names(network, plan)
    in_full = {name for name, part in planned.items() if part in adapter.full}
    unknown = sorted(set(adapter.full) - RULES.keys())
    if unknown:
        raise StageError(
            f"adapter.full names {', '.join(unknown)}, which is no part of the policy; parts are "
            f"{', '.join(RULES)}"
        )
    targets = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[-1] in adapter.target_modules
        and f"{name}.weight" in planned
        and f"{name}.weight" not in in_full
    ]
    found = {name.rsplit(".", 1)[-1] for name in targets}
    absent = sorted(set(adapter.target_modules) - found)
    if absent:
        raise StageError(
            f"adapter.target_modules names {', '.join(absent)}, but in what trains in this stage there is "
            f"no such linear layer; look at the freezing, or choose of {', '.join(_linear(network, planned))}"
        )
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=targets
    )
    empty = any(parameter.is_meta for parameter in network.parameters())
    inject_adapter_in_model(settings, network, low_cpu_mem_usage=empty)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(LORA in name or name in in_full)
    logger.info("LoRA of rank %d beside %d layers", adapter.rank, len(targets))
    logger.info("%s", format_table(plan, count_parameters(network, plan)))


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """peft's layers by name; none where no adapter was added."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "get_delta_weight")}


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """While the block runs, the network has plain layers whose weights contain what the adapters learnt."""
    layers = adapted_layers(network)
    try:
        for name, layer in layers.items():
            network.set_submodule(name, _plain(layer))
        yield
    finally:
        for name, layer in layers.items():
            network.set_submodule(name, layer)


@torch.no_grad()
def _plain(layer: Any) -> nn.Linear:
    base = layer.get_base_layer()
    with torch.device("meta"):
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    weight = base.weight + layer.get_delta_weight(_NAME)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        plain.bias = nn.Parameter(base.bias, requires_grad=False)
    return plain.train(layer.training)


def write_adapter(folder: Path, network: nn.Module) -> None:
    """What `merged` hides, for going on: the adapters' matrices and the weights they stand beside."""
    write_weights(folder / ADAPTER_FILE, _state(network))


def restore_adapter(folder: Path, network: nn.Module) -> None:
    """Put a stored adapter back into a network that has its layers, over the merged weights it was read with.

    Fails unless the file has exactly the network's adapters: what is not put back would train from nothing.
    """
    try:
        stored = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"{folder}: the adapter cannot be read ({fault})") from fault
    wanted = _state(network)
    odd = sorted(
        {name for name in wanted.keys() | stored.keys() if name not in wanted or name not in stored}
        | {name for name in wanted.keys() & stored.keys() if wanted[name].shape != stored[name].shape}
    )
    if odd:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} does not hold this stage's adapter ({len(odd)} tensors differ, first "
            f"{odd[0]}); begin the stage anew (--restart)"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.data
        for name, parameter in network.named_parameters()
        if LORA in name or name.endswith(f"{BASE}weight")
    }


def with_adapter_rates(groups: Iterable[dict[str, Any]], stage: Stage) -> list[dict[str, Any]]:
    """Optimizer groups in which those of adapters have the adapter's rate, if it has one."""
    factor = 1.0
    if stage.adapter is not None and stage.adapter.lr is not None:
        factor = stage.adapter.lr / stage.optimizer.lr
    return [
        {**group, "lr": group["lr"] * factor} if group["name"].endswith("adapter") else group
        for group in groups
    ]


def start_of(trained: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a stage began with, of what trains: `weights`, and of each adapter a second matrix of zeros.

    Of two matrices only one moves towards the start, so that their product is drawn back by the share.
    """
    start = {}
    for name, parameter in trained.items():
        if LORA not in name:
            start[name] = weights[name]
        elif ".lora_B." in name:
            start[name] = torch.zeros_like(parameter)
    return start


def _linear(network: nn.Module, planned: Mapping[str, str]) -> list[str]:
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" in planned
        }
    )
