"""A freezing plan meets a model: which parameter trains, which module stays in eval mode, at which rate.

Works on parameter names alone (those of lerobot's SmolVLA, with any prefix), hence on lerobot's model and
on ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kuavo_smolvla_ros.policy.freeze_plan import (
    ACTION_EXPERT,
    ACTION_HEADS,
    CONNECTOR,
    LM_HEAD,
    RULES,
    STATE_PROJ,
    TEXT_MODEL,
    TEXT_UNUSED,
    VISION_EMBEDDINGS,
    VISION_LAYERS,
    VISION_POST_NORM,
    FreezePlan,
    FreezeSettings,
    FreezingError,
    format_layers,
    plan_freezing,
)
from kuavo_smolvla_ros.policy.freeze_presets import DEFAULT_PRESET, FREEZE_PRESETS, preset_for_episodes

__all__ = [
    "DEFAULT_PRESET",
    "FREEZE_PRESETS",
    "FreezePlan",
    "FreezeSettings",
    "FreezingError",
    "PartCount",
    "apply_plan",
    "count_parameters",
    "count_sizes",
    "format_table",
    "num_vision_layers",
    "parameter_groups",
    "plan_freezing",
    "preset_for_episodes",
    "set_train_mode",
    "trained_names",
]

_VLM = r"(?:^|\.)vlm_with_expert\.vlm\."
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        (VISION_EMBEDDINGS, _VLM + r"model\.vision_model\.embeddings\."),
        (VISION_LAYERS, _VLM + r"model\.vision_model\.encoder\.layers\.(?P<layer>\d+)\."),
        (VISION_POST_NORM, _VLM + r"model\.vision_model\.post_layernorm\."),
        (CONNECTOR, _VLM + r"model\.connector\."),
        (TEXT_MODEL, _VLM + r"model\.text_model\.(?:embed_tokens\.|layers\.(?P<layer>\d+)\.(?P<rest>.+))"),
        (TEXT_UNUSED, _VLM + r"model\.text_model\.norm\."),
        (LM_HEAD, _VLM + r"lm_head\."),
        (ACTION_EXPERT, r"(?:^|\.)vlm_with_expert\.lm_expert\."),
        (STATE_PROJ, r"(?:^|\.)state_proj\."),
        (ACTION_HEADS, r"(?:^|\.)action_(?:in_proj|out_proj|time_mlp_in|time_mlp_out)\."),
    )
)
# All that the expert reads of the last text layer.
_KEYS_AND_VALUES = ("input_layernorm.", "self_attn.k_proj.", "self_attn.v_proj.")
_VISION_PARTS = (VISION_EMBEDDINGS, VISION_LAYERS, VISION_POST_NORM)
_ADAPTER = ".lora_"  # peft's name for what it puts beside a weight


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs; `layer` is set in the vision layers only."""

    part: str
    layer: int | None = None


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part, or of the frozen or the trained vision layers."""

    part: str
    total: int
    trained: int


def num_vision_layers(model: nn.Module) -> int:
    """Layers of the model's vision encoder, read from its parameters."""
    pattern = dict(_PATTERNS)[VISION_LAYERS]
    found = {int(match["layer"]) for name, _ in model.named_parameters() if (match := pattern.search(name))}
    if found != set(range(len(found))) or not found:
        raise FreezingError(
            f"the model's vision layers are numbered {sorted(found)}; 0, 1, 2 ... is expected"
        )
    return len(found)


def apply_plan(model: nn.Module, plan: FreezePlan) -> None:
    """Set `requires_grad` of every parameter as planned, and drop gradients of those that are frozen.

    Fails unless every part of the plan is found in the model, every parameter belongs to one part, and the
    vision layers are as many as planned: a pattern that matches nothing leaves a part training unnoticed.
    """
    places = _places(_names(model), plan)
    wanted = set(RULES) | {name for name, _ in plan.extra_parts}
    absent = sorted(wanted - {place.part for place in places.values()})
    if absent:
        raise FreezingError(
            f"the model has no parameters in {', '.join(absent)}, so it is not what the plan is for"
        )
    layers = num_vision_layers(model)
    if layers != plan.num_vision_layers:
        raise FreezingError(
            f"the freezing plan is for {plan.num_vision_layers} vision layers, the model has {layers}: "
            "plan again for this backbone"
        )
    for name, parameter in model.named_parameters():
        place = places[name]
        parameter.requires_grad_(plan.trains(place.part, place.layer))
        if not parameter.requires_grad:
            parameter.grad = None


def set_train_mode(model: nn.Module, plan: FreezePlan, mode: bool = True) -> None:
    """Like `model.train(mode)`, but a module whose parameters are all frozen stays in eval mode.

    Sets the modules' flags itself: a `train` in the model may follow freezing rules of its own (lerobot's
    does), or call this function.
    """
    _set_modes(model, mode)
    if mode:
        _freeze_modes(
            model,
            "",
            {name: plan.trains(p.part, p.layer) for name, p in _places(_names(model), plan).items()},
        )


def parameter_groups(
    model: nn.Module, plan: FreezePlan, lr: float, vision_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: what trains and nothing else, the vision encoder at its own rate.

    Parameters keep the model's order, so that a stored optimizer state fits again. Without `vision_lr` all
    get `lr`. In a model with adapters these have groups of their own, and a weight that the plan lets train
    may stand still, because an adapter trains in its place.
    """
    places = _places(_names(model), plan)
    vision_lr = lr if vision_lr is None else vision_lr
    adapted = any(_ADAPTER in name for name in places)
    groups: dict[str, dict[str, Any]] = {
        "main": {"name": "main", "params": [], "lr": lr},
        "vision": {"name": "vision", "params": [], "lr": vision_lr},
        "adapter": {"name": "adapter", "params": [], "lr": lr},
        "vision_adapter": {"name": "vision_adapter", "params": [], "lr": vision_lr},
    }
    for name, parameter in model.named_parameters():
        place = places[name]
        planned = plan.trains(place.part, place.layer)
        if parameter.requires_grad != planned and (parameter.requires_grad or not adapted):
            raise FreezingError(
                f"{name} is not as planned: apply the freezing plan before making an optimizer"
            )
        if parameter.requires_grad:
            group = ("vision_" if place.part in _VISION_PARTS else "") + (
                "adapter" if _ADAPTER in name else ""
            )
            groups[group.strip("_") or "main"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def count_parameters(model: nn.Module, plan: FreezePlan) -> tuple[PartCount, ...]:
    """Parameters by part, in the order of the data; works on a model without memory ("meta") too.

    Adapters count as parameters of the part they belong to, and stand for what trains in it.
    """
    parameters = dict(model.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    if not any(_ADAPTER in name for name in parameters):
        return count_sizes(sizes, plan)
    counts = {count.part: [count.total, 0] for count in count_sizes(sizes, plan)}
    for name, place in _places(sizes, plan).items():
        counts[place.part][1] += sizes[name] if parameters[name].requires_grad else 0
    return tuple(PartCount(part, total, trained) for part, (total, trained) in counts.items())


def count_sizes(sizes: Mapping[str, int], plan: FreezePlan) -> tuple[PartCount, ...]:
    """Like `count_parameters`, for names and sizes, such as those of a file of weights."""
    counts: dict[str, list[int]] = {
        part: [0, 0] for part in (*RULES, *(name for name, _ in plan.extra_parts))
    }
    for name, place in _places(sizes, plan).items():
        counts[place.part][0] += sizes[name]
        counts[place.part][1] += sizes[name] if plan.trains(place.part, place.layer) else 0
    return tuple(PartCount(part, total, trained) for part, (total, trained) in counts.items())


def trained_names(model: nn.Module, plan: FreezePlan) -> dict[str, str]:
    """The parameters that train by the plan, each with its part."""
    places = _places(_names(model), plan)
    return {name: p.part for name, p in places.items() if plan.trains(p.part, p.layer)}


def format_table(plan: FreezePlan, counts: Iterable[PartCount] = ()) -> str:
    """The plan for a log: layers first, then parameters by part, then warnings."""
    layers, total = plan.num_vision_layers, plan.num_vision_layers
    frozen, unfrozen = plan.frozen_layers, plan.unfrozen_layers
    lines = [
        f"vision encoder of {layers} layers, by {plan.decided_by}",
        f"  frozen   {len(frozen)}/{total}: {format_layers(frozen)}",
        f"  unfrozen {len(unfrozen)}/{total}: {format_layers(unfrozen)}",
    ]
    counts = tuple(counts)
    if counts:
        lines += ["", *_count_lines(plan, counts)]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _count_lines(plan: FreezePlan, counts: tuple[PartCount, ...]) -> Iterator[str]:
    row = "{:<22} {:>13} {:>13} {:>13}  {}".format
    yield row("part", "parameters", "trainable", "frozen", "rule").rstrip()
    for count in counts:
        if not count.total:
            continue  # a file of weights may leave out what is unused
        rule = RULES.get(count.part, "added to plain SmolVLA")
        if count.part == VISION_LAYERS:
            rule = f"train: {format_layers(plan.unfrozen_layers)}"
        yield row(count.part, *_numbers(count), rule)
    whole = PartCount("total", sum(c.total for c in counts), sum(c.trained for c in counts))
    yield row(whole.part, *_numbers(whole), "").rstrip()


def _numbers(count: PartCount) -> tuple[str, str, str]:
    return f"{count.total:,}", f"{count.trained:,}", f"{count.total - count.trained:,}"


def _places(names: Iterable[str], plan: FreezePlan) -> dict[str, Place]:
    """Where each parameter belongs."""
    extra = {name: re.compile(rf"(?:^|\.){re.escape(name)}(?:\.|$)") for name, _ in plan.extra_parts}
    names = tuple(names)
    text = dict(_PATTERNS)[TEXT_MODEL]
    numbers = [int(m["layer"]) for name in names if (m := text.search(name)) and m["layer"] is not None]
    last_text_layer = max(numbers, default=-1)
    return {name: _place(name, last_text_layer, extra) for name in names}


def _names(model: nn.Module) -> Iterator[str]:
    return (name for name, _ in model.named_parameters())


def _place(name: str, last_text_layer: int, extra: dict[str, re.Pattern[str]]) -> Place:
    for part, pattern in extra.items():
        if pattern.search(name):
            return Place(part)
    for part, pattern in _PATTERNS:
        match = pattern.search(name)
        if match is None:
            continue
        if part == VISION_LAYERS:
            return Place(part, int(match["layer"]))
        if part == TEXT_MODEL and match["layer"] is not None and int(match["layer"]) == last_text_layer:
            return Place(TEXT_MODEL if match["rest"].startswith(_KEYS_AND_VALUES) else TEXT_UNUSED)
        return Place(part)
    raise FreezingError(
        f"the parameter {name} is no part of SmolVLA: name its module in the plan (FreezePlan.with_extra)"
    )


def _set_modes(module: nn.Module, mode: bool) -> None:
    for each in module.modules():
        each.training = mode


def _freeze_modes(module: nn.Module, prefix: str, trains: dict[str, bool]) -> None:
    below = [value for name, value in trains.items() if name.startswith(prefix)]
    if not below:
        return  # nothing to freeze: keeps its parent's mode
    if not any(below):
        _set_modes(module, False)
        return
    for name, child in module.named_children():
        _freeze_modes(child, f"{prefix}{name}.", trains)
