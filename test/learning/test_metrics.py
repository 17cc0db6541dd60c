"""Forgetting and transfer: by hand, by LIBERO's published table, and by what must hold for any matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import linprog

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.metrics import (
    area_under_curve,
    average,
    backward_transfer,
    joint_gap,
    learning_speed,
    max_forgetting,
    negative_backward_transfer,
    score_matrix,
    single_gap,
    summarise,
    wilson,
    zero_shot_transfer,
)

NAN = math.nan
# Three tasks. The first loses .2 and then .5 in all, the second gains .1; by hand below.
HAND = np.array([[0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.4, 0.9, 0.6]])

# LIBERO (arXiv 2306.03310), ResNet-Transformer: FWT, NBT, AUC.
PUBLISHED = {
    ("LONG", "sequential"): (0.54, 0.63, 0.15),
    ("LONG", "ER"): (0.48, 0.32, 0.32),
    ("LONG", "EWC"): (0.13, 0.22, 0.02),
    ("LONG", "PackNet"): (0.22, 0.08, 0.25),
    ("SPATIAL", "sequential"): (0.72, 0.81, 0.20),
    ("SPATIAL", "ER"): (0.65, 0.27, 0.56),
    ("SPATIAL", "EWC"): (0.23, 0.33, 0.06),
    ("SPATIAL", "PackNet"): (0.55, 0.07, 0.63),
    ("OBJECT", "sequential"): (0.78, 0.76, 0.26),
    ("OBJECT", "ER"): (0.67, 0.43, 0.44),
    ("OBJECT", "EWC"): (0.56, 0.69, 0.16),
    ("OBJECT", "PackNet"): (0.60, 0.17, 0.60),
    ("GOAL", "sequential"): (0.77, 0.82, 0.22),
    ("GOAL", "ER"): (0.64, 0.34, 0.49),
    ("GOAL", "EWC"): (0.32, 0.48, 0.06),
    ("GOAL", "PackNet"): (0.63, 0.06, 0.75),
}


def squares(most: int = 6, low: float = 0.0, high: float = 1.0) -> st.SearchStrategy[np.ndarray]:
    return st.integers(2, most).flatmap(
        lambda k: npst.arrays(np.float64, (k, k), elements=st.floats(low, high, width=32))
    )


class TestByHand:
    def test_average(self) -> None:
        assert average(HAND) == pytest.approx((0.4 + 0.9 + 0.6) / 3)

    def test_nbt(self) -> None:
        first, second = ((0.9 - 0.7) + (0.9 - 0.4)) / 2, 0.8 - 0.9
        assert negative_backward_transfer(HAND) == pytest.approx((first + second) / 2)

    def test_bwt_has_the_opposite_sign(self) -> None:
        assert backward_transfer(HAND) == pytest.approx(((0.4 - 0.9) + (0.9 - 0.8)) / 2)

    def test_max_forgetting(self) -> None:
        assert max_forgetting(HAND) == pytest.approx(0.5)

    def test_max_forgetting_counts_from_the_best_score_ever(self) -> None:
        scores = [[0.5, 0, 0], [0.9, 0.5, 0], [0.6, 0.5, 0.5]]
        assert max_forgetting(scores) == pytest.approx(0.3)
        assert backward_transfer(scores) == pytest.approx(0.05)

    def test_learning_speed_is_flat_from_the_best_on(self) -> None:
        assert learning_speed([0.0, 0.4, 0.8, 0.6, 0.2]) == pytest.approx((0 + 0.4 + 0.8 + 0.8 + 0.8) / 5)

    def test_learning_speed_counts_the_first_of_equal_bests(self) -> None:
        assert learning_speed([0.8, 0.0, 0.8]) == pytest.approx(0.8)

    def test_auc(self) -> None:
        speeds = [0.6, 0.5, 0.4]
        by_task = [(0.6 + 0.7 + 0.4) / 3, (0.5 + 0.9) / 2, 0.4]
        assert area_under_curve(HAND, speeds) == pytest.approx(sum(by_task) / 3)

    def test_zero_shot(self) -> None:
        assert zero_shot_transfer(HAND, [0.3, 0.05, 0.0]) == pytest.approx(((0.1 - 0.05) + (0.2 - 0)) / 2)

    def test_gaps(self) -> None:
        assert joint_gap(HAND, [0.8, 0.8, 0.8]) == pytest.approx(0.8 - average(HAND))
        assert single_gap(HAND, [0.9, 0.3, 0.3]) == pytest.approx(0.5 - average(HAND))


class TestPublishedTable:
    """The table's inputs were not published, but for each row there are success rates that give it.

    They are found by linear programming from the definitions as written in the paper, and put through the
    functions. What the table can tell apart is the sign of NBT (13 of 16 rows have no rates with the other
    one); it cannot tell whether NBT is averaged over nine tasks or ten.
    """

    @staticmethod
    def results_of(fwt: float, nbt: float, auc: float) -> tuple[np.ndarray, list[list[float]]] | None:
        """A matrix of ten tasks and their learning curves whose figures round to these, if there are any."""
        tasks, points, half_a_digit = 10, 11, 0.005
        speed, learnt, later = np.split(np.eye(3 * tasks - 1), [tasks, 2 * tasks])
        per_task = [
            (speed[k] + (tasks - 1 - k) * (later[k] if k < tasks - 1 else 0)) / (tasks - k)
            for k in range(tasks)
        ]
        figures = [
            (speed.mean(0), fwt),
            ((learnt[:-1] - later).mean(0), nbt),
            (np.mean(per_task, axis=0), auc),
        ]
        rows = [(sign * f, sign * value + half_a_digit) for f, value in figures for sign in (1, -1)]
        # A curve that ends at its best lies between its best in one point only and its best everywhere.
        rows += [(speed[k] - learnt[k], 0.0) for k in range(tasks)]
        rows += [(learnt[k] / points - speed[k], 0.0) for k in range(tasks)]
        solved = linprog(
            np.zeros(3 * tasks - 1),
            np.array([r for r, _ in rows]),
            [limit for _, limit in rows],
            bounds=(0, 1),
        )
        if solved.status != 0:
            return None
        f, d, r = np.split(solved.x, [tasks, 2 * tasks])
        scores = np.diag(d) + np.tril(np.tile([*r, 0], (tasks, 1)), -1)
        curves = [np.clip(points * f[k] - d[k] * np.arange(points), 0, d[k])[::-1] for k in range(tasks)]
        return scores, [[*curve[:-1], d[k]] for k, curve in enumerate(curves)]

    @pytest.mark.parametrize("row", PUBLISHED.values(), ids=["-".join(key) for key in PUBLISHED])
    def test_each_row_is_reproduced(self, row: tuple[float, float, float]) -> None:
        results = self.results_of(*row)
        assert results is not None
        scores, curves = results
        summary = summarise(scores, curves=curves)
        found = (summary.forward_transfer, summary.negative_backward_transfer, summary.area_under_curve)
        assert found == pytest.approx(row, abs=0.005 + 1e-7)

    def test_the_other_sign_of_nbt_contradicts_the_table(self) -> None:
        impossible = [row for row in PUBLISHED.values() if self.results_of(row[0], -row[1], row[2]) is None]
        assert len(impossible) >= 13


class TestPublishedTwin:
    def test_four_tasks_with_replay_in_points(self) -> None:
        """A published run of four dual-arm tasks gives its last row: 96.3, 97.5, 90, 90, on average 93.5."""
        last = [96.3, 97.5, 90.0, 90.0]
        scores = np.tril(np.full((4, 4), 100.0))
        scores[3] = last
        assert average(scores) == pytest.approx(93.45)
        assert round(joint_gap(scores, [95, 85, 13.3, 88]), 1) == -23.1
        assert round(single_gap(scores, [100, 97.5, 100, 52]), 1) == -6.1


class TestProperties:
    @given(squares())
    def test_nothing_is_forgotten_where_nothing_changes(self, scores: np.ndarray) -> None:
        constant = np.tile(np.diag(scores), (len(scores), 1))
        assert negative_backward_transfer(constant) == pytest.approx(0)
        assert backward_transfer(constant) == pytest.approx(0)
        assert max_forgetting(constant) == pytest.approx(0)

    @given(squares())
    def test_ranges(self, scores: np.ndarray) -> None:
        speeds = np.diag(scores)
        assert 0 <= average(scores) <= 1
        assert -1 <= negative_backward_transfer(scores) <= 1
        assert 0 <= area_under_curve(scores, speeds) <= 1
        assert max_forgetting(scores) >= -backward_transfer(scores) - 1e-12

    @given(squares(), st.floats(-3, 3))
    def test_a_constant_moves_levels_and_not_differences(self, scores: np.ndarray, shift: float) -> None:
        for difference in (negative_backward_transfer, backward_transfer, max_forgetting):
            assert difference(scores + shift) == pytest.approx(difference(scores), abs=1e-6)
        assert average(scores + shift) == pytest.approx(average(scores) + shift, abs=1e-6)

    @given(squares(2))
    def test_with_two_stages_nbt_and_bwt_are_opposite(self, scores: np.ndarray) -> None:
        assert negative_backward_transfer(scores) == pytest.approx(-backward_transfer(scores))

    @given(squares())
    def test_the_upper_triangle_does_not_matter_where_it_must_not(self, scores: np.ndarray) -> None:
        hidden = scores.copy()
        hidden[np.triu_indices(len(scores), 1)] = NAN
        for metric in (average, negative_backward_transfer, backward_transfer):
            assert metric(hidden) == metric(scores)
        assert area_under_curve(hidden, np.diag(scores)) == area_under_curve(scores, np.diag(scores))
        assert max_forgetting(hidden) <= max_forgetting(scores)

    @given(squares(low=0.125, high=2.0))
    def test_losses_are_scores_turned_round(self, losses: np.ndarray) -> None:
        as_loss = summarise(losses, higher_is_better=False, joint=np.ones(len(losses)))
        as_score = summarise(-losses, joint=-np.ones(len(losses)))
        assert as_loss.average == pytest.approx(losses[-1].mean())
        assert as_loss.average == pytest.approx(-as_score.average)
        for name in ("negative_backward_transfer", "backward_transfer", "max_forgetting", "joint_gap"):
            assert getattr(as_loss, name) == pytest.approx(getattr(as_score, name))

    @given(squares(low=0.125, high=2.0), st.floats(0.01, 5))
    def test_a_rising_loss_of_an_old_task_is_forgetting(self, losses: np.ndarray, rise: float) -> None:
        worse = losses.copy()
        worse[-1, 0] += rise
        before, after = (summarise(each, higher_is_better=False) for each in (losses, worse))
        assert after.negative_backward_transfer > before.negative_backward_transfer  # type: ignore[operator]
        assert after.backward_transfer < before.backward_transfer  # type: ignore[operator]
        assert after.max_forgetting >= before.max_forgetting  # type: ignore[operator]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    def test_learning_speed_lies_between_the_mean_and_the_best(self, curve: list[float]) -> None:
        assert np.mean(curve) - 1e-9 <= learning_speed(curve) <= max(curve) + 1e-9

    def test_the_loss_curve_counts_from_its_lowest(self) -> None:
        summary = summarise([[0.2]], higher_is_better=False, curves=[[1.0, 0.2, 0.6]])
        assert summary.forward_transfer == pytest.approx((1.0 + 0.2 + 0.2) / 3)


class TestSummary:
    def test_only_what_was_measured(self) -> None:
        hidden = np.where(np.tri(3) > 0, HAND, NAN)
        summary = summarise(hidden, untrained=[0, 0, 0])
        assert summary.zero_shot_transfer is None
        assert (summary.forward_transfer, summary.area_under_curve) == (None, None)
        assert (summary.joint_gap, summary.single_gap) == (None, None)
        assert summarise(HAND, untrained=[0, 0, 0]).zero_shot_transfer == pytest.approx(0.15)

    def test_one_stage(self) -> None:
        summary = summarise([[0.7]])
        assert summary.average == 0.7
        assert summary.to_json()["backward_transfer"] is None

    def test_a_matrix_from_results_by_name(self) -> None:
        rows = {"b": {"a": 0.5, "b": 0.75}, "a": {"a": 1.0}}
        scores = score_matrix(rows, ("a", "b"))
        assert scores[1].tolist() == [0.5, 0.75]
        assert math.isnan(scores[0, 1])
        assert negative_backward_transfer(scores) == 0.5


class TestRefused:
    @pytest.mark.parametrize("scores", [[[1, 2, 3], [1, 2, 3]], [1, 2], [], [[]]])
    def test_no_square(self, scores: list) -> None:
        with pytest.raises(UsageError, match="square of stages and tasks"):
            average(scores)

    @pytest.mark.parametrize("place", [(0, 0), (1, 0), (2, 1), (2, 2)])
    def test_a_missing_evaluation(self, place: tuple[int, int]) -> None:
        scores = HAND.copy()
        scores[place] = NAN
        with pytest.raises(UsageError, match="every task must have been evaluated"):
            average(scores)

    def test_a_single_stage_forgets_nothing(self) -> None:
        for metric in (negative_backward_transfer, backward_transfer, max_forgetting):
            with pytest.raises(UsageError, match="single stage"):
                metric([[1.0]])

    def test_speeds_that_do_not_match(self) -> None:
        with pytest.raises(UsageError, match="3 tasks need as many learning speeds, there are 2"):
            area_under_curve(HAND, [1, 2])

    @pytest.mark.parametrize("curve", [[], [0.1, NAN], [[0.1]]])
    def test_no_curve(self, curve: list) -> None:
        with pytest.raises(UsageError, match="learning curve"):
            learning_speed(curve)

    def test_zero_shot_without_its_evaluations(self) -> None:
        with pytest.raises(UsageError, match="before it is learnt"):
            zero_shot_transfer(np.where(np.tri(3) > 0, HAND, NAN), [0, 0, 0])


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
    )
    def test_known_values(self, successes: int, trials: int, low: float, high: float) -> None:
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))

    @pytest.mark.parametrize(("trials", "points"), [(10, 26), (20, 20), (50, 13), (100, 10), (200, 7)])
    def test_half_widths_to_plan_with(self, trials: int, points: int) -> None:
        assert round(100 * wilson(trials // 2, trials).half_width) == points

    @given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_inside_and_around_the_share(self, numbers: tuple[int, int]) -> None:
        interval = wilson(*numbers)
        assert 0 <= interval.low <= interval.share <= interval.high <= 1
        assert interval.low < interval.high
        mirrored = wilson(numbers[1] - numbers[0], numbers[1])
        assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low))

    @given(st.integers(1, 200), st.floats(0.5, 0.9))
    def test_more_confidence_is_wider(self, trials: int, confidence: float) -> None:
        narrow, wide = (wilson(trials // 2, trials, c) for c in (confidence, confidence + 0.09))
        assert wide.half_width > narrow.half_width

    def test_covers_what_it_promises(self) -> None:
        rng = np.random.default_rng(0)
        for share in (0.1, 0.5, 0.9):
            covered = [
                (i := wilson(int(k), 40)).low <= share <= i.high for k in rng.binomial(40, share, 2000)
            ]
            assert 0.92 <= np.mean(covered) <= 0.98

    @pytest.mark.parametrize("numbers", [(1, 0), (-1, 10), (11, 10)])
    def test_impossible_counts(self, numbers: tuple[int, int]) -> None:
        with pytest.raises(UsageError, match="no confidence interval"):
            wilson(*numbers)

    @pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
    def test_impossible_confidence(self, confidence: float) -> None:
        with pytest.raises(UsageError, match="confidence"):
            wilson(5, 10, confidence)
