"""Pictures of shares: bars as high as they should be, with their bounds, and none where nothing is known."""

from __future__ import annotations

import re

import matplotlib.figure
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from kuavo_smolvla_ros.learning import charts
from kuavo_smolvla_ros.learning.metrics import wilson

COUNTS = st.integers(0, 50)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were before they became text."""
    figures: list[Figure] = []
    original = matplotlib.figure.Figure.savefig

    def keep(self: Figure, *args: object, **more: object) -> None:
        figures.append(self)
        original(self, *args, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def bounds(good: int) -> tuple[float, float, float]:
    interval = wilson(good, 50)
    return interval.share, interval.low, interval.high


def test_bars_stand_side_by_side_in_their_group(drawn: list[Figure]) -> None:
    kinds = {"with": [bounds(45), None], "without": [bounds(0), bounds(20)]}
    charts.shares(kinds, ["task 1", "task 2"], "success")
    (axes,) = drawn[0].axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert [height for *_, height in bars] == [0.9, 0.0, 0.4]
    (left, right, _), (left_2, right_2, _), (left_3, right_3, _) = bars
    assert -0.5 < left < right <= left_2 < right_2 < 0.5 < left_3 < right_3 < 1.5


def test_kinds_and_groups_are_named(drawn: list[Figure]) -> None:
    text = charts.shares({"with": [bounds(45)], "without": [bounds(3)]}, ["task 1"], "success")
    assert text.startswith("<svg")
    assert {"with", "without", "task 1", "success", "100%"} <= set(re.findall(r">([^<]+)</text>", text))


@given(counts=st.lists(st.one_of(st.none(), COUNTS), min_size=1, max_size=4))
@settings(deadline=None, max_examples=15)
def test_any_counts_can_be_drawn(counts: list[int | None]) -> None:
    entries = [None if count is None else bounds(count) for count in counts]
    groups = [f"task {place}" for place in range(len(counts))]
    first = charts.shares({"a": entries, "b": entries}, groups, "success")
    assert first == charts.shares({"a": entries, "b": entries}, groups, "success")
