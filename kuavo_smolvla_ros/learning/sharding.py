"""Trained parameters, their gradients and moments divided among devices (torch's FSDP), where asked for.

What is frozen stays whole on every device: it has no gradient and no moments, and dividing it would only
send it around in every step. The network is one unit: its layers hold parameters and are computed by
functions, so there is no forward of a layer before which its parameters could be gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(policy: nn.Module, device: torch.device) -> nn.Module:
    """A twin of the policy whose trained parameters are divided; frozen ones are shared with it.

    The policy itself keeps its place and loses its trained values until `whole` brings them back.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    policy.to(device)
    frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
    twin = copy.deepcopy(policy, dict(frozen))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    fully_shard(twin, mesh=mesh, ignored_params=set(frozen.values()))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)
    return twin


@contextmanager
def whole(policy: nn.Module, twin: nn.Module) -> Iterator[None]:
    """While the block runs, the policy has the values its twin was trained to. All devices take part."""
    if policy is twin:
        yield
        return
    trained = [
        (kept, part)
        for kept, part in zip(policy.parameters(), twin.parameters(), strict=True)
        if part.requires_grad
    ]
    try:
        for kept, part in trained:
            kept.data = full(part.detach())
        yield
    finally:
        for kept, _ in trained:
            kept.data = kept.data.new_empty(0)


def full(value: Tensor) -> Tensor:
    """The whole of a divided tensor; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor divided as a parameter is, if it is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
