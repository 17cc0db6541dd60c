"""Validation losses become verdicts, and bad ones become something to do."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.stage import Initialisation, Stage, Thresholds
from kuavo_smolvla_ros.learning.stage_config import load_curriculum, read_request
from kuavo_smolvla_ros.learning.verdict import Judgement, Verdict, judge

MakeStage = Callable[..., Stage]
NAMES = ("task1_moving_grasp", "task2_weighing", "task3_placement", "task4_sorting")


@pytest.fixture(scope="module")
def curriculum() -> tuple[Stage, ...]:
    return load_curriculum()


def of(stage: Stage, *losses: float, learnt: dict[str, float] | None = None) -> tuple[Judgement, ...]:
    return judge(stage, dict(zip(stage.task_names, losses, strict=True)), learnt)


class TestTheCurriculumsThresholds:
    @pytest.mark.parametrize(
        ("loss", "verdict"),
        [
            (0.58, Verdict.WELL_RETAINED),
            (0.6999, Verdict.WELL_RETAINED),
            (0.7, Verdict.DEGRADED),
            (0.8, Verdict.DEGRADED),
            (0.81, Verdict.FORGOTTEN),
        ],
    )
    def test_stage_2(self, curriculum: tuple[Stage, ...], loss: float, verdict: Verdict) -> None:
        assert of(curriculum[1], loss, 0.45)[0].verdict is verdict

    @pytest.mark.parametrize(
        ("loss", "verdict"),
        [(0.79, Verdict.WELL_RETAINED), (0.8, Verdict.DEGRADED), (1.1, Verdict.FORGOTTEN)],
    )
    def test_stage_3_holds_for_both_earlier_tasks(
        self, curriculum: tuple[Stage, ...], loss: float, verdict: Verdict
    ) -> None:
        assert [j.verdict for j in of(curriculum[2], loss, loss, 0.4)[:2]] == [verdict, verdict]

    def test_stage_4(self, curriculum: tuple[Stage, ...]) -> None:
        assert [j.verdict for j in of(curriculum[3], 0.99, 1.0, 1.3, 0.49)] == [
            Verdict.WELL_RETAINED,
            Verdict.DEGRADED,
            Verdict.FORGOTTEN,
            Verdict.LEARNT,
        ]

    @pytest.mark.parametrize("stage", range(4))
    def test_the_own_task(self, curriculum: tuple[Stage, ...], stage: int) -> None:
        others = (0.1,) * stage
        assert of(curriculum[stage], *others, 0.49)[-1].verdict is Verdict.LEARNT
        assert of(curriculum[stage], *others, 0.5)[-1].verdict is Verdict.NOT_LEARNT


class TestRatios:
    def test_a_small_loss_that_grew_manifold_is_not_well_retained(self, make_stage: MakeStage) -> None:
        stage = make_stage("0.2", "0.8")
        assert of(stage, 0.15, 0.1)[0].verdict is Verdict.WELL_RETAINED
        (first, _) = of(stage, 0.15, 0.1, learnt={"task1": 0.05})
        assert (first.verdict, first.ratio) == (Verdict.FORGOTTEN, pytest.approx(3.0))

    @pytest.mark.parametrize(
        ("loss", "verdict"),
        [(0.139, Verdict.WELL_RETAINED), (0.15, Verdict.DEGRADED), (0.17, Verdict.FORGOTTEN)],
    )
    def test_steps(self, make_stage: MakeStage, loss: float, verdict: Verdict) -> None:
        assert of(make_stage("0.2", "0.8"), loss, 0.1, learnt={"task1": 0.1})[0].verdict is verdict

    def test_the_worse_of_both_counts(self, make_stage: MakeStage) -> None:
        stage = make_stage("0.2", "0.8")
        assert of(stage, 0.9, 0.1, learnt={"task1": 0.9})[0].verdict is Verdict.FORGOTTEN

    def test_without_ratio_thresholds_only_the_loss_counts(self, make_stage: MakeStage) -> None:
        stage = make_stage("0.2", "0.8", thresholds=Thresholds(0.5, 0.7, 0.8))
        (first, _) = of(stage, 0.6, 0.1, learnt={"task1": 0.01})
        assert (first.verdict, first.ratio) == (Verdict.WELL_RETAINED, pytest.approx(60))

    @given(st.floats(0.001, 3), st.floats(0.001, 3), st.floats(0.001, 3))
    def test_a_lower_loss_is_never_judged_worse(
        self, make_stage: MakeStage, a: float, b: float, learnt: float
    ) -> None:
        order = (Verdict.WELL_RETAINED, Verdict.DEGRADED, Verdict.FORGOTTEN)
        stage = make_stage("0.2", "0.8")
        low, high = (
            order.index(of(stage, loss, 0.1, learnt={"task1": learnt})[0].verdict) for loss in sorted((a, b))
        )
        assert low <= high


class TestAdvice:
    def test_a_good_task_needs_none(self, curriculum: tuple[Stage, ...]) -> None:
        judgements = of(curriculum[3], 0.4, 0.4, 0.4, 0.4)
        assert all(j.good and j.advice is None for j in judgements)

    def test_a_forgotten_task_gets_twice_its_share(self, curriculum: tuple[Stage, ...]) -> None:
        advice = of(curriculum[1], 0.9, 0.4)[0].advice
        assert advice is not None
        assert advice.startswith("Train this stage again: raise its replay share from 0.2 to 0.4 (")
        assert "task=tasks/task2_weighing replay.shares.task1_moving_grasp=0.4" in advice

    def test_a_degraded_task_gets_half_as_much_again(self, curriculum: tuple[Stage, ...]) -> None:
        advice = of(curriculum[1], 0.75, 0.4)[0].advice
        assert advice is not None
        assert "from 0.2 to 0.3" in advice

    @pytest.mark.parametrize("stage", [1, 2, 3])
    @pytest.mark.parametrize("loss", [0.75, 0.9, 1.1, 2.0])
    def test_what_is_advised_can_be_typed(
        self, curriculum: tuple[Stage, ...], stage: int, loss: float
    ) -> None:
        for judgement in of(curriculum[stage], *(loss,) * stage, 0.4)[:-1]:
            if judgement.advice is None:
                continue
            command = re.search(r"\((task=.*?)\)", judgement.advice)
            assert command is not None
            (advised,) = read_request(command[1].split()).stages
            place = advised.task_names.index(judgement.task)
            assert advised.shares[place] > curriculum[stage].shares[place]
            assert sum(advised.shares) == 1

    def test_a_task_without_replay_is_given_some(self, make_stage: MakeStage) -> None:
        advice = of(make_stage("0", "1"), 2.0, 0.4)[0].advice
        assert advice is not None
        assert "raise its replay share from 0 to 0.1" in advice
        assert "'replay.shares={task1:0.1,task2:0.9}'" in advice

    def test_the_own_task_is_not_starved(self, make_stage: MakeStage) -> None:
        advice = of(make_stage("0.5", "0.5"), 2.0, 0.4)[0].advice
        assert advice is not None
        assert "from 0.5 to 0.6" in advice
        advice = of(make_stage("0.6", "0.4"), 2.0, 0.4)[0].advice
        assert advice is not None
        assert "replay share" not in advice
        assert "lower optimizer.lr" in advice

    def test_odd_shares_stay_exact(self, make_stage: MakeStage) -> None:
        advice = of(make_stage("1/3", "2/3"), 0.75, 0.4)[0].advice
        assert advice is not None
        assert "from 1/3 to 0.5 (task=FILE.yaml replay.fraction=null " in advice
        assert "'replay.shares={task1:0.5,task2:0.5}')" in advice

    def test_what_is_advised_for_a_file_of_ones_own_can_be_typed(self, tmp_path: Path) -> None:
        own = tmp_path / "cups.yaml"
        own.write_text(
            "defaults: [/tasks/task2_weighing, _self_]\n"
            "task: {number: 5, name: task5_cups}\nreplay: {shares: null, fraction: 0.2}\n"
        )
        order = f"curriculum=[tasks/task1_moving_grasp,{own}]"
        (stage,) = read_request([f"task={own}", order]).stages
        advice = of(stage, 0.9, 0.4)[0].advice
        assert advice is not None
        command = re.search(r"\((task=.*?)\)", advice)
        assert command is not None
        words = shlex.split(command[1].replace("FILE.yaml", str(own)))
        (advised,) = read_request([*words, order]).stages
        assert advised.shares == (Fraction(2, 5), Fraction(3, 5))

    def test_a_limited_buffer_is_mentioned(self, make_stage: MakeStage) -> None:
        advice = of(make_stage("0.2", "0.8", buffer_frames=100), 2.0, 0.4)[0].advice
        assert advice is not None
        assert "replay.buffer_frames above 100" in advice

    def test_an_own_task_that_is_not_learnt(self, make_stage: MakeStage) -> None:
        advice = of(make_stage("0.2", "0.8"), 0.4, 0.6)[1].advice
        assert advice is not None
        assert "below 0.5" in advice
        assert "less than 0.2 of the batches" in advice
        alone = of(make_stage("1", init=Initialisation("scratch")), 0.6)[0].advice
        assert alone is not None
        assert "earlier tasks" not in alone


class TestWords:
    def test_a_line_to_print(self, curriculum: tuple[Stage, ...]) -> None:
        line = str(of(curriculum[1], 0.58, 0.45, learnt={NAMES[0]: 0.5})[0])
        assert line == "task1_moving_grasp: well retained (loss 0.58, 1.16 x its loss when learnt)"

    def test_as_json(self, curriculum: tuple[Stage, ...]) -> None:
        content = json.loads(json.dumps(of(curriculum[1], 0.9, 0.45)[0].to_json()))
        assert (content["task"], content["verdict"], content["ratio"]) == (NAMES[0], "forgotten", None)

    def test_a_task_that_was_not_validated(self, make_stage: MakeStage) -> None:
        with pytest.raises(UserError, match="task2 was not validated on task1"):
            judge(make_stage("0.2", "0.8"), {"task2": 0.4})

    @pytest.mark.parametrize("loss", [float("nan"), float("inf")])
    def test_a_loss_that_is_no_number(self, make_stage: MakeStage, loss: float) -> None:
        with pytest.raises(UserError, match="validation loss of task1 is"):
            of(make_stage("0.2", "0.8"), loss, 0.4)
