from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.language import (
    TASK_INSTRUCTIONS,
    InstructionError,
    InstructionTokenizer,
    check_instructions,
    with_newline,
)

FOLDER = resolve_backbone("tiny").path
TOKENIZER = InstructionTokenizer.from_folder(FOLDER)
sentences = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=30).filter(
    str.strip
)


@given(st.lists(sentences, min_size=1, max_size=4), st.sampled_from(["max_length", "longest"]))
def test_equals_the_published_tokenizers_result(texts, padding):
    ids, mask = TOKENIZER(texts, 200, padding)
    expected = AutoTokenizer.from_pretrained(FOLDER)(
        [t + "\n" for t in texts], max_length=200, padding=padding, padding_side="right", return_tensors="pt"
    )
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"].bool())


@pytest.mark.parametrize("backbone", ["tiny", "smolvlm2-500m"])
def test_the_four_tasks_fit(backbone):
    tokenizer = InstructionTokenizer.from_folder(resolve_backbone(backbone).path)
    check_instructions(tokenizer, list(TASK_INSTRUCTIONS.values()), 48)
    assert len(TASK_INSTRUCTIONS) == 4


def test_an_instruction_that_is_too_long_says_how_long_and_what_to_set():
    text = "put the parcel " * 60
    length = TOKENIZER.lengths([text])[0]
    with pytest.raises(
        InstructionError, match=rf"is {length} tokens long.*tokenizer_max_length to at least {length}"
    ):
        TOKENIZER(["go", text], 48)
    with pytest.raises(InstructionError, match="shorten it"):
        check_instructions(TOKENIZER, [text], 48)
    ids, mask = TOKENIZER([text], length)
    assert mask.all()
    assert ids.shape == (1, length)


def test_exactly_the_limit_fits_and_one_more_does_not():
    length = TOKENIZER.lengths(["go there"])[0]
    TOKENIZER(["go there"], length)
    with pytest.raises(InstructionError):
        TOKENIZER(["go there"], length - 1)


def test_one_final_newline():
    assert with_newline("go") == with_newline("go\n") == "go\n"


@pytest.mark.parametrize("text", ["", "  ", "\n", None, 3])
def test_what_is_no_sentence_is_refused(text):
    with pytest.raises(InstructionError, match="must be a sentence"):
        TOKENIZER([text], 48)


def test_unknown_padding_is_refused():
    with pytest.raises(InstructionError, match="max_length, longest"):
        TOKENIZER(["go"], 48, "left")


def test_survives_its_stored_form():
    copy = InstructionTokenizer.from_state(TOKENIZER.to_state())
    text = list(TASK_INSTRUCTIONS.values())
    assert torch.equal(copy(text, 48)[0], TOKENIZER(text, 48)[0])
    assert copy.pad_id == TOKENIZER.pad_id


def test_padding_and_cutting_of_the_file_are_switched_off():
    from tokenizers import Tokenizer

    file = Tokenizer.from_str(TOKENIZER.tokenizer.to_str())
    file.enable_truncation(3)
    file.enable_padding(length=40)
    tokenizer = InstructionTokenizer.from_text(file.to_str(), 0)
    assert tokenizer.lengths(["pick up the parcel from the belt"]) == TOKENIZER.lengths(
        ["pick up the parcel from the belt"]
    )
