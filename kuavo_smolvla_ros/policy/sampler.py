"""The fast path from a batch to a chunk: the policy's own results, computed with less work.

What is the same for every chunk is made once: packed weights, masks and rotations per shape, the times of the
denoising steps. What is the same for every step is made once per chunk, in buffers that stay where they are.
Cameras pass the vision encoder together, or each when its picture arrives (`encode_camera`). On a GPU prefix
and denoising loop are captured as graphs (`sampler_cuda.py`).

The sampler reads the policy's weights when it is built and looks at every chunk whether they were written
since; then it packs them anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy import products
from kuavo_smolvla_ros.policy.dimensions import ACTION
from kuavo_smolvla_ros.policy.language import TOKEN_MASK, TOKENS
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import ChunkRequest, KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.prefix import KeyValues
from kuavo_smolvla_ros.policy.quantized import Int8, why_not_int8
from kuavo_smolvla_ros.policy.rtc import Guidance, guidance_weight
from kuavo_smolvla_ros.policy.sampler_cuda import Captured, Stage, compile_steps, make_stage
from kuavo_smolvla_ros.policy.sampler_linear import Dense, LinearForms, OneDnn, why_not_onednn
from kuavo_smolvla_ros.policy.sampler_pack import WeightWatch, pack_network
from kuavo_smolvla_ros.policy.sampler_steps import Buffers, Layout, Steps, make_buffers, make_layout
from kuavo_smolvla_ros.policy.vision import position_ids

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "int8")
KEPT_LAYOUTS = 16
WIDE = 256  # narrower products take less time than oneDNN takes to begin one


class SamplerError(UserError):
    """The fast path was asked for something it cannot do."""


@dataclass(frozen=True)
class SamplerOptions:
    """How the fast path computes.

    `dtype` "auto" follows the policy's `compute_dtype`. `forms` chooses how products are done: "auto" packs
    weights for oneDNN where that is faster, "dense" insists on torch's own. `trim` drops padding tokens that
    no sample of the batch needs (never on a GPU, where shapes are fixed). None of these changes a result
    beyond rounding. `compile` has torch's compiler fuse the rest as well, which pays on a GPU: minutes at
    first, seconds once its results are in the cache folder.

    The others do, unless the policy was trained with them: dtype "int8" rounds weights and activations to 8
    bits, `steps` replaces the policy's `num_steps`, `image_size` (width, height) its picture size, `unpadded`
    leaves out the part of the square that a picture does not fill. `reuse_unchanged` compares pictures with
    the last ones and encodes those that differ: exact, and of use where cameras stand still or are off.
    """

    dtype: str = "auto"
    forms: str = "auto"
    trim: bool = True
    cuda_graphs: bool = True
    compile: bool = False
    steps: int | None = None
    image_size: tuple[int, int] | None = None
    unpadded: bool = False
    reuse_unchanged: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SamplerError(f"dtype is {self.dtype!r}; it is one of {', '.join(DTYPES)}")
        if self.forms not in ("auto", "dense"):
            raise SamplerError(f"forms is {self.forms!r}; it is 'auto' or 'dense'")
        if self.steps is not None and self.steps < 1:
            raise SamplerError(f"steps is {self.steps}; at least one denoising step is needed")


def why_not_fast(policy: KuavoSmolVLAPolicy) -> str | None:
    """Why this policy must take the plain path, or None."""
    network = policy.model
    if type(network).forward is not nn.Module.forward:
        return "the network computes in a way of its own"
    if any(p.dtype != torch.float32 for p in network.parameters()):
        return "its parameters are not in single precision"
    devices = {p.device.type for p in network.parameters()}
    if len(devices) > 1 or not devices <= {"cpu", "cuda"}:
        return f"its parameters are on {', '.join(sorted(devices))}"
    known = (nn.Linear, products.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.Embedding)
    for name, module in network.vlm_with_expert.named_modules():
        if module._parameters and type(module) not in known:
            return f"{name} is a {type(module).__name__}, not a plain layer"
    return None


def make_sampler(policy: KuavoSmolVLAPolicy, options: SamplerOptions | None = None) -> Sampler | None:
    """A sampler, or None and one line in the log that says why the plain path is taken."""
    reason = why_not_fast(policy)
    if reason is not None:
        logger.warning("inference takes the plain path: %s", reason)
        return None
    return Sampler(policy, options)


class Prefix(NamedTuple):
    """What the denoising steps read of one chunk; `kept` and `valid` are for the delta expert."""

    layout: Layout
    buffers: Buffers
    kept: list[tuple[Tensor, Tensor]]
    valid: Tensor


class Sampler:
    """Computes chunks for one policy. Calls from several threads wait for each other."""

    def __init__(self, policy: KuavoSmolVLAPolicy, options: SamplerOptions | None = None) -> None:
        reason = why_not_fast(policy)
        if reason is not None:
            raise SamplerError(f"the fast path cannot compute this policy: {reason}")
        self.policy = policy
        self.options = options or SamplerOptions()
        self.builds = 0
        self.lock = threading.RLock()
        self.rebuild()

    # Weights

    def rebuild(self) -> None:
        """Pack the policy's weights anew. By hand only after writing to few of them behind torch's back
        (`.data`), which `refresh` may miss.
        """
        with self.lock:
            policy, config = self.policy, self.policy.config
            started = time.monotonic()
            self.device = policy.model.action_out_proj.weight.device
            self.sizes = policy.model.architecture
            self._on_device = self.device.type != "cpu"  # where reading a value back means waiting
            self._graphs = self.device.type == "cuda" and self.options.cuda_graphs
            self.dtype, forms = _choose(
                self.options, config.compute_dtype, self.device, self.sizes.expert_width
            )
            self.steps = self.options.steps or config.num_steps
            self._settings = self._read_settings()
            self._watch = WeightWatch(policy.model)
            pack = pack_network(policy.model, forms, self.dtype, self.steps)
            self._steps = Steps(pack, self.sizes, self.dtype, config.chunk_size, onednn=forms.name != "dense")
            if self.options.compile:
                compile_steps(self._steps)
            self._layouts: dict[Any, Layout] = {}
            self._buffers: dict[tuple[int, ...], Buffers] = {}
            self._stages: dict[Any, Stage] = {}
            self._ids: dict[tuple[int, int], Tensor] = {}
            self.builds += 1
            self.form = forms.name
            logger.info(
                "fast path: %s products in %s, packed in %.1f s",
                forms.name,
                str(self.dtype).removeprefix("torch."),
                time.monotonic() - started,
            )

    def refresh(self) -> bool:
        """Pack anew if weights or settings have changed since; whether they had."""
        with self.lock:
            if self._settings == self._read_settings() and not self._watch.changed():
                return False
            self.rebuild()
            return True

    def _read_settings(self) -> tuple[Any, ...]:
        config = self.policy.config
        return (
            config.compute_dtype,
            config.vision_position_ids,
            config.num_steps,
            config.chunk_size,
            self.policy.model,
        )

    # Stages

    @torch.inference_mode()
    def encode(self, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Pictures (N, 3, height, width) in [-1, 1] to image tokens (N, T, width), scaled as in the prefix.

        `ids` are the learned positions of the patches, for grids other than the policy's.
        """
        with self.lock, torch.autocast(self.device.type, enabled=False):
            self.refresh()
            return self._encode(pixels, ids)

    @torch.no_grad()
    def chunk(
        self,
        batch: Mapping[str, Any],
        noise: Tensor | None = None,
        *,
        image_tokens: Tensor | None = None,
        prefix: Tensor | None = None,
        delay: int = 0,
        execution_horizon: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """As `KuavoSmolVLAPolicy.predict_action_chunk`; `image_tokens` (B, T, width) come from `encode`."""
        policy, config = self.policy, self.policy.config
        with self.lock, torch.autocast(self.device.type, enabled=False):
            self.refresh()
            request = policy.chunk_request(batch, noise, prefix, delay, execution_horizon, seed)
            with torch.inference_mode():
                if image_tokens is None:
                    pixels = policy._pixels(batch)
                    encoded = self._encode(pixels.flatten(0, 1))
                    image_tokens = encoded.unflatten(0, pixels.shape[:2]).flatten(1, 2)
                tokens, mask = (policy._entry(batch, key) for key in (TOKENS, TOKEN_MASK))
                actions, prepared = self._denoised(image_tokens, *self._trimmed(tokens, mask), request)
            actions = actions.clone()
        if getattr(config, "delta_refine_steps", 0):
            actions = self._refined(batch, prepared, actions, held=0 if prefix is None else delay)
        return actions[:, :, : config.widths[ACTION]]

    def _encode(self, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
        height, width = pixels.shape[-2:]
        self.sizes.image_tokens(height, width)
        if ids is None:
            ids = self.patch_ids(height, width)
        return self._stage(("vision", *pixels.shape), self._steps.encode, pixels, ids)(pixels, ids)

    def patch_ids(self, height: int, width: int) -> Tensor:
        if (height, width) not in self._ids:
            patch = self.sizes.vision.patch_size
            side = self.sizes.vision.image_size // patch
            self._ids[height, width] = position_ids(
                height // patch, width // patch, side, self.policy.config.vision_position_ids, self.device
            )
        return self._ids[height, width]

    def _trimmed(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Without the padding that no sample needs; on a GPU shapes stay, and nothing is read back."""
        if self._on_device or not self.options.trim:
            return tokens, mask
        needed = int(mask.any(0).nonzero().amax()) + 1
        return tokens[:, :needed], mask[:, :needed]

    def _denoised(
        self, images: Tensor, tokens: Tensor, mask: Tensor, request: ChunkRequest
    ) -> tuple[Tensor, Prefix]:
        inputs = (images.to(self.dtype), tokens, mask, request.state)
        key = (*images.shape, tokens.shape[1])
        stage = self._stage(("prefix", *key), self._run_prefix, *inputs)
        prepared = stage(*inputs)
        if not isinstance(stage, Captured):
            return self._walk(prepared, request.noise, request.guide, request.free), prepared
        # One graph with and without a previous chunk, with and without padded dimensions.
        noise, free, guide = request.noise, request.free, request.guide
        limit = self.policy.config.rtc.max_guidance_weight if guide is None else guide.maximum
        everything = (
            noise,
            torch.zeros_like(noise) if guide is None else guide.target,
            torch.zeros_like(noise) if guide is None else guide.weights.expand_as(noise),
            torch.ones_like(noise, dtype=torch.bool) if free is None else free.expand_as(noise),
        )

        def walk(noise: Tensor, target: Tensor, weights: Tensor, free: Tensor) -> Tensor:
            return self._walk(prepared, noise, Guidance(target, weights, limit), free)

        return self._stage(("denoising loop", *key, self._bounded(limit)), walk, *everything)(
            *everything
        ), prepared

    def _run_prefix(self, images: Tensor, tokens: Tensor, mask: Tensor, state: Tensor) -> Prefix:
        size, chunk = images.shape[0], self.policy.config.chunk_size
        ones = mask.new_ones(size, images.shape[1])
        valid = torch.cat((ones, mask, ones[:, :1]), dim=1)
        shape = tuple(valid.shape)
        if shape not in self._buffers:
            self._buffers[shape] = make_buffers(*shape, chunk, self.sizes, self.dtype, self.device)
        layout, buffers = self._layout(valid), self._buffers[shape]
        kept = self._steps.prefix(images, tokens, state, layout, buffers)
        return Prefix(layout, buffers, kept, valid)

    def _layout(self, valid: Tensor) -> Layout:
        chunk = self.policy.config.chunk_size
        if self._on_device:
            return make_layout(valid, chunk, self.sizes, self.dtype, full=False)
        key = (tuple(valid.shape), valid.numpy().tobytes())
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = make_layout(valid, chunk, self.sizes, self.dtype, full=bool(valid.all()))
            if len(self._layouts) >= KEPT_LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)))
        self._layouts[key] = layout
        return layout

    def _walk(self, prepared: Prefix, noise: Tensor, guide: Guidance | None, free: Tensor | None) -> Tensor:
        """As `flow.euler`."""
        x, step = noise, 1.0 / self.steps
        for index, moment in enumerate(self._steps.pack.moments):
            v = self._steps.velocity(x, moment, prepared.layout, prepared.buffers)
            if guide is not None:
                now = 1.0 - index * step
                pull = guidance_weight(now, self._bounded(guide.maximum))
                v = v - pull * (guide.target - (x - now * v)) * guide.weights
            if free is not None:
                v = torch.where(free, v, noise)
            x = torch.add(x, v, alpha=-step)
        return x

    def _bounded(self, maximum: float) -> float:
        return min(maximum, float(self.steps))

    def _refined(self, batch: Mapping[str, Any], prepared: Prefix, actions: Tensor, held: int) -> Tensor:
        from kuavo_smolvla_ros.policy.delta_policy import refined

        half = (self.sizes.text.head_dim // 2, 2)
        keys = (
            k[:, :-1].transpose(1, 2).unflatten(-1, half).transpose(-1, -2).flatten(-2)
            for k, _ in prepared.kept
        )
        values = (v[:, :-1].transpose(1, 2).clone() for _, v in prepared.kept)
        context = KeyValues(tuple(keys), tuple(values), prepared.valid[:, :-1].clone())
        with self.policy._precision(self.device):
            return refined(self.policy, batch, context, actions, held=held)

    def _stage(self, key: Any, function: Stage, *inputs: Tensor) -> Stage:
        if not self._graphs:
            return function
        if key not in self._stages:
            self._stages[key] = make_stage(key[0], function, inputs)
        return self._stages[key]


def _choose(
    options: SamplerOptions, compute_dtype: str, device: torch.device, width: int
) -> tuple[torch.dtype, LinearForms]:
    wanted = compute_dtype if options.dtype == "auto" else options.dtype
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if wanted == "int8":
        reason = "it is for CPUs" if device.type != "cpu" else why_not_int8()
        if reason is not None:
            raise SamplerError(f"int8 weights cannot be used: {reason}. Use dtype 'bfloat16' or 'float32'")
        return torch.bfloat16, Int8()
    dtype = torch.bfloat16 if wanted == "bfloat16" else torch.float32
    # The compiler lays weights out itself.
    if device.type != "cpu" or options.forms == "dense" or options.compile or width < WIDE:
        return dtype, Dense()
    reason = why_not_onednn(dtype)
    if reason is not None:
        logger.info("fast path without packed weights: %s", reason)
        return dtype, Dense()
    return dtype, OneDnn()
