"""What trains under which settings: pure functions, no model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

ALWAYS = {ACTION_EXPERT, ACTION_HEADS, STATE_PROJ}


def layers(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


CASES = [
    # the three ways, from either end
    ({"unfreeze_vision_layers": [-1, -2, -3]}, 12, layers(9, 11)),
    ({"unfreeze_vision_layers": list(range(-1, -10, -1))}, 12, layers(3, 11)),
    ({"unfreeze_vision_layers": [11, 0, -2]}, 12, (0, 10, 11)),
    ({"unfreeze_vision_layers": []}, 12, ()),
    ({"unfreeze_vision_layers": [-12]}, 12, (0,)),
    ({"freeze_vision_layers": [0, 1, 2]}, 12, layers(3, 11)),
    ({"freeze_vision_layers": [-1]}, 12, layers(0, 10)),
    ({"freeze_vision_layers": []}, 12, layers(0, 11)),
    ({"freeze_vision_layers": list(range(12))}, 12, ()),
    ({"freeze_vision_ratio": 0.0}, 12, layers(0, 11)),
    ({"freeze_vision_ratio": 1.0}, 12, ()),
    ({"freeze_vision_ratio": 0.25}, 12, layers(3, 11)),
    ({"freeze_vision_ratio": 0.75}, 12, layers(9, 11)),
    ({"freeze_vision_ratio": 0.3}, 12, layers(4, 11)),  # 3.6 layers
    ({"freeze_vision_ratio": 0.375}, 12, layers(5, 11)),  # 4.5 layers: the half is frozen
    ({"freeze_vision_ratio": 0.7}, 15, layers(11, 14)),  # 10.499999 in floating point, 10.5 by intent
    ({"freeze_vision_ratio": 1}, 12, ()),
    # the plain switch, where nothing else is given
    ({"freeze_vision_encoder": True}, 12, ()),
    ({"freeze_vision_encoder": False}, 12, layers(0, 11)),
    # an encoder of 27 layers
    ({"unfreeze_vision_layers": list(range(-1, -10, -1))}, 27, layers(18, 26)),
    ({"freeze_vision_layers": [0, 1, 2, 3, 4]}, 27, layers(5, 26)),
    ({"freeze_vision_ratio": 0.33}, 27, layers(9, 26)),
    ({"unfreeze_vision_layers": [-27, 26]}, 27, (0, 26)),
    # any of them takes precedence over the plain switch, whatever that says
    ({"unfreeze_vision_layers": [-1], "freeze_vision_encoder": True}, 12, (11,)),
    ({"unfreeze_vision_layers": [-1], "freeze_vision_encoder": False}, 12, (11,)),
    # presets
    ({"preset": "balanced"}, 12, layers(3, 11)),
    ({"preset": "balanced"}, 27, layers(7, 26)),
    ({"preset": "balanced"}, 4, layers(1, 3)),
    ({"preset": "expert_only"}, 12, ()),
    # consistent with training the expert only
    ({"train_expert_only": True}, 12, ()),
    ({"train_expert_only": True, "freeze_vision_ratio": 1.0}, 12, ()),
    ({"train_expert_only": True, "unfreeze_vision_layers": []}, 12, ()),
    ({"train_expert_only": True, "freeze_vision_encoder": False}, 12, ()),
]


@pytest.mark.parametrize(("settings", "count", "unfrozen"), CASES)
def test_layers_that_train(settings: dict, count: int, unfrozen: tuple[int, ...]) -> None:
    plan = plan_freezing(FreezeSettings(**settings), count)
    assert plan.unfrozen_layers == unfrozen
    assert plan.frozen_layers == tuple(i for i in range(count) if i not in unfrozen)
    assert plan.first_trained_layer == (unfrozen[0] if unfrozen else None)
    assert [plan.trains(VISION_LAYERS, i) for i in range(count)] == [i in unfrozen for i in range(count)]


PARTS = [
    # the last layers only: below the lowest trained layer nothing trains
    ({"unfreeze_vision_layers": [-1]}, ALWAYS | {CONNECTOR, TEXT_MODEL, VISION_LAYERS, VISION_POST_NORM}),
    ({"freeze_vision_layers": [0]}, ALWAYS | {CONNECTOR, TEXT_MODEL, VISION_LAYERS, VISION_POST_NORM}),
    # embeddings go with layer 0, the last norm with the last layer
    ({"unfreeze_vision_layers": [0]}, ALWAYS | {CONNECTOR, TEXT_MODEL, VISION_LAYERS, VISION_EMBEDDINGS}),
    ({"unfreeze_vision_layers": [5]}, ALWAYS | {CONNECTOR, TEXT_MODEL, VISION_LAYERS}),
    (
        {"freeze_vision_encoder": False},
        ALWAYS | {CONNECTOR, TEXT_MODEL, VISION_LAYERS, VISION_EMBEDDINGS, VISION_POST_NORM},
    ),
    ({"freeze_vision_encoder": True}, ALWAYS | {CONNECTOR, TEXT_MODEL}),
    ({"unfreeze_vision_layers": [5], "train_language_model": False}, ALWAYS | {CONNECTOR, VISION_LAYERS}),
    ({"freeze_vision_encoder": True, "train_language_model": False}, ALWAYS | {CONNECTOR}),
    ({"train_expert_only": True, "train_language_model": False}, ALWAYS),
    ({"train_expert_only": True}, ALWAYS),
    ({"preset": "expert_only"}, ALWAYS),
    ({"train_expert_only": True, "train_state_proj": False}, ALWAYS - {STATE_PROJ}),
]


@pytest.mark.parametrize(("settings", "trained"), PARTS)
def test_everything_outside_the_layers_follows_by_rule(settings: dict, trained: set[str]) -> None:
    plan = plan_freezing(FreezeSettings(**settings), 12)
    assert plan.trained_parts == trained
    assert {part for part in RULES if part != VISION_LAYERS and plan.trains(part)} == trained - {
        VISION_LAYERS
    }


@given(st.integers(1, 30), st.data())
def test_unused_parameters_never_train(count: int, data: st.DataObject) -> None:
    unfrozen = data.draw(st.sets(st.integers(0, count - 1)))
    plan = plan_freezing(FreezeSettings(unfreeze_vision_layers=sorted(unfrozen)), count)
    assert not plan.trains(LM_HEAD)
    assert not plan.trains(TEXT_UNUSED)


ERRORS = [
    ({"unfreeze_vision_layers": [12]}, "unfreeze_vision_layers holds 12.*has 12 layers.*0 to 11.*-12"),
    ({"unfreeze_vision_layers": [-13]}, "holds -13"),
    ({"freeze_vision_layers": [27]}, "freeze_vision_layers holds 27"),
    ({"unfreeze_vision_layers": [3, 3]}, "holds 3 twice"),
    ({"unfreeze_vision_layers": [-1, 11]}, "holds -1 and 11, which are the same layer"),
    ({"freeze_vision_layers": [0, -12]}, "0 and -12, which are the same layer"),
    ({"unfreeze_vision_layers": "[-1]"}, "is '\\[-1\\]'; it is a list"),
    ({"unfreeze_vision_layers": -1}, "it is a list"),
    ({"unfreeze_vision_layers": [1.0]}, "holds 1.0"),
    ({"unfreeze_vision_layers": [True]}, "holds True"),
    ({"freeze_vision_layers": ["0"]}, "holds '0'"),
    ({"freeze_vision_ratio": -0.01}, "freeze_vision_ratio is -0.01"),
    ({"freeze_vision_ratio": 1.01}, "freeze_vision_ratio is 1.01"),
    ({"freeze_vision_ratio": math.nan}, "freeze_vision_ratio is nan"),
    ({"freeze_vision_ratio": math.inf}, "freeze_vision_ratio is inf"),
    ({"freeze_vision_ratio": "0.5"}, "freeze_vision_ratio is '0.5'"),
    ({"freeze_vision_ratio": True}, "freeze_vision_ratio is True"),
    ({"preset": "bold"}, "'bold' does not exist; there are very_conservative, .*expert_only"),
    ({"freeze_vision_encoder": None}, "freeze_vision_encoder is None"),
    ({"train_expert_only": "false"}, "train_expert_only is 'false'"),
    ({"train_language_model": None}, "train_language_model is None"),
    ({"on_conflict": "ignore"}, "on_conflict is 'ignore'"),
    # more than one way
    (
        {"unfreeze_vision_layers": [-1], "freeze_vision_layers": [0]},
        "unfreeze_vision_layers and freeze_vision_layers are given",
    ),
    ({"unfreeze_vision_layers": [], "freeze_vision_ratio": 0.0}, "given at the same time"),
    (
        {"freeze_vision_layers": [0], "freeze_vision_ratio": 0.5},
        "freeze_vision_layers and freeze_vision_ratio",
    ),
    ({"freeze_vision_ratio": 0.5, "preset": "balanced"}, "freeze_vision_ratio and preset"),
    # trains nothing of what was asked for
    ({"train_expert_only": True, "unfreeze_vision_layers": [-1]}, "train_expert_only freezes the whole.*11"),
    ({"train_expert_only": True, "freeze_vision_layers": [0]}, "train layers 1-11"),
    ({"train_expert_only": True, "freeze_vision_ratio": 0.5}, "train layers 6-11"),
    ({"train_expert_only": True, "preset": "balanced"}, "train layers 3-11"),
    ({"preset": "expert_only", "train_state_proj": False}, "trains state_proj"),
]


@pytest.mark.parametrize(("settings", "message"), ERRORS)
def test_what_cannot_be_meant_is_an_error_that_says_so(settings: dict, message: str) -> None:
    with pytest.raises(FreezingError, match=message):
        plan_freezing(FreezeSettings(**settings), 12)


def test_an_encoder_without_layers_is_an_error() -> None:
    with pytest.raises(FreezingError, match="0 layers"):
        plan_freezing(FreezeSettings(), 0)


ALL_WAYS = {
    "unfreeze_vision_layers": [-1],
    "freeze_vision_layers": [0],
    "freeze_vision_ratio": 0.5,
    "preset": "conservative",
}


@pytest.mark.parametrize("first", range(3))
def test_priority_decides_where_it_is_asked_for(first: int) -> None:
    names = list(ALL_WAYS)[first:]
    several = {name: ALL_WAYS[name] for name in names}
    plan = plan_freezing(FreezeSettings(**several, on_conflict="priority"), 12)
    alone = plan_freezing(FreezeSettings(**{names[0]: ALL_WAYS[names[0]]}), 12)
    assert plan.unfrozen_layers == alone.unfrozen_layers
    assert plan.decided_by == names[0]
    assert f"{names[0]} is used, {', '.join(names[1:])} ignored" in plan.warnings[0]


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"unfreeze_vision_layers": []}, "empty list: all 12 layers are frozen"),
        ({"freeze_vision_layers": []}, "empty list: all 12 layers train"),
        ({"freeze_vision_layers": [-1, 3]}, "frozen above the trained layer 0: 3, 11;"),
        ({"train_expert_only": True, "freeze_vision_encoder": False}, "freeze_vision_encoder: false is void"),
    ],
)
def test_what_is_odd_but_possible_is_a_warning(settings: dict, warning: str) -> None:
    (found,) = plan_freezing(FreezeSettings(**settings), 12).warnings
    assert warning in found


@pytest.mark.parametrize(
    "settings",
    [
        {"unfreeze_vision_layers": [-1, -2]},
        {"freeze_vision_ratio": 0.5},
        {"preset": "expert_only"},
        {"freeze_vision_encoder": False},
    ],
)
def test_what_is_ordinary_warns_of_nothing(settings: dict) -> None:
    assert plan_freezing(FreezeSettings(**settings), 12).warnings == ()


def indices(count: int) -> st.SearchStrategy[list[int]]:
    """Lists of layers, each once, counted from either end, in any order."""
    return st.sets(st.integers(0, count - 1)).flatmap(
        lambda chosen: st.tuples(
            st.permutations(sorted(chosen)), st.lists(st.booleans(), min_size=count, max_size=count)
        ).map(lambda pair: [i - count if end else i for i, end in zip(pair[0], pair[1], strict=False)])
    )


counts_and_indices = st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), indices(count)))


@given(counts_and_indices)
def test_frozen_and_unfrozen_layers_partition_the_encoder(case: tuple[int, list[int]]) -> None:
    count, chosen = case
    plan = plan_freezing(FreezeSettings(unfreeze_vision_layers=chosen), count)
    assert sorted((*plan.frozen_layers, *plan.unfrozen_layers)) == list(range(count))
    assert set(plan.unfrozen_layers) == {i % count for i in chosen}


@given(counts_and_indices)
def test_the_same_layers_give_the_same_plan_whichever_way_names_them(case: tuple[int, list[int]]) -> None:
    count, chosen = case
    by_unfreezing = plan_freezing(FreezeSettings(unfreeze_vision_layers=chosen), count)
    by_freezing = plan_freezing(FreezeSettings(freeze_vision_layers=by_unfreezing.frozen_layers), count)
    again = plan_freezing(FreezeSettings(unfreeze_vision_layers=by_unfreezing.unfrozen_layers), count)
    same = {"decided_by": "", "warnings": ()}
    assert replace(by_freezing, **same) == replace(by_unfreezing, **same) == replace(again, **same)


@given(st.integers(1, 40), st.floats(0, 1))
def test_a_ratio_freezes_the_first_layers_to_the_nearest_whole(count: int, ratio: float) -> None:
    plan = plan_freezing(FreezeSettings(freeze_vision_ratio=ratio), count)
    frozen = len(plan.frozen_layers)
    assert plan.frozen_layers == tuple(range(frozen))
    assert abs(frozen - ratio * count) <= 0.5 + 1e-8


@given(counts_and_indices, st.booleans(), st.dictionaries(st.text(min_size=1), st.booleans(), max_size=3))
def test_a_plan_survives_storage(case: tuple[int, list[int]], state_proj: bool, extra: dict) -> None:
    count, chosen = case
    settings = FreezeSettings(unfreeze_vision_layers=chosen, train_state_proj=state_proj)
    plan = plan_freezing(settings, count)
    plan = plan.with_extra({name: trains for name, trains in extra.items() if name not in RULES})
    assert FreezePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def stored(**changes: object) -> dict:
    return {**plan_freezing(FreezeSettings(preset="balanced"), 12).to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"num_vision_layers": 12}, "has the entries num_vision_layers; wanted are"),
        (stored(more=1), "has the entries .*more"),
        (stored(frozen_layers=[0, 1]), r"lists \[0, 1\] as frozen"),
        (stored(unfrozen_layers=[12], frozen_layers=list(range(12))), "not ascending numbers of 12 layers"),
        (stored(unfrozen_layers=[5, 4]), "not ascending"),
        (stored(unfrozen_layers=[4, 4]), "not ascending"),
        (stored(unfrozen_layers=[], frozen_layers=list(range(12))), "contradicts itself"),
        (stored(trained_parts=["vision_layers", "tail"]), "do not exist: tail"),
    ],
)
def test_a_stored_plan_that_does_not_fit_together_is_refused(data: dict, message: str) -> None:
    with pytest.raises(FreezingError, match=message):
        FreezePlan.from_dict(data)


def test_everything_frozen_leaves_only_extra_parts() -> None:
    plan = plan_freezing(FreezeSettings(preset="balanced"), 12).everything_frozen()
    plan = plan.with_extra({"delta_expert": True, "delta_scale": False})
    assert plan.frozen_layers == tuple(range(12))
    assert not any(plan.trains(part, layer) for part in RULES for layer in range(12))
    assert plan.trains("delta_expert")
    assert not plan.trains("delta_scale")


def test_extra_parts_may_not_take_the_names_of_plain_ones() -> None:
    with pytest.raises(FreezingError, match="connector"):
        plan_freezing(FreezeSettings(), 12).with_extra({"connector": True})


@pytest.mark.parametrize(
    ("given_layers", "text"), [([], "none"), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 1, 5, 7, 8], "0-1, 5, 7-8")]
)
def test_layers_are_written_as_runs(given_layers: list[int], text: str) -> None:
    assert format_layers(given_layers) == text
