"""What sentences mean to a policy: a measure that tells one that listens from one that does not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.curriculum_run import make_accelerator, run_stages
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.paraphrases import Observation, contrast, hear, held_out_paraphrases, listen
from kuavo_smolvla_ros.learning.stage import joint
from kuavo_smolvla_ros.learning.stage_config import load_curriculum
from kuavo_smolvla_ros.learning.synthetic import (
    conflicting_tasks,
    synthetic_curriculum,
    synthetic_run,
)
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.runtime import PolicyRunner
from kuavo_smolvla_ros.policy.untrained import save_untrained
from kuavo_smolvla_ros.robot.spec import load_spec

LIMIT = 48
REAL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
OWN = {"push": "push the cube", "pull": "pull the cube", "turn": "turn the cube"}
SCENE = Observation({}, np.zeros(2))


class Keywords:
    """Moves by the word it knows, as well as it listens; what it does not know, it takes for the first."""

    def __init__(self, listens: float = 1.0, noise: float = 0.05) -> None:
        self.listens, self.noise = listens, noise

    def chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        instruction: str,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        word = next((n for n, name in enumerate(OWN) if name in instruction), 0)
        noise = self.noise * np.random.default_rng(seed).normal(size=(8, 3))
        # Radians, and a gripper that every task closes alike.
        moved = np.array([np.cos(2 * word), 100 * np.sin(2 * word), 1.0]) * [self.listens, self.listens, 1]
        return np.linspace(0, 1, 8)[:, None] * moved + noise * [1, 100, 0]


def test_a_sentence_means_the_task_it_moves_like() -> None:
    heard = hear(Keywords(), SCENE, OWN, ["now turn it", "please pull", "push"])
    assert [each.nearest for each in heard] == ["turn", "pull", "push"]
    assert all(each.distances[each.nearest] == 0 for each in heard)


def test_paraphrases_are_counted_by_task_and_where_they_went() -> None:
    said = {"push": ["push!", "shove it"], "pull": ["pull!", "draw it", "drag it"]}
    result = listen(Keywords(), [SCENE, SCENE], OWN, said)
    assert (result.tasks["push"].reached, result.tasks["push"].trials) == (4, 4)
    assert (result.tasks["pull"].reached, result.tasks["pull"].trials) == (2, 6)
    assert result.tasks["pull"].elsewhere == {"push": 4}
    assert result.share == pytest.approx(0.6)
    low, high = result.tasks["pull"].interval
    assert 0 < low < 1 / 3 < high < 1
    assert result.to_dict()["tasks"]["pull"]["elsewhere"] == {"push": 4}


def test_contrast_tells_who_listens_from_who_does_not() -> None:
    assert contrast(Keywords(), SCENE, OWN) > 5
    assert contrast(Keywords(listens=0.01), SCENE, OWN) < 1
    assert contrast(Keywords(listens=0.0), SCENE, OWN) == 0
    assert contrast(Keywords(noise=0.0), SCENE, OWN) == float("inf")
    assert contrast(Keywords(listens=0.0, noise=0.0), SCENE, OWN) == 0


@pytest.mark.parametrize(
    ("own", "said", "scenes"),
    [
        (OWN, {"juggle": ["juggle"]}, [SCENE]),
        (OWN, {}, [SCENE]),
        (OWN, {"push": ["push"]}, []),
        ({"push": "push"}, {"push": ["push"]}, [SCENE]),
    ],
)
def test_a_test_of_nothing_is_refused(own: Any, said: Any, scenes: Any) -> None:
    with pytest.raises(UsageError, match="a language test needs"):
        listen(Keywords(), scenes, own, said)


class TestTheHeldOutSentences:
    def test_each_task_has_at_least_four_that_no_training_sees(self) -> None:
        held_out = held_out_paraphrases()
        curriculum = load_curriculum()
        assert list(held_out) == [stage.name for stage in curriculum]
        trained = {_plain(s) for stage in curriculum for s in stage.task.sentences}
        plain = [_plain(sentence) for sentences in held_out.values() for sentence in sentences]
        assert min(map(len, held_out.values())) >= 4
        assert len(set(plain)) == len(plain)
        assert not trained & set(plain)

    @pytest.mark.parametrize("backbone", ["tiny", "smolvlm2-500m", REAL])
    def test_they_fit_the_tokenizer(self, backbone: str, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(tmp_path)))
            try:
                place = backbone if backbone == REAL else resolve_backbone(backbone).path
                tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
            except OSError:
                pytest.skip(f"the tokenizer of {backbone} is not on this machine")
        for sentence in (s for sentences in held_out_paraphrases().values() for s in sentences):
            assert len(tokenizer(sentence + "\n")["input_ids"]) <= LIMIT, sentence

    @pytest.mark.parametrize("text", ["", "task1: no list", "task1: []", "task1: ['']", "- a", "task1: [5]"])
    def test_another_file_must_have_the_same_form(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(UsageError, match="is no list of sentences for each task"):
            held_out_paraphrases(tmp_path / "own.yaml")


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(",", " ").split())


def test_a_policy_nobody_has_trained_does_not_listen(tmp_path: Path) -> None:
    spec = load_spec("kuavo_sim")
    runner = PolicyRunner.load(save_untrained(spec, tmp_path / "policy", pose="task1_ready"), device="cpu")
    images = {role: np.full((48, 64, 3), 90, np.uint8) for role in spec.cameras}
    scene = Observation(images, np.zeros(len(spec.state_names)))
    own = {stage.name: stage.task.instruction for stage in load_curriculum()}
    assert contrast(runner, scene, own) < 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_policy_trained_on_conflicting_tasks_listens(tmp_path: Path) -> None:
    """Sentences and paraphrases in training; others of the same words, unseen, reach the same task."""
    seen = (
        ("both arms up", "raise the arms", "arms go up"),
        ("both arms down", "lower the arms", "arms go down"),
    )
    unseen = (("raise both the arms", "the arms go up"), ("lower both the arms", "the arms go down"))
    curriculum = synthetic_curriculum(8, extra_of_last=0)[:2]
    tasks = tuple(
        dataclasses.replace(task, paraphrases=seen[n], paraphrase_share=0.5)
        for n, task in enumerate(curriculum[-1].tasks)
    )
    stage = dataclasses.replace(joint(curriculum), tasks=tasks)
    names = [task.name for task in tasks]
    sources = conflicting_tasks(names, extra_of_last=0)
    run = synthetic_run(tmp_path)
    assert run_stages(
        (stage,),
        run,
        make_accelerator((stage,), run),
        lambda task, chunk: sources[task.name],
        interruption=Interruption(),
    )
    runner = PolicyRunner.load(stage.folder(tmp_path) / "best", device="cpu")
    scenes = []
    for frame in (3, 25, 47):
        sample = sources[names[0]].frames[frame]
        picture = (sample["observation.images.head_cam_h"].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
        scenes.append(Observation({"head_cam_h": picture}, sample["observation.state"].numpy()))
    own = {task.name: task.instruction for task in tasks}
    trained = listen(runner, scenes, own, dict(zip(names, seen, strict=True)))
    assert trained.contrast > 2, trained
    assert trained.share >= 0.9, trained
    held_out = listen(runner, scenes, own, dict(zip(names, unseen, strict=True)))
    assert held_out.share >= 0.9, held_out
