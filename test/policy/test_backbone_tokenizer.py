"""The small tokenizer: the tasks' sentences in few tokens, any other text without loss."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kuavo_smolvla_ros.policy.backbone import BUILT_IN, resolve_backbone
from kuavo_smolvla_ros.policy.backbone_tokenizer import (
    ASSET,
    END_OF_UTTERANCE,
    FAKE_IMAGE,
    GLOBAL_IMAGE,
    IMAGE,
    TEXT_SPECIALS,
    special_ids,
)
from kuavo_smolvla_ros.policy.language import TASK_INSTRUCTIONS

LIMIT = 48
TRAINING = Path(__file__).parents[2] / "training" / "train_tiny_tokenizer.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=BUILT_IN)
def tokenizer(request: pytest.FixtureRequest, cache: None) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve_backbone(request.param).path)


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_tokenizer", TRAINING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sentence", TASK_INSTRUCTIONS.values(), ids=TASK_INSTRUCTIONS)
def test_task_sentences_fit_with_their_newline(tokenizer: PreTrainedTokenizerFast, sentence: str) -> None:
    ids = tokenizer(sentence + "\n")["input_ids"]
    assert len(ids) <= LIMIT
    assert len(ids) <= len(sentence.replace(",", " ,").split()) + 1  # a word is a token
    assert tokenizer.decode(ids) == sentence + "\n"


def test_tasks_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = {tuple(tokenizer(sentence)["input_ids"]) for sentence in TASK_INSTRUCTIONS.values()}
    assert len(encoded) == len(TASK_INSTRUCTIONS)


@given(text=st.text())
def test_any_text_is_encoded_without_loss(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if any(special in text for special in tokenizer.all_special_tokens):
        return
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


@pytest.mark.parametrize("text", ["抓取瓶子", "größer", "Zażółć", "pick up №5 ✓", "a\tb\n\nc  d"])
def test_other_languages_and_signs_come_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ordinary_commands_stay_short(tokenizer: PreTrainedTokenizerFast) -> None:
    for command in ("Put the red cup on the table", "Open the left gripper", "Turn around and stop"):
        assert len(tokenizer(command + "\n")["input_ids"]) <= len(command.split()) + 1


def test_padding_and_special_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in TEXT_SPECIALS] == [0, 1, 2]
    assert tokenizer.pad_token_id == 2
    assert tokenizer.padding_side == "right"
    # lerobot reads these two
    assert tokenizer.fake_image_token_id == tokenizer.convert_tokens_to_ids(FAKE_IMAGE)
    assert tokenizer.global_image_token_id == tokenizer.convert_tokens_to_ids(GLOBAL_IMAGE)
    assert tokenizer(f"{FAKE_IMAGE}{GLOBAL_IMAGE}{IMAGE}")["input_ids"] == [
        tokenizer.fake_image_token_id,
        tokenizer.global_image_token_id,
        tokenizer.convert_tokens_to_ids(IMAGE),
    ]
    assert tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE) == len(tokenizer) - 1


def test_full_size_has_the_published_special_ids(cache: None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone("smolvlm2-500m").path)
    published = {
        GLOBAL_IMAGE: 49152,
        "<row_1_col_1>": 49153,
        "<row_6_col_6>": 49188,
        FAKE_IMAGE: 49189,
        IMAGE: 49190,
        END_OF_UTTERANCE: 49279,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in published} == published
    assert len(tokenizer) == 49280


def test_no_id_is_missing_or_double(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_special_tokens_do_not_overlap() -> None:
    with pytest.raises(ValueError, match="among the picture tokens"):
        special_ids(first=100, end_of_utterance=138)


def test_the_shipped_file_is_what_training_gives(training: ModuleType) -> None:
    assert training.train().to_str() + "\n" == ASSET.read_text(encoding="utf-8")


def test_training_needs_nothing_but_its_sentences(training: ModuleType, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("lift lift lift\n")
    small: Tokenizer = training.train(corpus)
    assert len(small.encode("lift").ids) == 1
    assert small.decode(small.encode("other words").ids) == "other words"


def test_the_file_is_small() -> None:
    assert ASSET.stat().st_size < 30_000
