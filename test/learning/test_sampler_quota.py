"""The mix of every batch: whole numbers, exact shares."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.quota import MAX_PERIOD, Quotas

# The four stages of the curriculum, and shares whose batches never come out even.
MIXES = {
    "stage 1": ("1",),
    "stage 2": ("0.2", "0.8"),
    "stage 3": ("0.1", "0.2", "0.7"),
    "stage 4": ("0.1", "0.1", "0.2", "0.6"),
    "thirds": ("1/3", "1/3", "1/3"),
    "one of hundred": ("0.01", "0.99"),
    "awkward": ("0.333", "0.333", "0.334"),
    "no replay": ("0", "1"),
}


def shares_of(mix: str) -> list[Fraction]:
    return [Fraction(share) for share in MIXES[mix]]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[Fraction], int]:
    parts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    assume(sum(parts) > 0)
    return [Fraction(part, sum(parts)) for part in parts], draw(st.integers(1, 200))


@pytest.mark.parametrize("batch_size", [1, 8, 63, 64, 128])
@pytest.mark.parametrize("mix", MIXES)
def test_exact_over_ten_thousand_batches(mix: str, batch_size: int) -> None:
    shares = shares_of(mix)
    quotas = Quotas(shares, batch_size)
    counts = np.array([quotas.counts(step) for step in range(10_000)])
    due = np.array([float(share) * batch_size for share in shares])
    # Every batch is full, and no batch is further from the mix than whole numbers force it to be.
    assert (counts.sum(1) == batch_size).all()
    assert (counts >= np.floor(due - 1e-9)).all()
    assert (counts <= np.ceil(due + 1e-9)).all()
    # Every window of one period is exact, wherever it begins.
    total = np.concatenate([np.zeros((1, len(shares)), int), np.cumsum(counts, axis=0)])
    windows = total[quotas.period :] - total[: -quotas.period]
    assert (windows == [int(share * batch_size * quotas.period) for share in shares]).all()
    # Between windows the realised mix is never more than a few samples off.
    wanted = np.outer(np.arange(10_001), due)
    assert np.abs(total - wanted).max() <= (1 if mix.startswith("stage") and batch_size == 64 else 3)


@pytest.mark.parametrize(("mix", "period"), [("stage 1", 1), ("stage 2", 5), ("stage 3", 5), ("stage 4", 5)])
def test_five_batches_of_64_suffice_for_the_curriculum(mix: str, period: int) -> None:
    assert Quotas(shares_of(mix), 64).period == period


@given(mixes(), st.integers(0, 10**12))
def test_every_batch_is_the_floor_or_the_ceiling(mix: tuple[list[Fraction], int], step: int) -> None:
    shares, batch_size = mix
    counts = Quotas(shares, batch_size).counts(step)
    assert counts.sum() == batch_size
    for share, count in zip(shares, counts.tolist(), strict=True):
        assert abs(share * batch_size - count) < 1


@given(mixes(), st.integers(0, 10**9))
def test_sums_are_known_without_counting(mix: tuple[list[Fraction], int], step: int) -> None:
    shares, batch_size = mix
    quotas = Quotas(shares, batch_size)
    assert (quotas.before(step + 1) - quotas.before(step) == quotas.counts(step)).all()
    assert quotas.before(step).sum() == step * batch_size


@given(mixes(), st.integers(0, 10**6))
def test_any_period_of_batches_holds_the_shares_exactly(mix: tuple[list[Fraction], int], first: int) -> None:
    shares, batch_size = mix
    quotas = Quotas(shares, batch_size)
    drawn = quotas.before(first + quotas.period) - quotas.before(first)
    assert drawn.tolist() == [share * batch_size * quotas.period for share in shares]


def test_no_shorter_period_could_be_exact() -> None:
    quotas = Quotas(shares_of("awkward"), 8)
    for window in range(1, quotas.period):
        assert any((share * 8 * window).denominator != 1 for share in shares_of("awkward"))


@given(mixes())
def test_the_remainder_goes_round(mix: tuple[list[Fraction], int]) -> None:
    """No task waits for its odd sample until the period is nearly over."""
    shares, batch_size = mix
    quotas = Quotas(shares, batch_size)
    steps = np.arange(quotas.period + 1)
    drawn = np.array([quotas.before(int(step)) for step in steps])
    due = np.outer(steps, [float(share) * batch_size for share in shares])
    assert np.abs(drawn - due).max() <= 2 + np.log2(quotas.period)


@pytest.mark.parametrize(
    ("shares", "batch_size", "message"),
    [
        (["0.5", "0.4"], 8, "sum to 1"),
        (["1.5", "-0.5"], 8, "at least 0"),
        (["1"], 0, "a batch of 0 samples"),
        (["0.1234567", "0.8765433"], 64, "only come out even after .* batches; use rounder numbers"),
    ],
)
def test_what_cannot_be_divided(shares: list[str], batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Quotas([Fraction(share) for share in shares], batch_size)


def test_the_longest_period_still_works() -> None:
    shares = [Fraction(1, MAX_PERIOD), Fraction(MAX_PERIOD - 1, MAX_PERIOD)]
    quotas = Quotas(shares, 1)
    assert quotas.before(quotas.period).tolist() == [1, MAX_PERIOD - 1]
