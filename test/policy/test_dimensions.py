from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.dimensions import (
    ACTION,
    DIMENSION_PADDING,
    STATE,
    FeatureStatistics,
    Statistics,
    StatisticsError,
    denormalise,
    dimension_padding,
    mix_samples,
    normalise,
    pad_last,
    pad_sample,
)

WIDTHS = {STATE: 2, ACTION: 3}


def dataset_stats(widths, *, mean=0.5, std=2.0):
    return {
        key: {"mean": np.full(width, mean), "std": np.full(width, std), "min": np.zeros(width)}
        for key, width in widths.items()
    }


class TestPadding:
    def test_appends_zeros(self):
        assert pad_last(torch.ones(1, 2), 4).tolist() == [[1.0, 1.0, 0.0, 0.0]]

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(UserError, match=r"33 values does not fit into the network's 32"):
            pad_last(torch.ones(1, 33), 32)

    @given(st.integers(1, 32))
    def test_mask_follows_the_width(self, width):
        mask = dimension_padding({ACTION: torch.zeros(2, 5, width)}, ACTION, 32)
        assert mask.shape == (2, 32)
        assert (~mask).sum(1).tolist() == [width, width]
        assert not mask[:, :width].any()

    def test_a_samples_own_mask_counts(self):
        own = torch.tensor([[False, False, True]])
        batch = {ACTION: torch.zeros(1, 5, 3), DIMENSION_PADDING[ACTION]: own}
        assert dimension_padding(batch, ACTION, 4).tolist() == [[False, False, True, True]]

    @pytest.mark.parametrize("own", [torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.bool)])
    def test_a_mask_of_another_kind_is_refused(self, own):
        with pytest.raises(UserError, match="must be boolean of shape"):
            dimension_padding({ACTION: torch.zeros(1, 5, 3), DIMENSION_PADDING[ACTION]: own}, ACTION, 4)

    def test_samples_of_two_widths_collate(self):
        samples = [
            {STATE: torch.ones(16), ACTION: torch.ones(50, width), "task": "go"} for width in (16, 20, 16)
        ]
        batch = default_collate(mix_samples(samples))
        assert batch[ACTION].shape == (3, 50, 20)
        assert (~batch[DIMENSION_PADDING[ACTION]]).sum(1).tolist() == [16, 20, 16]
        assert batch[DIMENSION_PADDING[STATE]].any().item() is False
        assert batch[ACTION][0, :, 16:].abs().max() == 0
        assert batch["task"] == ["go"] * 3

    @given(st.integers(1, 8), st.integers(0, 8), st.sets(st.integers(0, 15)), st.integers(0, 4))
    def test_known_zeros_are_no_padding_and_survive_mixing(self, own, more, places, wider):
        width = own + more
        zeros = {ACTION: [place for place in places if place < width]}
        sample = pad_sample({ACTION: torch.ones(5, own)}, {ACTION: width}, zeros)
        batch = default_collate(mix_samples([sample, {ACTION: torch.ones(5, width + wider)}]))
        real = {*range(own), *zeros[ACTION]}
        mask = batch[DIMENSION_PADDING[ACTION]]
        assert mask[0].tolist() == [place not in real for place in range(width + wider)]
        assert not mask[1].any()
        assert batch[ACTION][0, :, :own].eq(1).all()
        assert not batch[ACTION][0, :, own:].any()


class TestStatistics:
    def test_taken_from_a_data_set(self):
        statistics = Statistics.from_dataset(dataset_stats(WIDTHS), WIDTHS)
        assert statistics[STATE] == FeatureStatistics((0.5, 0.5), (2.0, 2.0))

    def test_missing_features_are_named(self):
        stats = {"so100.buffer.action": {"mean": [0.0], "std": [1.0]}}
        with pytest.raises(StatisticsError, match=r"for observation\.state, action \(present: so100\.buffer"):
            Statistics.from_dataset(stats, WIDTHS)

    def test_absence_is_an_error(self):
        with pytest.raises(StatisticsError, match="present: none"):
            Statistics.from_dataset(None, WIDTHS)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"std": np.ones(4)}, "3 wide but its statistics are 3"),
            ({"mean": np.ones(2)}, r"2 \(mean\)"),
            ({"std": np.array([1.0, math.nan, 1.0])}, "not finite"),
            ({"mean": np.array([1.0, math.inf, 1.0])}, "not finite"),
            ({"std": np.array([1.0, -1.0, 1.0])}, "negative"),
        ],
    )
    def test_wrong_numbers_are_refused(self, change, complaint):
        stats = dataset_stats(WIDTHS)
        stats[ACTION].update(change)
        with pytest.raises(StatisticsError, match=complaint):
            Statistics.from_dataset(stats, WIDTHS)

    def test_lacking_std_is_named(self):
        stats = dataset_stats(WIDTHS)
        del stats[ACTION]["std"]
        with pytest.raises(StatisticsError, match="action lack std"):
            Statistics.from_dataset(stats, WIDTHS)

    def test_a_joint_that_stood_still_gets_the_floor(self):
        stats = dataset_stats(WIDTHS, std=1e-7)
        statistics = Statistics.from_dataset(stats, WIDTHS, std_floor=0.02)
        assert statistics[ACTION].std == pytest.approx((0.02,) * 3)
        assert normalise(torch.full((1, 3), 0.52), statistics[ACTION]).abs().max() <= 1.0 + 1e-5

    def test_known_dimensions_never_change_and_new_ones_are_added(self):
        first = Statistics.from_dataset(dataset_stats(WIDTHS, mean=1.0), WIDTHS)
        wider = {STATE: 2, ACTION: 5}
        merged = first.extended_by(Statistics.from_dataset(dataset_stats(wider, mean=9.0), wider))
        assert merged[ACTION].mean == (1.0, 1.0, 1.0, 9.0, 9.0)
        assert merged[STATE] == first[STATE]
        assert merged.extended_by(first) == merged
        assert first.differs_on_known(merged) == []

    def test_a_difference_on_known_dimensions_is_noticed(self):
        a, b = (Statistics.from_dataset(dataset_stats(WIDTHS, mean=m), WIDTHS) for m in (1.0, 2.0))
        assert a.differs_on_known(b) == [ACTION, STATE]

    def test_require_names_the_gap(self):
        with pytest.raises(StatisticsError, match=r"action is 5 wide but statistics exist for 3"):
            Statistics.identity(WIDTHS).require({ACTION: 5})

    def test_survives_the_flat_form(self):
        statistics = Statistics.from_dataset(dataset_stats(WIDTHS, mean=0.1), WIDTHS)
        assert Statistics.from_flat(statistics.to_flat()) == statistics

    @given(st.sampled_from(["mean", "std"]), st.integers(0, 2))
    def test_hash_sees_every_number(self, part, index):
        stats = dataset_stats(WIDTHS)
        before = Statistics.from_dataset(stats, WIDTHS).sha256
        assert Statistics.from_dataset(stats, WIDTHS).sha256 == before
        stats[ACTION][part][index] = np.nextafter(np.float32(stats[ACTION][part][index]), np.float32(9))
        assert Statistics.from_dataset(stats, WIDTHS).sha256 != before


class TestNormalisation:
    feature = FeatureStatistics((1.0, 2.0), (0.5, 4.0))

    def test_by_hand_and_back(self):
        x = torch.tensor([[2.0, 10.0]])
        scaled = normalise(x, self.feature)
        assert scaled.tolist() == [[2.0, 2.0]]
        assert torch.equal(denormalise(scaled, self.feature), x)

    def test_unknown_dimensions_are_left_alone(self):
        assert normalise(torch.tensor([[1.0, 2.0, 7.0]]), self.feature).tolist() == [[0.0, 0.0, 7.0]]

    def test_fewer_dimensions_use_the_first(self):
        assert normalise(torch.tensor([[2.0]]), self.feature).tolist() == [[2.0]]

    @pytest.mark.parametrize("shape", [(2, 2), (2, 5, 2)])
    def test_padding_becomes_zero_whatever_stands_there(self, shape):
        padding = torch.tensor([[False, True], [False, False]])
        scaled = normalise(torch.full(shape, math.nan), self.feature, padding)
        assert scaled[0, ..., 1].eq(0).all()
        assert scaled[1].isnan().all()

    @given(st.lists(st.floats(-100, 100), min_size=2, max_size=2))
    def test_inverse(self, values):
        x = torch.tensor([values])
        assert torch.allclose(denormalise(normalise(x, self.feature), self.feature), x, atol=1e-4)
