"""The small tokenizer of the built-in backbones: a shipped byte-level BPE plus SmolVLM's special tokens.

Its ids are not those of the published tokenizer (apart from the special tokens of the full-size stand-in), so
it must never meet published weights; `STAND_IN` in `tokenizer_config.json` says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ASSET = Path(__file__).parent / "assets" / "tiny_tokenizer.json"

# Ids 0, 1 and 2, as in the published tokenizer.
TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PADDING = "<|im_end|>"
PADDING_ID = TEXT_SPECIALS.index(PADDING)
FAKE_IMAGE, GLOBAL_IMAGE, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"
IMAGE_GRID = 6  # pictures cut into at most 6 x 6 tiles, a token for each place
STAND_IN = "kuavo_smolvla_stand_in"


def image_specials() -> tuple[str, ...]:
    """SmolVLM's tokens for pictures, in the order of their ids."""
    places = range(1, IMAGE_GRID + 1)
    return (GLOBAL_IMAGE, *(f"<row_{r}_col_{c}>" for r in places for c in places), FAKE_IMAGE, IMAGE)


def base_vocabulary() -> int:
    """Ids taken by the shipped tokenizer itself."""
    return max(_asset()["model"]["vocab"].values()) + 1


def special_ids(first: int, end_of_utterance: int) -> dict[str, int]:
    """Ids of the added tokens: pictures from `first` on, then reserved ones up to the end of an utterance."""
    names = image_specials()
    ids = {name: first + i for i, name in enumerate(names)}
    ids[END_OF_UTTERANCE] = end_of_utterance
    if end_of_utterance < first + len(names):
        raise ValueError("the end of an utterance lies among the picture tokens")
    return ids


def tokenizer_files(first_special: int, end_of_utterance: int) -> dict[str, str]:
    """`tokenizer.json` and its companions with the special tokens at the given ids."""
    ids = special_ids(first_special, end_of_utterance)
    tokenizer = _asset()
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update(ids)  # a special token that is part of the vocabulary keeps the id it has there
    # The library warns of every gap. No text becomes one of these: merges never lead to them.
    taken = set(vocabulary.values())
    vocabulary.update({f"<unused_{i}>": i for i in range(end_of_utterance) if i not in taken})
    tokenizer["added_tokens"] = [_special(id_, name) for name, id_ in _all_specials(ids)]
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": END_OF_UTTERANCE,
        "unk_token": "<|endoftext|>",
        "pad_token": PADDING,
    }
    # lerobot reads the ids of the first two from the tokenizer.
    extra = {
        "fake_image_token": FAKE_IMAGE,
        "global_image_token": GLOBAL_IMAGE,
        "image_token": IMAGE,
        "end_of_utterance_token": END_OF_UTTERANCE,
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "SmolVLMProcessor",
        "model_max_length": 8192,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": extra,
        STAND_IN: True,
        **names,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(described, indent=2) + "\n",
        "special_tokens_map.json": json.dumps({**names, **extra}, indent=2) + "\n",
    }


def _asset() -> dict[str, Any]:
    return json.loads(ASSET.read_text(encoding="utf-8"))


def _all_specials(ids: dict[str, int]) -> list[tuple[str, int]]:
    return [*((name, i) for i, name in enumerate(TEXT_SPECIALS)), *ids.items()]


def _special(id_: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id_, "content": content, **flags}
