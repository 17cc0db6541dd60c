"""The policy's parameters: plain torch modules whose names equal those of lerobot's SmolVLA.

Nothing is computed here. Keeping the names is what lets weights travel between the two implementations;
keeping the modules free of code is what lets vision, prefix and expert be separate functions with explicit
inputs (`vision.py`, `prefix.py`, `expert.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from kuavo_smolvla_ros.policy.architecture import Architecture, TextSizes, VisionSizes
from kuavo_smolvla_ros.policy.products import Linear

LM_HEAD = "vlm_with_expert.vlm.lm_head.weight"


class VisionAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)


class VisionMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)


class VisionLayer(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.self_attn = VisionAttention(sizes.width)
        self.layer_norm1 = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)
        self.mlp = VisionMlp(sizes.width, sizes.mlp_width)
        self.layer_norm2 = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)


class VisionEmbeddings(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, sizes.width, sizes.patch_size, stride=sizes.patch_size)
        self.position_embedding = nn.Embedding((sizes.image_size // sizes.patch_size) ** 2, sizes.width)


class VisionEncoder(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.layers))


class VisionModel(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.encoder = VisionEncoder(sizes)
        self.post_layernorm = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)


class Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = Linear(inputs, outputs, bias=False)


class Connector(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.modality_projection = Projection(inputs, outputs)


class DecoderAttention(nn.Module):
    def __init__(self, width: int, key_inputs: int, sizes: TextSizes) -> None:
        super().__init__()
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = Linear(width, queries, bias=False)
        self.k_proj = Linear(key_inputs, keys, bias=False)
        self.v_proj = Linear(key_inputs, keys, bias=False)
        self.o_proj = Linear(queries, width, bias=False)


class DecoderMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)


class DecoderLayer(nn.Module):
    """A Llama layer; an expert layer that looks at the prefix takes keys and values from the prefix's own."""

    def __init__(self, width: int, hidden: int, sizes: TextSizes, *, key_inputs: int | None = None) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(width, width if key_inputs is None else key_inputs, sizes)
        self.mlp = DecoderMlp(width, hidden)
        self.input_layernorm = nn.RMSNorm(width, eps=sizes.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=sizes.norm_eps)


class TextModel(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(
            DecoderLayer(sizes.width, sizes.mlp_width, sizes) for _ in range(sizes.layers)
        )
        self.norm = nn.RMSNorm(sizes.width, eps=sizes.norm_eps)


class ActionExpert(nn.Module):
    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        text = sizes.text
        self.layers = nn.ModuleList(
            DecoderLayer(
                sizes.expert_width,
                sizes.expert_mlp_width,
                text,
                key_inputs=None if sizes.is_self_attention(i) else text.kv_heads * text.head_dim,
            )
            for i in range(text.layers)
        )
        self.norm = nn.RMSNorm(sizes.expert_width, eps=text.norm_eps)


class VlmModel(nn.Module):
    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.vision_model = VisionModel(sizes.vision)
        self.connector = Connector(sizes.vision.width * sizes.shuffle**2, sizes.text.width)
        self.text_model = TextModel(sizes.text)


class Vlm(nn.Module):
    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.model = VlmModel(sizes)
        # Never used by the policy; present so that published weights fit without a missing or unexpected
        # name.
        self.lm_head = Linear(sizes.text.width, sizes.text.vocabulary, bias=False)


class VlmWithExpert(nn.Module):
    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.vlm = Vlm(sizes)
        self.lm_expert = ActionExpert(sizes)


class SmolVLANetwork(nn.Module):
    """All parameters of the policy, in single precision.

    `state_dim` and `action_dim` are the padded widths. Built under `torch.device("meta")` it costs nothing
    and waits for `load_state_dict(..., assign=True)`; otherwise call `initialise`.
    """

    def __init__(self, architecture: Architecture, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.architecture = architecture
        width = architecture.expert_width
        self.vlm_with_expert = VlmWithExpert(architecture)
        self.state_proj = Linear(state_dim, architecture.text.width)
        self.action_in_proj = Linear(action_dim, width)
        self.action_out_proj = Linear(width, action_dim)
        self.action_time_mlp_in = Linear(2 * width, width)
        self.action_time_mlp_out = Linear(width, width)

    @property
    def vision(self) -> VisionModel:
        return self.vlm_with_expert.vlm.model.vision_model

    @property
    def connector(self) -> Connector:
        return self.vlm_with_expert.vlm.model.connector

    @property
    def text(self) -> TextModel:
        return self.vlm_with_expert.vlm.model.text_model

    @property
    def expert(self) -> ActionExpert:
        return self.vlm_with_expert.lm_expert

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights as the published model starts from: normal for backbone and expert, zero bias.

        The five small heads and the projections of prefix keys keep torch's own default for linear layers.
        """
        std = self.architecture.initializer_std
        for name, module in self.vlm_with_expert.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if self._reads_prefix_keys(name):
                    continue
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)

    def _reads_prefix_keys(self, name: str) -> bool:
        if not name.startswith("lm_expert.layers.") or not name.endswith((".k_proj", ".v_proj")):
            return False
        return not self.architecture.is_self_attention(int(name.split(".")[2]))


def dead_parameter_names(architecture: Architecture) -> frozenset[str]:
    """Parameters no output depends on: `lm_head`, the last text layer beyond its keys and values, the last
    norm.

    The expert reads keys and values of each text layer, and nothing comes after the last one. Leaving these
    trainable would make distributed training wait for gradients that never come.
    """
    text = "vlm_with_expert.vlm.model.text_model"
    last = f"{text}.layers.{architecture.text.layers - 1}"
    tail = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"{last}.{part}.weight" for part in (*tail, "post_attention_layernorm")]
    return frozenset([LM_HEAD, f"{text}.norm.weight", *names])
