"""Statistics gathered in passing equal those of all the data at once, and LeRobot's where those are right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from kuavo_smolvla_ros.data.statistics import (
    QUANTILE_KEYS,
    QUANTILES,
    PictureStats,
    aggregate,
    from_lists,
    quantiles_of,
    sampled_steps,
    sampling_stride,
    to_lists,
    vector_stats,
)

floats = st.floats(-1e4, 1e4, width=32)
tables = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=floats)


@given(tables)
def test_vector_stats_are_numpys(values: np.ndarray) -> None:
    stats = vector_stats(values)
    assert_array_equal(stats["min"], values.min(axis=0))
    assert_array_equal(stats["max"], values.max(axis=0))
    assert_allclose(stats["mean"], values.astype(np.float64).mean(axis=0))
    assert_allclose(stats["std"], values.astype(np.float64).std(axis=0))
    for key, q in zip(QUANTILE_KEYS, QUANTILES, strict=True):
        assert_allclose(stats[key], np.quantile(values.astype(np.float64), q, axis=0))
    assert stats["count"].tolist() == [len(values)]


def test_a_flat_series_is_one_number_wide() -> None:
    stats = vector_stats(np.arange(5))
    assert {key: value.shape for key, value in stats.items()} == dict.fromkeys(stats, (1,))
    assert stats["min"].dtype == np.int64


def test_one_step_has_no_spread() -> None:
    stats = vector_stats(np.array([[1.0, -2.0]], np.float32))
    assert stats["std"].tolist() == [0.0, 0.0]
    assert stats["q99"].tolist() == [1.0, -2.0]


@given(st.lists(tables, min_size=1, max_size=6).filter(lambda ts: len({t.shape[1] for t in ts}) == 1))
def test_aggregate_is_as_if_all_had_been_one(parts: list[np.ndarray]) -> None:
    together = vector_stats(np.concatenate(parts))
    found = aggregate([vector_stats(part) for part in parts])
    for key in ("min", "max", "mean", "std", "count"):
        assert_allclose(found[key], together[key], rtol=1e-6, atol=1e-4)


def test_aggregate_agrees_with_lerobots() -> None:
    from lerobot.datasets.compute_stats import aggregate_feature_stats

    rng = np.random.default_rng(0)
    parts = [vector_stats(rng.normal(size=(n, 3))) for n in (5, 50, 7)]
    theirs = aggregate_feature_stats(parts)
    for key, value in aggregate(parts).items():
        assert_allclose(value, theirs[key])


@given(tables, st.integers(1, 7))
def test_counted_quantiles_are_within_a_bin(values: np.ndarray, batch: int) -> None:
    lower, upper = values.min(axis=0), values.max(axis=0)
    bins = 4096
    found = quantiles_of(
        lambda: (values[i : i + batch] for i in range(0, len(values), batch)), lower, upper, bins
    )
    grain = (upper.astype(np.float64) - lower) / bins
    for key, q in zip(QUANTILE_KEYS, QUANTILES, strict=True):
        truth = np.quantile(values.astype(np.float64), q, axis=0)
        assert (np.abs(found[key] - truth) <= grain * 1.001 + 1e-9).all()


def test_counted_quantiles_of_a_constant_are_that_constant() -> None:
    values = np.full((9, 2), 3.5)
    found = quantiles_of(lambda: [values], values[0], values[0])
    assert all(value.tolist() == [3.5, 3.5] for value in found.values())


@given(tables.filter(lambda t: len(t) > 1), st.randoms())
def test_counted_quantiles_do_not_depend_on_order_or_batches(values: np.ndarray, random: object) -> None:
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    bounds = values.min(axis=0), values.max(axis=0)
    once = quantiles_of(lambda: [values], *bounds)
    again = quantiles_of(lambda: [values[i : i + 1] for i in order], *bounds)
    assert all((once[key] == again[key]).all() for key in QUANTILE_KEYS)


def test_the_mean_of_quantiles_would_have_missed_a_gripper_that_opens_in_few_episodes() -> None:
    closed, opened = np.ones((90, 1)), np.zeros((10, 1))
    everything = np.concatenate([closed] * 9 + [opened])
    estimate = aggregate([vector_stats(p) for p in [closed] * 9 + [opened]])["q01"][0]
    counted = quantiles_of(lambda: [everything], np.zeros(1), np.ones(1))["q01"][0]
    assert estimate > 0.9
    assert counted == pytest.approx(np.quantile(everything, 0.01), abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, 99, 100, 101, 463, 464, 465, 1000, 5000, 30_000, 300_000])
def test_the_sampled_steps_are_lerobots(length: int) -> None:
    from lerobot.datasets.compute_stats import sample_indices

    assert sampled_steps(length) == sample_indices(length)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_thinning_is_lerobots(height: int, width: int) -> None:
    from lerobot.datasets.compute_stats import auto_downsample_height_width

    theirs = auto_downsample_height_width(np.empty((1, height, width), np.bool_))
    stride = sampling_stride(height, width)
    assert np.empty((height, width), np.bool_)[::stride, ::stride].shape == theirs.shape[1:]


pictures = hnp.arrays(np.uint8, st.tuples(st.integers(1, 8), st.just(6), st.just(4), st.just(3)))


@given(pictures)
def test_picture_stats_are_exact(frames: np.ndarray) -> None:
    tracker = PictureStats(len(frames))
    for step, frame in enumerate(frames):
        tracker.observe(step, frame)
    stats = tracker.result()
    pixels = frames.reshape(-1, 3) / 255
    for key, expected in {
        "min": pixels.min(axis=0),
        "max": pixels.max(axis=0),
        "mean": pixels.mean(axis=0),
        "std": pixels.std(axis=0),
        **{k: np.quantile(pixels, q, axis=0) for k, q in zip(QUANTILE_KEYS, QUANTILES, strict=True)},
    }.items():
        assert stats[key].shape == (3, 1, 1)
        assert_allclose(stats[key].ravel(), expected, atol=1e-12)
    assert stats["count"].tolist() == [len(frames)]


def test_picture_stats_look_at_the_sampled_steps_only() -> None:
    length = 1000
    tracker = PictureStats(length)
    wanted = set(sampled_steps(length))
    for step in range(length):
        tracker.observe(step, np.full((4, 4, 3), 255 if step in wanted else 0, np.uint8))
    stats = tracker.result()
    assert stats["min"].min() == 1.0
    assert stats["count"].tolist() == [len(wanted)]


def test_picture_stats_agree_with_lerobots_on_numbers_that_do_not_overflow() -> None:
    """LeRobot 0.4.4 squares 8-bit numbers in 8 bits, so its standard deviation of pictures is wrong; in
    floating point it agrees."""
    from lerobot.datasets.compute_stats import get_feature_stats

    frames = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), np.uint8)
    tracker = PictureStats(len(frames))
    for step, frame in enumerate(frames):
        tracker.observe(step, frame)
    stats = tracker.result()
    batch = frames.transpose(0, 3, 1, 2)
    theirs = get_feature_stats(batch.astype(np.float64) / 255, axis=(0, 2, 3), keepdims=True)
    for key in ("min", "max", "mean", "std", *QUANTILE_KEYS):
        assert_allclose(stats[key], theirs[key][0], atol=2e-3)
    wrong = get_feature_stats(batch, axis=(0, 2, 3), keepdims=True)["std"][0] / 255
    assert (np.abs(wrong - stats["std"]) > 0.1).all(), "mended upstream: say so in the docs"


@given(tables)
def test_lists_and_back(values: np.ndarray) -> None:
    stats = vector_stats(values)
    again = from_lists(to_lists(stats))
    assert all((again[key] == stats[key]).all() for key in stats)
