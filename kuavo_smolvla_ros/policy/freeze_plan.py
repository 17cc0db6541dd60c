"""Which parts of the policy train: from settings to a plan, as pure functions without torch.

Three settings choose the layers of the vision encoder; everything else follows by rule (`RULES`), so that the
same set of layers always gives the same plan, whichever setting named it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.freeze_presets import EXPERT_ONLY, FREEZE_PRESETS, frozen_by_preset

VISION_EMBEDDINGS = "vision_embeddings"
VISION_LAYERS = "vision_layers"
VISION_POST_NORM = "vision_post_layernorm"
CONNECTOR = "connector"
TEXT_MODEL = "text_model"
TEXT_UNUSED = "text_unused"
LM_HEAD = "lm_head"
ACTION_EXPERT = "action_expert"
ACTION_HEADS = "action_heads"
STATE_PROJ = "state_proj"

# Every part of the network in the order of the data, with the rule that decides whether it trains.
RULES: Mapping[str, str] = {
    VISION_EMBEDDINGS: "trains with layer 0, which it feeds",
    VISION_LAYERS: "as chosen",
    VISION_POST_NORM: "trains with the last layer, which feeds it",
    CONNECTOR: "trains unless train_expert_only",
    TEXT_MODEL: "trains unless train_expert_only, or train_language_model is false",
    TEXT_UNUSED: "never: last layer after keys and values, final norm; unused",
    LM_HEAD: "never: unused",
    STATE_PROJ: "trains with train_state_proj",
    ACTION_EXPERT: "always trains",
    ACTION_HEADS: "always trains",
}

# In order of priority; the plain switch freeze_vision_encoder is read where none of them is given.
WAYS = ("unfreeze_vision_layers", "freeze_vision_layers", "freeze_vision_ratio", "preset")
PLAIN_SWITCH = "freeze_vision_encoder"
ON_CONFLICT = ("error", "priority")


class FreezingError(UserError):
    """The freezing settings contradict themselves or the model."""


@dataclass(frozen=True)
class FreezeSettings:
    """What a user may choose; at most one of `WAYS`, unless `on_conflict` is "priority"."""

    unfreeze_vision_layers: Sequence[int] | None = None
    freeze_vision_layers: Sequence[int] | None = None
    freeze_vision_ratio: float | None = None
    freeze_vision_encoder: bool = True
    train_expert_only: bool = False
    train_state_proj: bool = True
    train_language_model: bool = True
    preset: str | None = None
    on_conflict: str = "error"

    def __post_init__(self) -> None:
        for name in WAYS[:2]:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _as_indices(name, getattr(self, name)))
        for name in (
            "freeze_vision_encoder",
            "train_expert_only",
            "train_state_proj",
            "train_language_model",
        ):
            if not isinstance(getattr(self, name), bool):
                raise FreezingError(f"{name} is {getattr(self, name)!r}; it is true or false")
        if self.freeze_vision_ratio is not None:
            _require_ratio(self.freeze_vision_ratio)
        if self.preset is not None and self.preset not in (*FREEZE_PRESETS, EXPERT_ONLY):
            known = ", ".join((*FREEZE_PRESETS, EXPERT_ONLY))
            raise FreezingError(f"the freezing preset {self.preset!r} does not exist; there are {known}")
        if self.on_conflict not in ON_CONFLICT:
            raise FreezingError(f"on_conflict is {self.on_conflict!r}; it is one of {', '.join(ON_CONFLICT)}")

    @property
    def given(self) -> tuple[str, ...]:
        """The ways that are set, by priority."""
        return tuple(name for name in WAYS if getattr(self, name) is not None)


@dataclass(frozen=True)
class FreezePlan:
    """What trains and what does not. Vision layers are counted from the image on, from 0."""

    num_vision_layers: int
    unfrozen_layers: tuple[int, ...]
    trained_parts: frozenset[str]
    decided_by: str
    warnings: tuple[str, ...] = ()
    # Modules that are not part of plain SmolVLA: name in the model, and whether it trains.
    extra_parts: tuple[tuple[str, bool], ...] = ()

    def __post_init__(self) -> None:
        every = range(self.num_vision_layers)
        layers = self.unfrozen_layers
        if len(set(layers)) != len(layers) or sorted(layers) != list(layers) or not set(layers) <= set(every):
            raise FreezingError(
                f"unfrozen layers {list(layers)} are not ascending numbers of {self.num_vision_layers} layers"
            )
        unknown = sorted(self.trained_parts - RULES.keys())
        if unknown:
            raise FreezingError(f"the plan names parts that do not exist: {', '.join(unknown)}")
        if (VISION_LAYERS in self.trained_parts) != bool(layers):
            raise FreezingError("the plan contradicts itself about whether any vision layer trains")

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_vision_layers) if i not in self.unfrozen_layers)

    @property
    def first_trained_layer(self) -> int | None:
        """The lowest vision layer that trains: nothing below it needs a gradient."""
        return self.unfrozen_layers[0] if self.unfrozen_layers else None

    def trains(self, part: str, layer: int | None = None) -> bool:
        """Whether a part trains; for the vision layers one layer must be named."""
        if part == VISION_LAYERS:
            return layer in self.unfrozen_layers
        return part in self.trained_parts or dict(self.extra_parts).get(part, False)

    def with_extra(self, extra: Mapping[str, bool]) -> FreezePlan:
        """The plan for a model with further modules: their names, and whether each trains."""
        clash = sorted(extra.keys() & RULES.keys())
        if clash:
            raise FreezingError(f"extra parts carry the names of plain ones: {', '.join(clash)}")
        return replace(self, extra_parts=tuple(sorted({**dict(self.extra_parts), **extra}.items())))

    def everything_frozen(self) -> FreezePlan:
        """The plan under which nothing of plain SmolVLA trains: for what is trained on top of it."""
        return replace(
            self, unfrozen_layers=(), trained_parts=frozenset(), decided_by="everything frozen", warnings=()
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data for a checkpoint."""
        return {
            "num_vision_layers": self.num_vision_layers,
            "frozen_layers": list(self.frozen_layers),
            "unfrozen_layers": list(self.unfrozen_layers),
            "trained_parts": sorted(self.trained_parts),
            "decided_by": self.decided_by,
            "warnings": list(self.warnings),
            "extra_parts": dict(self.extra_parts),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FreezePlan:
        """Inverse of `to_dict`; refuses a plan that does not fit together."""
        wanted = {field.name for field in fields(cls)} | {"frozen_layers"}
        if wanted != set(data):
            raise FreezingError(
                f"a stored freezing plan has the entries {', '.join(sorted(data))}; "
                f"wanted are {', '.join(sorted(wanted))}"
            )
        plan = cls(
            num_vision_layers=data["num_vision_layers"],
            unfrozen_layers=tuple(data["unfrozen_layers"]),
            trained_parts=frozenset(data["trained_parts"]),
            decided_by=data["decided_by"],
            warnings=tuple(data["warnings"]),
            extra_parts=tuple(sorted(data["extra_parts"].items())),
        )
        if list(plan.frozen_layers) != list(data["frozen_layers"]):
            raise FreezingError(
                f"a stored freezing plan lists {list(data['frozen_layers'])} as frozen, "
                f"which is not the rest of {list(plan.unfrozen_layers)}"
            )
        return plan


def plan_freezing(settings: FreezeSettings, num_vision_layers: int) -> FreezePlan:
    """Decide what trains in a policy whose vision encoder has this many layers."""
    if num_vision_layers < 1:
        raise FreezingError(f"the vision encoder has {num_vision_layers} layers; there is nothing to plan")
    warnings: list[str] = []
    way = _choose_way(settings, warnings)
    unfrozen = _unfrozen(settings, way, num_vision_layers)
    expert_only = settings.train_expert_only or (way == "preset" and settings.preset == EXPERT_ONLY)
    _check_combination(settings, way, unfrozen, num_vision_layers, expert_only, warnings)
    if expert_only:
        unfrozen = ()

    trained = {ACTION_EXPERT, ACTION_HEADS}
    if settings.train_state_proj:
        trained.add(STATE_PROJ)
    if not expert_only:
        trained |= {CONNECTOR, TEXT_MODEL} if settings.train_language_model else {CONNECTOR}
    if unfrozen:
        trained.add(VISION_LAYERS)
    if 0 in unfrozen:
        trained.add(VISION_EMBEDDINGS)
    if num_vision_layers - 1 in unfrozen:
        trained.add(VISION_POST_NORM)
    above = [i for i in range(num_vision_layers) if unfrozen and i > unfrozen[0] and i not in unfrozen]
    if above:
        warnings.append(
            f"frozen above the trained layer {unfrozen[0]}: {format_layers(above)}; the gradient runs "
            "through these layers, so freezing them saves optimizer memory but no activations"
        )
    decided_by = f"preset {settings.preset}" if way == "preset" else way
    return FreezePlan(num_vision_layers, unfrozen, frozenset(trained), decided_by, tuple(warnings))


def format_layers(layers: Iterable[int]) -> str:
    """Layer numbers in ascending order with runs drawn together: 0-2, 5; "none" where there are none."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _as_indices(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise FreezingError(f"{name} is {value!r}; it is a list of layer numbers, such as [-1, -2, -3]")
    items = tuple(value)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise FreezingError(f"{name} holds {item!r}; a layer number is a whole number, such as 0 or -1")
    return items


def _require_ratio(ratio: object) -> None:
    # The comparison is false for NaN as well.
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 <= ratio <= 1.0:
        raise FreezingError(
            f"freeze_vision_ratio is {ratio!r}; it is the share of layers to freeze, 0.0 (none) to 1.0 (all)"
        )


def _choose_way(settings: FreezeSettings, warnings: list[str]) -> str:
    given = settings.given
    if not given:
        return PLAIN_SWITCH
    if len(given) > 1:
        if settings.on_conflict == "error":
            raise FreezingError(
                f"{' and '.join(given)} are given at the same time: set all but one of them to null "
                f"(or on_conflict to priority, which keeps {given[0]})"
            )
        warnings.append(f"{given[0]} is used, {', '.join(given[1:])} ignored: it comes first in priority")
    return given[0]


def _unfrozen(settings: FreezeSettings, way: str, count: int) -> tuple[int, ...]:
    if way == "unfreeze_vision_layers":
        return tuple(sorted(_resolve(way, settings.unfreeze_vision_layers or (), count)))
    if way == "freeze_vision_layers":
        frozen = _resolve(way, settings.freeze_vision_layers or (), count)
        return tuple(i for i in range(count) if i not in frozen)
    if way == "freeze_vision_ratio":
        # To the nearest whole layer; half a layer is frozen. The small slack takes 0.7 * 15 for what it is.
        return tuple(range(math.floor((settings.freeze_vision_ratio or 0.0) * count + 0.5 + 1e-9), count))
    if way == "preset":
        return tuple(range(frozen_by_preset(settings.preset or "", count), count))
    return () if settings.freeze_vision_encoder else tuple(range(count))


def _resolve(name: str, indices: Iterable[int], count: int) -> set[int]:
    """Indices from either end to layer numbers, each at most once."""
    seen: dict[int, int] = {}
    for index in indices:
        if not -count <= index < count:
            raise FreezingError(
                f"{name} holds {index}, but the vision encoder has {count} layers: "
                f"numbers go from 0 to {count - 1}, or from -1 (the last) to {-count}"
            )
        layer = index % count
        if layer in seen:
            twice = (
                f"{index} twice"
                if seen[layer] == index
                else f"{seen[layer]} and {index}, which are the same layer"
            )
            raise FreezingError(f"{name} holds {twice}; name each layer once")
        seen[layer] = index
    return set(seen)


def _check_combination(
    settings: FreezeSettings,
    way: str,
    unfrozen: tuple[int, ...],
    count: int,
    expert_only: bool,
    warnings: list[str],
) -> None:
    if way == "preset" and settings.preset == EXPERT_ONLY and not settings.train_state_proj:
        raise FreezingError(f"the preset {EXPERT_ONLY} trains state_proj, but train_state_proj is false")
    if expert_only and unfrozen:
        if way != PLAIN_SWITCH:
            raise FreezingError(
                f"train_expert_only freezes the whole vision encoder, but {way} would train layers "
                f"{format_layers(unfrozen)}: set train_expert_only to false, or take {way} away"
            )
        warnings.append("train_expert_only freezes the vision encoder; freeze_vision_encoder: false is void")
    if way in WAYS[:2] and not getattr(settings, way):
        warnings.append(f"{way} is an empty list: all {count} layers {'train' if unfrozen else 'are frozen'}")
