"""How much memory a training step needs, before anything is allocated.

One forward and backward pass runs on tensors with shapes and no contents; every allocation and release of
the real code is counted on the way. Hence there is no formula that could lag behind the network. What the
optimizer adds is known: two moments per trained weight; it steps in one pass, without temporaries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from kuavo_smolvla_ros.policy.architecture import Architecture
from kuavo_smolvla_ros.policy.expert import prepare_expert, velocity
from kuavo_smolvla_ros.policy.freezing import FreezePlan, apply_plan
from kuavo_smolvla_ros.policy.loss import flow_loss
from kuavo_smolvla_ros.policy.network import SmolVLANetwork
from kuavo_smolvla_ros.policy.prefix import append_state, context_embeddings, embed_images, run_context

GIB = 2**30


@dataclass(frozen=True)
class StepSizes:
    """What one training step on one device works on."""

    batch: int = 8
    cameras: int = 3
    tokens: int = 48
    chunk_size: int = 50
    state_dim: int = 32
    action_dim: int = 32
    bfloat16: bool = True  # autocast, as on CUDA


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device. It is fullest in the backward pass, or else while the optimizer steps."""

    weights: int
    gradients: int
    moments: int
    activations: (
        int  # kept from the forward for the backward pass, bfloat16 copies of trained weights included
    )
    backward_peak: int
    optimizer_peak: int

    @property
    def peak(self) -> int:
        return max(self.backward_peak, self.optimizer_peak)

    def lines(self) -> Iterator[str]:
        """For people, in GiB."""
        for name, value, note in (
            ("weights", self.weights, "float32, frozen ones too"),
            ("gradients", self.gradients, "float32, of what trains"),
            ("AdamW moments", self.moments, "two float32 per trained weight"),
            ("kept activations", self.activations, "at the end of the forward pass, weight copies included"),
            ("peak, backward", self.backward_peak, "weights + moments + activations + gradients so far"),
            ("peak, optimizer", self.optimizer_peak, "weights + moments + gradients"),
        ):
            yield f"  {name:<17} {value / GIB:7.2f} GiB  {note}"


def estimate_step(
    architecture: Architecture,
    plan: FreezePlan,
    sizes: StepSizes,
    adapt: Callable[[SmolVLANetwork], None] | None = None,
) -> StepMemory:
    """Trace one training step under the plan; takes seconds, and no memory to speak of.

    `adapt` changes the network before that (adapters).
    """
    with torch.device("meta"):
        network = SmolVLANetwork(architecture, sizes.state_dim, sizes.action_dim)
    apply_plan(network, plan)
    if adapt is not None:
        adapt(network)
    with FakeTensorMode():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
                setattr(module, name, empty)
        trained = sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
        allocations = Allocations(network.parameters())
        weights = allocations.live
        with allocations:
            loss = step_loss(network, sizes)
            kept = allocations.live - weights
            loss.backward()
    moments = 2 * trained
    return StepMemory(
        weights=weights,
        gradients=trained,
        moments=moments,
        activations=kept,
        backward_peak=allocations.peak + moments,
        optimizer_peak=weights + trained + moments,
    )


class Allocations(TorchDispatchMode):
    """Bytes alive and their highest number, counted by storage over every operation under this mode."""

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in present:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._gone, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, size: int) -> None:
        self.live -= size


def step_loss(network: SmolVLANetwork, sizes: StepSizes) -> Tensor:
    """The training step of the policy; the values do not matter, the shapes do."""
    batch, side = sizes.batch, network.architecture.vision.image_size
    pixels = torch.empty(batch, sizes.cameras, 3, side, side)
    tokens = torch.zeros(batch, sizes.tokens, dtype=torch.long)
    real = torch.ones(batch, sizes.tokens, dtype=torch.bool)
    state, time = torch.empty(batch, sizes.state_dim), torch.empty(batch)
    actions = torch.empty(batch, sizes.chunk_size, sizes.action_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sizes.bfloat16):
        embeddings = context_embeddings(network, embed_images(network, pixels), tokens, real)
        prefix = append_state(network, run_context(network, *embeddings), state)
        predicted = velocity(network, prepare_expert(network, prefix, sizes.chunk_size), actions, time)
    return flow_loss(predicted, actions, torch.ones_like(actions, dtype=torch.bool))
