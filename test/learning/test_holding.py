"""Samples in which the robot is told something else, and stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.learning.holding import hold
from kuavo_smolvla_ros.learning.mixed_dataset import MixedDataset, validation_draws
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.sources import DataError, Facts, TaskSource
from kuavo_smolvla_ros.learning.stage import Stage, StageError, TaskData, holding_at_others, single_task
from kuavo_smolvla_ros.learning.stage_config import load_curriculum, read_request

STATE, ACTION, PADDING = "observation.state", "action", "action_is_pad"
ARMS = ("shoulder", "elbow")
BASE = ("base_x", "base_yaw", "base_move")
UNITS = {**dict.fromkeys(ARMS, "rad"), "gripper": "fraction", "base_x": "m", "base_yaw": "rad"}
UNITS["base_move"] = "flag"


def facts(**changes: Any) -> Facts:
    names = (*ARMS, "gripper")
    return replace(Facts(10.0, names, (*names, *BASE), {}, units=UNITS), **changes)


def sample(steps: int = 4) -> dict[str, Any]:
    return {
        STATE: torch.tensor([0.1, 0.2, 0.3]),
        ACTION: torch.arange(6 * steps, dtype=torch.float32).view(steps, 6) + 1,
        PADDING: torch.tensor([False] * (steps - 1) + [True]),
        "task": "what it shows",
    }


class TestHold:
    def test_arms_stay_grippers_keep_their_grasp_and_the_base_stands(self) -> None:
        held = hold(sample(), facts(), "task1")
        assert held[ACTION].shape == (4, 6)
        expected = torch.tensor([0.1, 0.2, 3.0, 4.0, 5.0, 0.0])  # state; the first action; no walking
        assert all(torch.equal(row, expected) for row in held[ACTION])

    def test_it_may_go_on_after_the_end_of_the_episode(self) -> None:
        assert not hold(sample(), facts(), "task1")[PADDING].any()

    def test_the_sample_it_came_from_is_as_before(self) -> None:
        given_ = sample()
        before = {key: value.clone() for key, value in given_.items() if isinstance(value, torch.Tensor)}
        held = hold(given_, facts(), "task1")
        held[ACTION] += 1
        assert all(torch.equal(given_[key], value) for key, value in before.items())
        assert held["task"] == "what it shows"

    def test_joints_are_found_by_name_not_by_place(self) -> None:
        turned = facts(state_names=("gripper", "elbow", "shoulder"))
        held = hold(sample(), turned, "task1")
        assert held[ACTION][0, :3].tolist() == pytest.approx([0.3, 0.2, 3.0])

    @pytest.mark.parametrize(
        "unknown", [{"units": {}}, {"state_names": ("a", "b", "c")}], ids=["units", "names"]
    )
    def test_a_robot_of_which_no_joint_is_known_is_named(self, unknown: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"task7 does not say which joints are angles.*hold_share=0"):
            hold(sample(), facts(**unknown), "task7")


class TestSentences:
    def test_each_task_holds_at_the_others(self, make_task: Callable[..., TaskData]) -> None:
        first = make_task(1, hold_share=0.2, hold_sentences=("sing", "do task 2"))
        second = make_task(2, paraphrases=("number two",), hold_share=0.2)
        third = make_task(3)
        tasks = holding_at_others([first, second, third])
        assert tasks[0].hold_sentences == ("sing", "do task 2", "number two", "do task 3")
        assert tasks[1].hold_sentences == ("do task 1", "do task 3")
        assert tasks[2] == third, "it was not asked for"
        assert holding_at_others(tasks) == tasks

    def test_a_task_alone_keeps_what_it_was_told_to_hold_at(
        self, make_stage: Callable[..., Stage], make_task: Callable[..., TaskData]
    ) -> None:
        tasks = holding_at_others([make_task(n, hold_share=0.2) for n in (1, 2)])
        stage = make_stage("0.5", "0.5", tasks=tasks)
        alone = single_task(stage, stage)
        assert alone.task.hold_sentences == ("do task 1",)

    def test_with_nothing_to_be_told_it_says_what_to_give(
        self, make_stage: Callable[..., Stage], make_task: Callable[..., TaskData]
    ) -> None:
        with pytest.raises(StageError, match=r"task1 has a hold_share of 0\.2.*give task.hold_sentences"):
            make_stage("1", tasks=(make_task(1, hold_share=0.2),))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"hold_share": 1.0}, "task.hold_share of task1 is 1.0"),
            ({"hold_share": -0.1}, "task.hold_share of task1 is -0.1"),
            ({"hold_sentences": ("",)}, "empty instruction, paraphrase or hold sentence"),
            ({"hold_sentences": ("do task 1",)}, "done and held at the same sentence: 'do task 1'"),
            ({"paraphrases": ("go",), "hold_sentences": ("go",)}, "done and held at the same sentence: 'go'"),
        ],
    )
    def test_what_contradicts_itself_is_refused(
        self, make_task: Callable[..., TaskData], fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(StageError, match=message):
            make_task(1, **fields)

    def test_two_tasks_of_the_same_words_cannot_hold_at_each_other(
        self, make_task: Callable[..., TaskData]
    ) -> None:
        same = [make_task(n, instruction="go", hold_share=0.1) for n in (1, 2)]
        with pytest.raises(StageError, match="done and held at the same sentence: 'go'"):
            holding_at_others(same)

    def test_a_stage_is_another_one_where_they_are_said_and_only_there(
        self, make_stage: Callable[..., Stage], make_task: Callable[..., TaskData]
    ) -> None:
        def stage(**fields: Any) -> str:
            return make_stage("1", tasks=(make_task(1, **fields),)).hash

        assert stage() == stage(hold_sentences=("sing",))
        said = {stage(hold_share=share, hold_sentences=(text,)) for share in (0.1, 0.2) for text in "ab"}
        assert len({stage(), *said}) == 5

    def test_in_the_shipped_curriculum_one_setting_is_enough(self) -> None:
        assert all(stage.task.hold_share == 0 for stage in load_curriculum())
        stages = read_request(["stages=all", "data.hold_share=0.15"]).stages
        own = [stage.task.instruction for stage in stages]
        assert set(own[1:]) <= set(stages[0].task.hold_sentences), "its file names the tasks to come"
        for stage in stages:
            for task in stage.tasks:
                others = {other.instruction for other in stage.tasks if other.name != task.name}
                assert others <= set(task.hold_sentences)
            config = stage.policy_config(backbone="tiny", device="cpu")
            assert set(config.instructions) >= set(stage.task.hold_sentences), "else none is checked"
            assert config.tasks[stage.name] == list(stage.task.sentences), "it is not done at those"


@pytest.fixture(scope="module")
def manager(
    make_stage: Callable[..., Stage],
    make_source: Callable[..., TaskSource],
    make_task: Callable[..., TaskData],
) -> ReplayDatasetManager:
    tasks = holding_at_others(
        [
            make_task(1, hold_share=0.25),
            make_task(2, hold_share=0.25, paraphrases=("number two",), paraphrase_share=0.5),
        ]
    )
    units = dict.fromkeys((f"joint_{i}" for i in range(16)), "rad")
    sources = {f"task{n}": make_source(n, units=units) for n in (1, 2)}
    return ReplayDatasetManager(make_stage("0.5", "0.5", tasks=tasks), sources)


class TestInTheMix:
    def test_they_have_their_share_and_each_sentence_its_part(self, manager: ReplayDatasetManager) -> None:
        draws = manager.plan.draws(0, 0, 20_000)
        counts = Counter(draw.sentence for draw in draws)
        assert counts.keys() == {0, 1, 2}
        assert counts[0] / 20_000 == pytest.approx(0.75, abs=0.01)
        assert [counts[n] / 20_000 for n in (1, 2)] == pytest.approx([0.125] * 2, abs=0.01)

    def test_paraphrases_keep_their_part_of_the_rest(self, manager: ReplayDatasetManager) -> None:
        counts = Counter(draw.sentence for draw in manager.plan.draws(1, 0, 20_000))
        assert [counts[n] / 20_000 for n in range(3)] == pytest.approx([0.375, 0.375, 0.25], abs=0.012)

    def test_the_sample_stays_and_says_what_another_task_is_told(self, manager: ReplayDatasetManager) -> None:
        samples = MixedDataset.of_manager(manager)
        for draw in manager.plan.batch(0) + manager.plan.batch(1):
            told = samples[draw]
            state = told[STATE]
            own = manager.stage.tasks[draw.task].sentences
            if draw.sentence < len(own):
                assert told["task"] in own
                assert told[ACTION].eq(draw.task + 1).all()
            else:
                assert told["task"] in manager.stage.tasks[1 - draw.task].sentences
                assert all(torch.equal(row, state) for row in told[ACTION])

    @given(first=st.integers(0, 10**6), count=st.integers(1, 200))
    def test_a_draw_needs_no_history(self, manager: ReplayDatasetManager, first: int, count: int) -> None:
        whole = manager.plan.draws(1, first, count + 5)
        assert manager.plan.draws(1, first + 5, count) == whole[5:]

    def test_frames_are_those_without_it(
        self, manager: ReplayDatasetManager, make_stage: Callable[..., Stage]
    ) -> None:
        """It changes what is said at a frame, and which frames are drawn stays as it was."""
        plain = tuple(replace(task, hold_share=0.0) for task in manager.stage.tasks)
        sources = {source.name: source for source in manager.sources}
        without = ReplayDatasetManager(replace(manager.stage, tasks=plain), sources)
        for step in range(5):
            frames = [(draw.task, draw.frame) for draw in manager.plan.batch(step)]
            assert frames == [(draw.task, draw.frame) for draw in without.plan.batch(step)]

    def test_validation_does_not_hold(self, manager: ReplayDatasetManager) -> None:
        assert {
            draw.sentence for task in manager.stage.tasks for draw in validation_draws(manager, task)
        } == {0}

    def test_a_robot_without_a_base_stands_while_it_holds(
        self,
        make_stage: Callable[..., Stage],
        make_source: Callable[..., TaskSource],
        make_task: Callable[..., TaskData],
    ) -> None:
        names = tuple(f"joint_{i}" for i in range(16))
        units = dict.fromkeys(names, "rad")
        wide = make_source(
            2, action_dim=20, action_names=(*names, *"xyz", "move"), units=units | {"move": "flag"}
        )
        tasks = holding_at_others([make_task(n, hold_share=0.5) for n in (1, 2)])
        walking = ReplayDatasetManager(
            make_stage("0.5", "0.5", tasks=tasks), {"task1": make_source(1, units=units), "task2": wide}
        )
        samples = MixedDataset.of_manager(walking)
        narrow = samples[Draw(0, 3, 1)]
        assert not narrow[ACTION][:, 16:].any()
        assert not narrow["action_dim_is_pad"].any()
        walks = samples[Draw(1, 3, 1)]
        assert walks[ACTION][0, 16:].tolist() == [2, 2, 2, 0]
        np.testing.assert_array_equal(walks[ACTION][0, :2], walks[STATE][:2])
