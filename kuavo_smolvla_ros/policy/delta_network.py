"""The delta expert's parameters, beside those of SmolVLA and under names of their own.

As in `network.py` nothing is computed here. The names are those of the design note; together they are all
that trains when a delta expert is trained.
"""

from __future__ import annotations

import torch
from torch import nn

from kuavo_smolvla_ros.policy.architecture import Architecture, expert_mlp_width
from kuavo_smolvla_ros.policy.delta_settings import DeltaError, DeltaSettings
from kuavo_smolvla_ros.policy.network import DecoderLayer, SmolVLANetwork
from kuavo_smolvla_ros.policy.products import Linear

EXPERT_PARTS = (
    "delta_expert",
    "delta_action_in_proj",
    "delta_action_out_proj",
    "delta_action_time_mlp_in",
    "delta_action_time_mlp_out",
    "action_context_encoder",
)
CLS_PARTS = ("pre_cls_param", "suf_cls_param", "obs_cls_proj", "act_cls_proj")
# A learned token is no more than another embedding, and begins as small as those.
CLS_STD = 0.02


def trained_parts(settings: DeltaSettings) -> tuple[str, ...]:
    """The modules and parameters that train, by name in the network; the others are all frozen."""
    if not settings.train_delta_expert:
        return ()
    return EXPERT_PARTS + (CLS_PARTS if settings.use_cls_head else ())


def is_delta_name(name: str) -> bool:
    """Whether a parameter's name in the network belongs to the delta expert or to its CLS head."""
    return name.split(".")[0] in EXPERT_PARTS + CLS_PARTS


def delta_width(sizes: Architecture, settings: DeltaSettings) -> int:
    """Width of the delta expert's tokens."""
    width = int(sizes.text.width * settings.delta_width_multiplier)
    if width < 2 or width % 2:
        raise DeltaError(
            f"delta_width_multiplier {settings.delta_width_multiplier} makes the delta expert {width} wide; "
            "the width must be even because the time embedding is half sine, half cosine"
        )
    return width


class DeltaExpert(nn.Module):
    """A few decoder layers over the chunk; each also reads one of the frozen text layers."""

    def __init__(self, sizes: Architecture, settings: DeltaSettings) -> None:
        super().__init__()
        layers = settings.delta_num_layers
        if layers > sizes.text.layers:
            raise DeltaError(
                f"delta_num_layers is {layers}; each reads a text layer of its own, and there are "
                f"{sizes.text.layers}"
            )
        width = delta_width(sizes, settings)
        self.layers = nn.ModuleList(
            DecoderLayer(width, expert_mlp_width(width), sizes.text) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps=sizes.text.norm_eps)


def read_layers(sizes: Architecture, settings: DeltaSettings) -> tuple[int, ...]:
    """The text layer that each layer of the delta expert reads: evenly spread, the last one included."""
    count = settings.delta_num_layers
    return tuple((i + 1) * sizes.text.layers // count - 1 for i in range(count))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Linear(inputs, hidden), nn.SiLU(), Linear(hidden, outputs))


class DeltaNetwork(SmolVLANetwork):
    """SmolVLA and a delta expert; plain SmolVLA's parameters keep their names."""

    def __init__(
        self, architecture: Architecture, state_dim: int, action_dim: int, settings: DeltaSettings
    ) -> None:
        super().__init__(architecture, state_dim, action_dim)
        width = delta_width(architecture, settings)
        self.delta_expert = DeltaExpert(architecture, settings)
        self.delta_action_in_proj = Linear(action_dim, width)
        self.delta_action_out_proj = Linear(width, action_dim)
        self.delta_action_time_mlp_in = Linear(2 * width, width)
        self.delta_action_time_mlp_out = Linear(width, width)
        # Where the robot is, where the chunk has it now, and how old the chunk is.
        self.action_context_encoder = _mlp(state_dim + action_dim + 1, width, width)
        self.read_layers = read_layers(architecture, settings)
        if settings.use_cls_head:
            text, expander = architecture.text.width, settings.cls_expander_width
            before, behind = settings.num_cls_prefix, settings.num_cls_suffix
            self.pre_cls_param = nn.Parameter(torch.empty(before, text))
            self.suf_cls_param = nn.Parameter(torch.empty(behind, width))
            # VICReg acts on an expansion of the tokens, not on the tokens; it is of no use after training.
            self.obs_cls_proj = _mlp(before * text, expander, expander)
            self.act_cls_proj = _mlp(behind * width, expander, expander)

    def delta_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that plain SmolVLA does not have."""
        return {name: p for name, p in self.named_parameters() if is_delta_name(name)}

    @torch.no_grad()
    def initialise(self) -> None:
        super().initialise()
        self.initialise_delta()

    @torch.no_grad()
    def initialise_delta(self) -> None:
        """A delta expert that changes nothing yet: its last projection is zero.

        So a policy with a fresh one is the policy without, and training begins at the base's own error.
        """
        std = self.architecture.initializer_std
        for layer in self.delta_expert.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(self.delta_action_out_proj.weight)
        nn.init.zeros_(self.delta_action_out_proj.bias)
        for name in ("pre_cls_param", "suf_cls_param"):
            if name in self._parameters:
                nn.init.normal_(self.get_parameter(name), std=CLS_STD)

    @torch.no_grad()
    def fresh(self, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Initial weights for some of the delta expert's parts, of a network that has no memory yet."""
        for part in parts:
            module = getattr(self, part)
            if isinstance(module, nn.Parameter):
                self.register_parameter(part, nn.Parameter(torch.empty(module.shape)))
                continue
            module.to_empty(device="cpu")
            for each in module.modules():
                if isinstance(each, (nn.Linear, nn.RMSNorm)):
                    each.reset_parameters()
        self.initialise_delta()
        return {name: p.detach() for name, p in self.named_parameters() if name.split(".")[0] in parts}
