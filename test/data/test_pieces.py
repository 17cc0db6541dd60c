"""Usable pieces are cut into candidates: what separates, what is trimmed, what is left out and why."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.findings import Code, Severity
from kuavo_smolvla_ros.data.notes import NS_PER_S, Notes
from kuavo_smolvla_ros.data.pieces import SLIVER_S, Candidate, Cutter, Piece
from kuavo_smolvla_ros.data.sampling import Stretch
from kuavo_smolvla_ros.robot.spec import load_spec

SPEC = load_spec("kuavo_sim")
FPS = SPEC.fps
START_NS = 5_000 * NS_PER_S
# Seconds of motion and of standstill, in turns.
PHASES = st.lists(st.tuples(st.booleans(), st.integers(1, 150)), min_size=1, max_size=6)


def piece(*phases: tuple[bool, int], before: int = 0) -> Piece:
    """Steps in which one joint moves (True) or stands, behind `before` steps that belong to no piece."""
    moves = np.concatenate([np.full(steps, is_moving) for is_moving, steps in phases])
    path = np.concatenate([np.zeros(before), np.cumsum(moves * 0.1)])
    vectors = np.repeat(path[:, None], 2, axis=1)
    grid_ns = START_NS + np.arange(len(path)) * round(NS_PER_S / FPS)
    samples: Any = type("Samples", (), {"grid_ns": grid_ns})
    nothing = np.zeros(len(path), dtype=np.bool_)
    stretch = Stretch(cast("Any", samples), ~nothing, {}, vectors, vectors, nothing, {})
    return Piece(stretch, slice(before, len(path)))


def cut(one: Piece, **rules: Any) -> list[Candidate]:
    return Cutter(FPS, EpisodeSettings(**rules), Notes(SPEC, "some.mcap")).cut(one)


def codes(candidate: Candidate) -> list[Code]:
    return [finding.code for finding in candidate.findings]


@given(PHASES, st.integers(0, 20), st.booleans())
def test_candidates_lie_in_the_piece_in_order_and_say_why_where_they_are_none(
    phases: list[tuple[bool, int]], before: int, trim: bool
) -> None:
    whole = piece(*phases, before=before)
    candidates = cut(whole, trim_idle=trim)
    for candidate in candidates:
        inner = candidate.piece.steps
        assert whole.steps.start <= inner.start < inner.stop <= whole.steps.stop
        assert candidate.piece.stretch is whole.stretch
        seconds = len(candidate.piece) / FPS
        if candidate.reason is None:
            assert seconds >= EpisodeSettings().min_episode_s
            assert np.ptp(whole.stretch.state[inner]) > EpisodeSettings().still_tolerance
        else:
            assert candidate.findings[-1].sentence == candidate.reason
    for one, other in pairwise(candidates):
        assert one.piece.steps.stop <= other.piece.steps.start
    if not candidates:
        assert len(whole) / FPS < SLIVER_S


@given(PHASES)
def test_what_moves_is_kept_where_it_is_trimmed(phases: list[tuple[bool, int]]) -> None:
    whole = piece(*phases)
    kept = np.zeros(len(whole), dtype=np.bool_)
    for candidate in cut(whole, min_episode_s=0.1, max_pause_s=None):
        kept[candidate.piece.steps] = True
    moved = np.flatnonzero(np.abs(np.diff(whole.stretch.state[:, 0])) > 0.05)
    if len(whole) / FPS >= SLIVER_S and moved.size:
        assert kept[moved].all()
        assert kept[moved + 1].all()


def test_a_long_standstill_separates_and_a_short_one_does_not() -> None:
    long, short = round(10.1 * FPS), round(9.9 * FPS)
    first, second = cut(piece((True, 30), (False, long), (True, 30)))
    assert (first.reason, second.reason) == (None, None)
    assert Code.PART not in codes(first)
    assert Code.PART in codes(second)
    assert len(cut(piece((True, 30), (False, short), (True, 30)))) == 1
    assert len(cut(piece((True, 30), (False, long), (True, 30)), max_pause_s=None)) == 1


def test_idle_ends_go_but_for_the_margin_and_it_is_said_how_much() -> None:
    (only,) = cut(piece((False, 50), (True, 40), (False, 30)))
    margin = round(EpisodeSettings().idle_margin_s * FPS)
    assert abs(len(only.piece) - (40 + 2 * margin)) <= 1
    assert codes(only) == [Code.TRIMMED]
    (kept,) = cut(piece((False, 50), (True, 40), (False, 30)), trim_idle=False)
    assert len(kept.piece) == 120
    assert not kept.findings


@pytest.mark.parametrize(
    ("phases", "code", "says"),
    [
        (((False, 60),), Code.STATIC, "nothing moves"),
        (((True, 10),), Code.TOO_SHORT, "only 1.0 s"),
        (((False, 60), (True, 2), (False, 1)), Code.TOO_SHORT, "at least 2 are asked for"),
    ],
)
def test_what_is_no_episode_says_why(phases: Any, code: Code, says: str) -> None:
    (only,) = cut(piece(*phases))
    assert only.reason is not None
    assert says in only.reason
    assert codes(only)[-1] is code


def test_notes_fill_in_topic_and_time() -> None:
    notes = Notes(SPEC, "some.mcap")
    notes.origin_ns = START_NS
    stream = next(iter(SPEC.streams))
    notes.add(Code.GAP, Severity.WARNING, "silent", stream, START_NS + NS_PER_S // 2, 3)
    notes.add(Code.GAP, Severity.WARNING, "silent", None, None)
    first, second = notes.findings
    assert (first.bag, first.topic, first.at_s, first.count) == (
        "some.mcap",
        SPEC.streams[stream].topic,
        0.5,
        3,
    )
    assert (second.topic, second.time_ns, second.at_s) == (None, None, None)
    with pytest.raises(KeyError, match="no such stream"):
        notes.add(Code.GAP, Severity.WARNING, "silent", "no such stream", None)
