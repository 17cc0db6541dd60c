"""Wordings of the tasks: many, always the same, within the network's limit, and none of them held out."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest

from kuavo_smolvla_ros.experiment.ways import TASK_FILES, TrainingSettings, curriculum_of
from kuavo_smolvla_ros.experiment.wordings import COUNT, SHARE, wordings
from kuavo_smolvla_ros.learning.paraphrases import held_out_paraphrases
from kuavo_smolvla_ros.policy.backbone import resolve_backbone

LIMIT = 48


@pytest.mark.parametrize("task", TASK_FILES)
def test_they_are_many_and_always_the_same(task: str) -> None:
    assert len(set(wordings(task))) == COUNT
    assert wordings(task) == wordings(task)
    assert wordings(task, 20) == wordings(task)[:20]


@pytest.mark.parametrize("task", TASK_FILES)
def test_none_is_held_out_nor_holds_one(task: str) -> None:
    for held_out in held_out_paraphrases()[task]:
        assert not [sentence for sentence in wordings(task) if held_out.lower() in sentence.lower()]


@pytest.mark.parametrize("task", TASK_FILES)
def test_the_network_reads_them_whole(task: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve_backbone("tiny").path))
    assert max(len(ids) for ids in tokenizer(list(wordings(task))).input_ids) < LIMIT


@pytest.mark.parametrize("task", TASK_FILES)
def test_they_read_as_sentences(task: str) -> None:
    for sentence in wordings(task):
        assert sentence[0].isupper()
        assert not set(sentence) & set("{}")
        words = sentence.lower().replace(",", "").split()
        assert all(one != other for one, other in pairwise(words)), sentence


def test_no_sentence_says_two_tasks() -> None:
    for one, other in combinations(TASK_FILES, 2):
        assert not set(wordings(one)) & set(wordings(other))


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(KeyError, match="task5"):
        wordings("task5")


def test_every_stage_hears_them_of_every_task(tmp_path: Path) -> None:
    stages, _ = curriculum_of(TrainingSettings(), tmp_path / "seeing", tmp_path, "cpu")
    for stage in stages:
        for task in stage.tasks:
            assert set(wordings(task.name)) <= {*task.paraphrases, task.instruction}
            assert task.instruction not in task.paraphrases
            assert task.paraphrase_share == SHARE
