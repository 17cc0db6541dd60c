"""The policy's weights as the fast path reads them, and the watch that notices when they have changed.

Nothing is approximated: projections of the same input are stacked, norms' gains and attention's scale are
multiplied into the weights behind or before them, the first two layers of the action head, between which
nothing happens, become one, and heads are reordered so that a rotation turns neighbours (a complex product).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kuavo_smolvla_ros.policy.architecture import Architecture
from kuavo_smolvla_ros.policy.expert import time_embedding
from kuavo_smolvla_ros.policy.network import DecoderLayer, SmolVLANetwork, VisionLayer
from kuavo_smolvla_ros.policy.sampler_linear import DenseLinear, Gated, Linear, LinearForms

# Vectors that usually pass through a layer at a time. Packed weights are laid out for them, right for any.
VISION_ROWS, PREFIX_ROWS, ACTION_ROWS = 1024, 256, 50


class FastVisionLayer(NamedTuple):
    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    out: Linear
    norm2: tuple[Tensor, Tensor]
    fc1: Linear
    fc2: Linear


class FastLayer(NamedTuple):
    """A decoder layer whose norms have no gain.

    `project` gives queries, keys and values; in the last text layer keys and values; and in an expert layer
    that sees the prefix only, queries. Such a layer's own projections of the prefix are `cross`.
    """

    project: Linear
    out: Linear | None
    gated: Gated | None
    down: Linear | None
    cross: tuple[Linear, Linear] | None


class Pack(NamedTuple):
    """All layers in one form and one precision; the heads at both ends stay in single precision."""

    patch: tuple[Tensor, Tensor]
    positions: Tensor
    vision: tuple[FastVisionLayer, ...]
    vision_norm: tuple[Tensor, Tensor]
    connector: Linear
    embedding: Tensor
    state: DenseLinear
    text: tuple[FastLayer, ...]
    action_in: Tensor
    moments: tuple[Tensor, ...]
    action_mlp: Linear
    expert: tuple[FastLayer, ...]
    action_out: DenseLinear


@torch.no_grad()
def pack_network(network: SmolVLANetwork, forms: LinearForms, dtype: torch.dtype, steps: int) -> Pack:
    """Copies of the weights the fast path reads, for a walk of so many steps."""
    return _Packer(network.architecture, forms, dtype).pack(network, steps)


class _Packer:
    def __init__(self, sizes: Architecture, forms: LinearForms, dtype: torch.dtype) -> None:
        self.sizes, self.forms, self.dtype = sizes, forms, dtype

    def pack(self, network: SmolVLANetwork, steps: int) -> Pack:
        sizes, vision = self.sizes, network.vision
        patch = vision.embeddings.patch_embedding
        out = network.action_out_proj
        action_in, moments = _fold_action_head(network, sizes.expert_width, steps)
        return Pack(
            patch=(self._own(patch.weight), self._own(patch.bias)),
            positions=self._own(vision.embeddings.position_embedding.weight),
            vision=tuple(self._vision_layer(layer) for layer in vision.encoder.layers),
            vision_norm=self._norm(vision.post_layernorm),
            connector=self._linear(
                network.connector.modality_projection.proj.weight * sizes.text.width**0.5, None, PREFIX_ROWS
            ),
            embedding=network.text.embed_tokens.weight.detach(),
            state=DenseLinear(network.state_proj.weight.detach(), network.state_proj.bias.detach()),
            text=tuple(self._text_layer(layer, i) for i, layer in enumerate(network.text.layers)),
            action_in=action_in,
            moments=moments,
            action_mlp=self._linear(
                network.action_time_mlp_out.weight, network.action_time_mlp_out.bias, ACTION_ROWS
            ),
            expert=tuple(self._expert_layer(layer, i) for i, layer in enumerate(network.expert.layers)),
            action_out=DenseLinear(out.weight * network.expert.norm.weight, out.bias.detach()),
        )

    def _vision_layer(self, layer: VisionLayer) -> FastVisionLayer:
        attention = layer.self_attn
        scale = (self.sizes.vision.width // self.sizes.vision.heads) ** -0.5
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights, biases = [p.weight for p in parts], [p.bias for p in parts]
        return FastVisionLayer(
            norm1=self._norm(layer.layer_norm1),
            qkv=self._linear(
                torch.cat((weights[0] * scale, *weights[1:])),
                torch.cat((biases[0] * scale, *biases[1:])),
                VISION_ROWS,
            ),
            out=self._linear(attention.out_proj.weight, attention.out_proj.bias, VISION_ROWS),
            norm2=self._norm(layer.layer_norm2),
            fc1=self._linear(layer.mlp.fc1.weight, layer.mlp.fc1.bias, VISION_ROWS),
            fc2=self._linear(layer.mlp.fc2.weight, layer.mlp.fc2.bias, VISION_ROWS),
        )

    def _text_layer(self, layer: DecoderLayer, index: int) -> FastLayer:
        gain = layer.input_layernorm.weight
        queries, keys, values = self._projections(layer)
        if index == self.sizes.text.layers - 1:  # nothing reads what the last layer would go on to compute
            both = self._linear(torch.cat((keys, values)) * gain, None, PREFIX_ROWS)
            return FastLayer(both, None, None, None, None)
        project = self._linear(torch.cat((queries, keys, values)) * gain, None, PREFIX_ROWS)
        return FastLayer(project, *self._rest(layer, PREFIX_ROWS), None)

    def _expert_layer(self, layer: DecoderLayer, index: int) -> FastLayer:
        gain = layer.input_layernorm.weight
        queries, keys, values = self._projections(layer)
        if self.sizes.is_self_attention(index):
            project = self._linear(torch.cat((queries, keys, values)) * gain, None, ACTION_ROWS)
            return FastLayer(project, *self._rest(layer, ACTION_ROWS), None)
        # It reads the text layers' keys, which are reordered as well.
        keys = self._neighbours(keys.T).T
        cross = (self._linear(keys, None, PREFIX_ROWS), self._linear(values, None, PREFIX_ROWS))
        return FastLayer(
            self._linear(queries * gain, None, ACTION_ROWS), *self._rest(layer, ACTION_ROWS), cross
        )

    def _projections(self, layer: DecoderLayer) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.self_attn
        scale = self.sizes.text.head_dim**-0.5
        return (
            self._neighbours(attention.q_proj.weight) * scale,
            self._neighbours(attention.k_proj.weight),
            attention.v_proj.weight,
        )

    def _rest(self, layer: DecoderLayer, rows: int) -> tuple[Linear, Gated, Linear]:
        gain, mlp = layer.post_attention_layernorm.weight, layer.mlp
        gate, up = self._own(mlp.gate_proj.weight * gain), self._own(mlp.up_proj.weight * gain)
        return (
            self._linear(layer.self_attn.o_proj.weight, None, rows),
            self.forms.gated(gate, up, rows),
            self._linear(mlp.down_proj.weight, None, rows),
        )

    def _neighbours(self, rows: Tensor) -> Tensor:
        """Rows of heads, first half before second, reordered so that each stands beside its partner."""
        return rows.unflatten(0, (-1, 2, self.sizes.text.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def _linear(self, weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
        return self.forms.linear(self._own(weight), None if bias is None else self._own(bias), rows)

    def _norm(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return self._own(norm.weight), self._own(norm.bias)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype).contiguous()


def _fold_action_head(network: SmolVLANetwork, width: int, steps: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One matrix for noisy actions, and what the time of each step adds to its product."""
    device = network.action_in_proj.weight.device
    # Exactly the times of `flow.euler`: a last bit would turn the fastest phase by 1e-4.
    times = torch.tensor([1.0 - i * (1.0 / steps) for i in range(steps)], dtype=torch.float32, device=device)
    head, first = network.action_in_proj, network.action_time_mlp_in
    of_actions, of_time = first.weight.double().split(width, dim=1)
    bias = of_actions @ head.bias.double() + first.bias.double()
    moments = bias + time_embedding(times, width) @ of_time.T
    return (of_actions @ head.weight.double()).float(), tuple(moments.float().unbind())


class WeightWatch:
    """Notices that parameters were written, moved or replaced since it was made.

    torch counts the writes to a tensor, but not those of fused optimizers or through `.data`. Therefore one
    entry of each parameter is compared as well: a step of training leaves none of hundreds untouched.
    """

    def __init__(self, module: nn.Module) -> None:
        self._children = [
            (owner, name, child) for owner in module.modules() for name, child in owner._modules.items()
        ]
        self._parameters = [
            (owner, name, parameter, parameter._version, parameter.data_ptr())
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]
        flat = [parameter.detach().reshape(-1) for _, _, parameter, _, _ in self._parameters]
        self._probes = [x[len(x) // 3 : len(x) // 3 + 1] for x in flat]
        self._values = torch.cat(self._probes)

    def changed(self) -> bool:
        for owner, name, parameter, version, place in self._parameters:
            if (
                owner._parameters.get(name) is not parameter
                or parameter._version != version
                or parameter.data_ptr() != place
            ):
                return True
        if any(owner._modules.get(name) is not child for owner, name, child in self._children):
            return True
        return not torch.equal(torch.cat(self._probes), self._values)
