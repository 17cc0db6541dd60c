"""What is refused, and that nothing bad is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal, Terms, chunk_from_points, refuse
from kuavo_smolvla_ros.control.reasons import RefusalReason
from kuavo_smolvla_ros.robot.limits import Limits

S = 1_000_000_000
NOW = 1_000 * S
NAMES = ("a", "b", "grip")


def limits() -> Limits:
    return Limits(NAMES, np.array([-1, -1, 0.0]), np.array([1, 1, 1.0]), np.ones(3), np.ones(3))


def terms(**changes: Any) -> Terms:
    given: dict[str, Any] = {
        "limits": limits(),
        "fingerprint": "f00d",
        "max_excess": 2.0,
        "pose_at": np.array([0, 1]),
        "max_distance": 0.5,
        "max_age_s": 3.0,
        "max_ahead_s": 0.05,
    }
    return Terms(**{**given, **changes})


def chunk(**changes: Any) -> ActionChunk:
    given: dict[str, Any] = {
        "stamp_ns": NOW - S // 10,
        "times_ns": np.arange(10) * S // 10,
        "names": NAMES,
        "values": np.linspace(0, 0.3, 10)[:, None] * np.ones(3),
        "task": "task1",
        "sequence": 5,
        "fingerprint": "f00d",
    }
    return ActionChunk(**{**given, **changes})


def values_with(row: int, column: int, value: float) -> np.ndarray:
    values = chunk().values.copy()
    values[row, column] = value
    return values


POSE = np.zeros(2)
BAD: list[tuple[RefusalReason, str, ActionChunk]] = [
    (RefusalReason.FOREIGN_FINGERPRINT, "beef", chunk(fingerprint="beef")),
    (RefusalReason.FOREIGN_FINGERPRINT, "robot ''", chunk(fingerprint="")),
    (RefusalReason.WRONG_NAMES, "missing grip; unknown none", chunk(names=("a", "b"))),
    (RefusalReason.WRONG_NAMES, "missing b; unknown c", chunk(names=("a", "c", "grip"))),
    (RefusalReason.WRONG_NAMES, "another order", chunk(names=("b", "a", "grip"))),
    (RefusalReason.WRONG_NAMES, "unknown none", chunk(names=())),
    (RefusalReason.WRONG_SHAPE, "(10, 2)", chunk(values=np.zeros((10, 2)))),
    (RefusalReason.WRONG_SHAPE, "(10, 4)", chunk(values=np.zeros((10, 4)))),
    (RefusalReason.WRONG_SHAPE, "(9, 3)", chunk(values=np.zeros((9, 3)))),
    (RefusalReason.WRONG_SHAPE, "(30,)", chunk(values=np.zeros(30))),
    (RefusalReason.WRONG_SHAPE, "(10, 3, 1)", chunk(values=np.zeros((10, 3, 1)))),
    (RefusalReason.WRONG_SHAPE, "(10, 1)", chunk(times_ns=np.zeros((10, 1), dtype=np.int64))),
    (RefusalReason.WRONG_SHAPE, "two points", chunk(values=np.zeros((1, 3)), times_ns=np.array([0]))),
    (
        RefusalReason.WRONG_SHAPE,
        "two points",
        chunk(values=np.zeros((0, 3)), times_ns=np.array([], dtype=np.int64)),
    ),
    (RefusalReason.TOO_LONG, "1001 points", chunk(values=np.zeros((1001, 3)), times_ns=np.arange(1001))),
    (RefusalReason.TOO_LONG, "100.0 s", chunk(values=np.zeros((2, 3)), times_ns=np.array([0, 100 * S]))),
    (RefusalReason.TIMES_NOT_INCREASING, "increase", chunk(times_ns=np.zeros(10, dtype=np.int64))),
    (RefusalReason.TIMES_NOT_INCREASING, "increase", chunk(times_ns=np.arange(10)[::-1] * S // 10)),
    (RefusalReason.TIMES_NOT_INCREASING, "increase", chunk(times_ns=(np.arange(10) - 1) * S // 10)),
    (RefusalReason.NON_FINITE, "a is nan at point 3", chunk(values=values_with(3, 0, np.nan))),
    (RefusalReason.NON_FINITE, "grip is inf at point 9", chunk(values=values_with(9, 2, np.inf))),
    (RefusalReason.NON_FINITE, "b is -inf at point 0", chunk(values=values_with(0, 1, -np.inf))),
    (RefusalReason.OUTSIDE_LIMITS, "b = 57.3 at point 2", chunk(values=values_with(2, 1, 57.3))),
    (RefusalReason.OUTSIDE_LIMITS, "a = -1.7e+308", chunk(values=values_with(2, 0, -1.7e308))),
    (RefusalReason.FROM_THE_FUTURE, "ahead", chunk(stamp_ns=NOW + S)),
    (RefusalReason.FROM_THE_FUTURE, "ahead", chunk(stamp_ns=2**70)),
    (RefusalReason.EXPIRED, "ended 0.100 s ago", chunk(stamp_ns=NOW - S)),
    (RefusalReason.EXPIRED, "ago", chunk(stamp_ns=NOW - 9 * S // 10)),
    (RefusalReason.EXPIRED, "ago", chunk(stamp_ns=-(2**70))),
    (RefusalReason.STALE, "observation 4.000 s old", chunk(stamp_ns=NOW - 4 * S, times_ns=np.arange(10) * S)),
    (RefusalReason.TOO_FAR_FROM_POSE, "b is 0.60", chunk(values=np.tile([0, 0.6, 0], (10, 1)))),
]


@pytest.mark.parametrize(
    ("reason", "words", "bad"), BAD, ids=[f"{r.value}-{i}" for i, (r, _, _) in enumerate(BAD)]
)
def test_refused_with_its_reason_and_a_sentence(reason: RefusalReason, words: str, bad: ActionChunk) -> None:
    refusal = refuse(bad, terms(), NOW, measured=POSE)
    assert refusal is not None
    assert refusal.reason is reason
    assert words in refusal.detail
    assert refusal.sequence == bad.sequence


def test_a_good_chunk_is_not_refused() -> None:
    assert refuse(chunk(), terms(), NOW, newest=(NOW - S, 4), measured=POSE) is None


@pytest.mark.parametrize(
    "good",
    [
        chunk(stamp_ns=NOW + S // 25),  # within the tolerance of two clocks
        chunk(values=values_with(4, 0, 5e-324)),
        chunk(values=np.tile([0.49, -0.49, 1.0], (10, 1))),
        chunk(values=values_with(5, 1, 2.9)),  # outside by less than max_excess: the guard's business
        chunk(times_ns=np.arange(10) * S // 10 + S // 4),  # begins ahead of now
        chunk(task=""),
    ],
)
def test_odd_but_usable_chunks_are_not_refused(good: ActionChunk) -> None:
    assert refuse(good, terms(), NOW, measured=POSE) is None


def test_the_distance_that_counts_is_that_of_the_target_of_this_moment() -> None:
    times, steps = np.arange(10) * S // 10, np.linspace(0, 0.9, 10)
    moving = chunk(times_ns=times, values=steps[:, None] * [1, 0, 0])
    early = replace(moving, stamp_ns=NOW - 4 * S // 10)
    late = replace(moving, stamp_ns=NOW - 6 * S // 10)
    assert refuse(early, terms(), NOW, measured=POSE) is None
    refusal = refuse(late, terms(), NOW, measured=POSE)
    assert refusal is not None
    assert refusal.reason is RefusalReason.TOO_FAR_FROM_POSE
    assert refuse(late, terms(), NOW, measured=np.array([0.6, 0.0])) is None


def test_a_gripper_far_from_its_target_is_nothing_unusual() -> None:
    assert refuse(chunk(values=np.tile([0, 0, 1.0], (10, 1))), terms(), NOW, measured=POSE) is None


@pytest.mark.parametrize(
    ("stamp_ns", "sequence", "reason"),
    [
        (NOW - 10, 5, RefusalReason.DUPLICATE),
        (NOW - 10, 4, RefusalReason.OUT_OF_ORDER),
        (NOW - 11, 6, RefusalReason.OUT_OF_ORDER),
        (NOW - 10, 6, None),  # the same observation, thought about again
        (NOW - 9, 0, None),  # a policy that was started again counts from zero
    ],
)
def test_order_is_that_of_observations(stamp_ns: int, sequence: int, reason: RefusalReason | None) -> None:
    refusal = refuse(
        chunk(stamp_ns=stamp_ns, sequence=sequence), terms(), NOW, newest=(NOW - 10, 5), measured=POSE
    )
    assert (None if refusal is None else refusal.reason) is reason


def test_rows_of_different_widths_are_refused_before_they_are_an_array() -> None:
    given: dict[str, Any] = {
        "stamp_ns": NOW,
        "names": NAMES,
        "task": "",
        "sequence": 3,
        "fingerprint": "f00d",
    }
    ragged = chunk_from_points([[0, 0, 0], [0, 0]], times_ns=[0, 1], **given)
    assert isinstance(ragged, Refusal)
    assert ragged.reason is RefusalReason.WRONG_SHAPE
    even = chunk_from_points([[0, 0, 0], [0, 0, 0.5]], times_ns=[0, S], **given)
    assert isinstance(even, ActionChunk)
    assert even.values.dtype == np.float64
    empty = chunk_from_points([], times_ns=[], **given)
    assert isinstance(empty, ActionChunk)
    refusal = refuse(empty, terms(), NOW)
    assert refusal is not None
    assert refusal.reason is RefusalReason.WRONG_SHAPE


Spoil = Callable[[ActionChunk, st.DataObject], ActionChunk]


def _spoil_value(good: ActionChunk, data: st.DataObject) -> ActionChunk:
    values = good.values.copy()
    row, column = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 2))
    values[row, column] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 3.1e5, -1e300]))
    return replace(good, values=values)


def _spoil_width(good: ActionChunk, data: st.DataObject) -> ActionChunk:
    shape = data.draw(st.tuples(st.integers(0, 12), st.integers(0, 5)).filter(lambda s: s != (10, 3)))
    return replace(good, values=np.zeros(shape))


def _spoil_names(good: ActionChunk, data: st.DataObject) -> ActionChunk:
    names = data.draw(st.lists(st.sampled_from(["a", "b", "grip", "c"]), max_size=4).map(tuple))
    return replace(good, names=names) if names != NAMES else replace(good, names=())


def _spoil_times(good: ActionChunk, data: st.DataObject) -> ActionChunk:
    times = good.times_ns.copy()
    at = data.draw(st.integers(1, 9))
    times[at] = times[at - 1] - data.draw(st.integers(0, S))
    return replace(good, times_ns=times)


def _spoil_fingerprint(good: ActionChunk, data: st.DataObject) -> ActionChunk:
    return replace(good, fingerprint=data.draw(st.text(max_size=8).filter(lambda t: t != "f00d")))


def _spoil_stamp(good: ActionChunk, data: st.DataObject) -> ActionChunk:
    early = st.integers(-(2**65), NOW - S)
    return replace(good, stamp_ns=data.draw(st.one_of(early, st.integers(NOW + S // 10, 2**65))))


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    spoils=st.lists(
        st.sampled_from(
            [_spoil_value, _spoil_width, _spoil_names, _spoil_times, _spoil_fingerprint, _spoil_stamp]
        ),
        min_size=1,
        max_size=2,
        unique=True,
    ),
)
def test_a_spoilt_chunk_is_always_refused_and_never_raises(data: st.DataObject, spoils: list[Spoil]) -> None:
    bad = chunk()
    if _spoil_width in spoils:  # the other spoils reach into the values
        spoils = [_spoil_width]
    for spoil in spoils:
        bad = spoil(bad, data)
    assert refuse(bad, terms(), NOW, measured=POSE) is not None
