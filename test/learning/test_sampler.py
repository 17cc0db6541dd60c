"""Batches as a function of seed, step and rank."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.chance import key_of, permutation, uniform, words
from kuavo_smolvla_ros.learning.quota import Quotas
from kuavo_smolvla_ros.learning.sampler import BatchPlan, Draw, MixedBatchSampler, Pool
from kuavo_smolvla_ros.learning.stage import BatchLayout, Stage, StageError

STAGE_4 = ("0.1", "0.1", "0.2", "0.6")


def make_plan(
    shares: tuple[str, ...] = STAGE_4,
    sizes: tuple[int, ...] = (97, 50, 131, 200),
    batch_size: int = 64,
    seed: int = 0,
    **pool: float,
) -> BatchPlan:
    pools = [
        Pool(f"task{i}", np.arange(size) * 10 + i, **pool)  # type: ignore[arg-type]
        for i, size in enumerate(sizes, 1)
    ]
    return BatchPlan(pools, Quotas([Fraction(share) for share in shares], batch_size), seed)


class TestWithoutReplacement:
    @pytest.mark.parametrize("task", range(4))
    def test_every_pass_is_a_permutation_of_the_pool(self, task: int) -> None:
        plan = make_plan()
        pool = plan.pools[task].frames
        drawn = [draw.frame for draw in plan.draws(task, 0, 3 * len(pool))]
        passes = [drawn[i * len(pool) : (i + 1) * len(pool)] for i in range(3)]
        assert all(sorted(each) == pool.tolist() for each in passes)
        assert passes[0] != passes[1] != passes[2] != passes[0]

    def test_no_duplicate_in_a_pass_across_batches(self) -> None:
        plan = make_plan()
        seen: Counter[Draw] = Counter()
        for step in range(5):  # 5 * 38.4 = 192 of 200 samples of the last task
            seen.update(draw for draw in plan.batch(step) if draw.task == 3)
        assert max(seen.values()) == 1
        assert sum(seen.values()) == 192

    @given(st.integers(0, 10**7), st.integers(0, 300))
    def test_samples_seen_differ_by_one_pass_at_most(self, first: int, count: int) -> None:
        plan = make_plan(("1",), (13,), 8)
        counts = Counter(draw.frame for draw in plan.draws(0, first, count))
        times = [counts[frame] for frame in plan.pools[0].frames.tolist()]
        # Two broken passes at the ends, whole ones between.
        assert max(times) - min(times) <= 2
        assert sum(times) == count

    def test_a_pool_smaller_than_its_quota_is_repeated_in_the_batch(self) -> None:
        plan = make_plan(("1",), (3,), 8)
        counts = Counter(draw.frame for draw in plan.batch(0))
        assert sorted(counts.values()) == [2, 3, 3]

    def test_one_pass_touches_everything(self) -> None:
        # Drawing with replacement would touch 63 % of the samples in one pass.
        plan = make_plan(("1",), (640,), 64)
        assert len({draw.frame for step in range(10) for draw in plan.batch(step)}) == 640


class TestFunctionOfTheStep:
    def test_a_step_needs_no_history(self) -> None:
        forwards = [make_plan().batch(step) for step in range(40)]
        plan = make_plan()
        assert [plan.batch(step) for step in reversed(range(40))] == list(reversed(forwards))
        assert make_plan().batch(31) == forwards[31]

    def test_far_steps_cost_the_same(self) -> None:
        plan = make_plan()
        assert len(plan.batch(10**9)) == 64

    def test_seeds_give_other_orders_of_the_same_mix(self) -> None:
        a, b = make_plan(seed=0), make_plan(seed=1)
        assert a.batch(0) != b.batch(0)
        assert Counter(d.task for d in a.batch(0)) == Counter(d.task for d in b.batch(0))

    def test_a_task_s_order_does_not_depend_on_the_others(self) -> None:
        plan, alone = make_plan(), make_plan(("1",), (97,))
        assert [d.frame for d in plan.draws(0, 0, 300)] == [d.frame for d in alone.draws(0, 0, 300)]

    def test_tasks_of_the_same_size_have_orders_of_their_own(self) -> None:
        plan = make_plan(("0.5", "0.5"), (100, 100))
        first, second = (np.array([d.frame for d in plan.draws(i, 0, 100)]) // 10 for i in (0, 1))
        assert (first == second).mean() < 0.1

    def test_the_order_is_pinned(self) -> None:
        # Changes here break the continuation of every run in progress.
        plan = make_plan(("1",), (10,), 4)
        assert [d.frame for d in plan.batch(0) + plan.batch(1)] == [11, 41, 51, 31, 21, 61, 91, 1]
        assert key_of("pass", 0, "task1", 0) == 11794323719083138611


class TestRanks:
    @pytest.mark.parametrize(("devices", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 4)])
    def test_the_parts_make_the_batch(self, devices: int, accumulation: int) -> None:
        plan, layout = make_plan(), BatchLayout(64 // devices // accumulation, accumulation, devices)
        for step in range(20):
            parts = [
                plan.part(step, layout, rank, micro)
                for rank, micro in itertools.product(range(devices), range(accumulation))
            ]
            assert {len(part) for part in parts} == {layout.per_device}
            assert Counter(itertools.chain(*parts)) == Counter(plan.batch(step))

    @pytest.mark.parametrize("devices", [1, 2, 4])
    def test_the_mix_is_exact_over_ten_thousand_batches(self, devices: int) -> None:
        plan, layout = make_plan(batch_size=16, sizes=(9, 9, 9, 9)), BatchLayout(16 // devices, 1, devices)
        counts = np.zeros((10_000, devices, 4), int)
        for step in range(10_000):
            # What `part` deals, task by task, without making the samples.
            tasks = np.repeat(np.arange(4), plan.quotas.counts(step))
            for rank in range(devices):
                counts[step, rank] = np.bincount(tasks[(rank - step) % devices :: devices], minlength=4)
            if step % 500 == 0:
                for rank in range(devices):
                    drawn = [draw.task for draw in plan.part(step, layout, rank, 0)]
                    assert (np.bincount(drawn, minlength=4) == counts[step, rank]).all()
        together = counts.sum(1)
        assert (together.sum(0) == [16_000, 16_000, 32_000, 96_000]).all()
        assert (together.reshape(2000, 5, 4).sum(1) == [8, 8, 16, 48]).all()
        # Every device gets its part of every task, give or take one.
        assert (counts.max(1) - counts.min(1) <= 1).all()

    @pytest.mark.parametrize(("devices", "accumulation"), [(2, 1), (4, 1), (2, 2)])
    def test_no_device_is_always_the_one_with_the_odd_sample(self, devices: int, accumulation: int) -> None:
        plan = make_plan(batch_size=16, sizes=(9, 9, 9, 9))
        layout = BatchLayout(16 // devices // accumulation, accumulation, devices)
        counts = np.zeros((devices, accumulation, 4), int)
        for step in range(400):
            for rank, micro in itertools.product(range(devices), range(accumulation)):
                drawn = [draw.task for draw in plan.part(step, layout, rank, micro)]
                counts[rank, micro] += np.bincount(drawn, minlength=4)
        assert (np.ptp(counts.reshape(-1, 4), axis=0) == 0).all()

    def test_the_number_of_devices_changes_nothing_in_what_is_trained(self) -> None:
        plan = make_plan()
        for step in (0, 7, 12345):
            by_one = Counter(plan.part(step, BatchLayout(64, 1, 1), 0, 0))
            by_four = Counter(
                draw for rank in range(4) for draw in plan.part(step, BatchLayout(16, 1, 4), rank, 0)
            )
            assert by_one == by_four

    @pytest.mark.parametrize(("layout", "rank"), [(BatchLayout(16, 1, 2), 0), (BatchLayout(32, 1, 2), 2)])
    def test_what_does_not_fit_is_refused(self, layout: BatchLayout, rank: int) -> None:
        with pytest.raises(UsageError, match=f"rank {rank} of a batch of {layout.total}"):
            MixedBatchSampler(make_plan(), layout, rank, 10)


class _Echo(Dataset[Draw]):
    def __getitem__(self, draw: Draw) -> Draw:
        return draw


class TestResume:
    layout = BatchLayout(8, 4, 2)

    @given(st.integers(0, 30))
    def test_resumed_equals_uninterrupted(self, stop: int) -> None:
        whole = list(MixedBatchSampler(make_plan(), self.layout, 1, 30))
        rest = list(MixedBatchSampler(make_plan(), self.layout, 1, 30, first_step=stop))
        assert whole[stop * 4 :] == rest

    def test_length(self) -> None:
        sampler = MixedBatchSampler(make_plan(), self.layout, 0, 30, first_step=10)
        assert len(sampler) == len(list(sampler)) == 80
        assert len(MixedBatchSampler(make_plan(), self.layout, 0, 30, first_step=31)) == 0

    @pytest.mark.parametrize("workers", [0, 2])
    def test_through_a_data_loader(self, workers: int) -> None:
        sampler = MixedBatchSampler(make_plan(), self.layout, 0, 5, first_step=2)
        loader = DataLoader(_Echo(), batch_sampler=sampler, collate_fn=list, num_workers=workers)
        assert list(loader) == list(sampler)


class TestSentences:
    def test_by_default_only_the_instruction(self) -> None:
        assert {draw.sentence for draw in make_plan().batch(0)} == {0}

    def test_paraphrases_have_their_share_and_each_its_part(self) -> None:
        plan = make_plan(("1",), (1000,), 64, sentences=4, paraphrase_share=0.3)
        counts = Counter(draw.sentence for draw in plan.draws(0, 0, 30_000))
        assert counts[0] / 30_000 == pytest.approx(0.7, abs=0.02)
        assert [counts[i] / 30_000 for i in (1, 2, 3)] == pytest.approx([0.1] * 3, abs=0.01)

    def test_always_and_never(self) -> None:
        always = make_plan(("1",), (50,), 64, sentences=3, paraphrase_share=1.0)
        assert {draw.sentence for draw in always.batch(0)} == {1, 2}
        none_there = make_plan(("1",), (50,), 64, sentences=1, paraphrase_share=1.0)
        assert {draw.sentence for draw in none_there.batch(0)} == {0}

    def test_a_frame_meets_other_sentences_in_other_passes(self) -> None:
        plan = make_plan(("1",), (1,), 1, sentences=4, paraphrase_share=0.5)
        assert len({plan.batch(step)[0].sentence for step in range(50)}) == 4


class TestExposure:
    def test_realised_shares_and_passes(self) -> None:
        exposure = make_plan().exposure(10)
        assert [e.samples for e in exposure.values()] == [64, 64, 128, 384]
        assert [e.share for e in exposure.values()] == [0.1, 0.1, 0.2, 0.6]
        assert exposure["task1"].unique_share == pytest.approx(64 / 97)
        assert exposure["task4"].passes == pytest.approx(384 / 200)
        assert exposure["task4"].unique_share == 1.0

    def test_before_the_first_step(self) -> None:
        assert {e.samples for e in make_plan().exposure(0).values()} == {0}

    def test_is_what_was_drawn(self) -> None:
        plan = make_plan()
        drawn = Counter(draw.task for step in range(7) for draw in plan.batch(step))
        assert [e.samples for e in plan.exposure(7).values()] == [drawn[i] for i in range(4)]


def test_a_share_needs_samples() -> None:
    with pytest.raises(StageError, match="task1 has a share of the batches but no training sample"):
        make_plan(("0.2", "0.8"), (0, 10))
    assert len(make_plan(("0", "1"), (0, 10)).batch(0)) == 64


def test_pools_and_quotas_must_match() -> None:
    with pytest.raises(UsageError, match="1 tasks, but quotas for 2"):
        BatchPlan([Pool("a", np.arange(3))], Quotas([Fraction(1, 2)] * 2, 8), 0)


def test_of_a_stage(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage("0.25", "0.75", training={"seed": 5})
    plan = BatchPlan.of_stage(stage, [np.arange(30), np.arange(40)])
    assert Counter(draw.task for draw in plan.batch(0)) == {0: 4, 1: 12}
    other = BatchPlan.of_stage(
        make_stage("0.25", "0.75", training={"seed": 6}), [np.arange(30), np.arange(40)]
    )
    assert plan.batch(0) != other.batch(0)


class TestChance:
    @given(st.integers(0, 2**64 - 1), st.integers(1, 400))
    def test_a_permutation_is_one(self, key: int, length: int) -> None:
        assert sorted(permutation(key, length).tolist()) == list(range(length))

    def test_keys_tell_their_parts_apart(self) -> None:
        keys = {key_of("a", 1, 2), key_of("a", 12), key_of("a", "1", 2), key_of("a1", 2), key_of("a", 2, 1)}
        assert len(keys) == 5

    def test_uniform_is_uniform_and_in_range(self) -> None:
        values = uniform(7, np.arange(100_000))
        assert 0 <= values.min() < values.max() < 1
        histogram = np.histogram(values, bins=20, range=(0, 1))[0]
        assert np.abs(histogram - 5000).max() < 5 * np.sqrt(5000)

    def test_neighbours_and_keys_are_unrelated(self) -> None:
        a, b = uniform(1, np.arange(50_000)), uniform(2, np.arange(50_000))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.02

    def test_positions_in_a_permutation_are_unbiased(self) -> None:
        places = np.array([np.flatnonzero(permutation(key, 10) == 0)[0] for key in range(5000)])
        assert np.abs(np.bincount(places, minlength=10) - 500).max() < 5 * np.sqrt(500)

    def test_words_are_pinned(self) -> None:
        assert words(0, [0, 1]).tolist() == [12035550249420947055, 627405149472732430]
