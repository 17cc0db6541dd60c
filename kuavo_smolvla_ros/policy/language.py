"""Instructions: the four tasks' sentences, and a tokenizer that never cuts one short in silence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError

TOKENS = "observation.language.tokens"
TOKEN_MASK = "observation.language.attention_mask"
PADDINGS = ("max_length", "longest")

TASK_INSTRUCTIONS = {
    "task1_moving_grasp": "Pick up the moving object from the conveyor belt, place it on the table, "
    "and push it to the designated area",
    "task2_weighing": "Pick up the package from the conveyor belt, weigh it on the electronic scale, "
    "then pick it up again and place it in the designated storage container",
    "task3_placement": "Pick up a bottle from the cluttered daily chemical bottles, transfer it to the "
    "other hand, "
    "and place it in the specified pose with the label facing up",
    "task4_sorting": "Move from the starting point to the rack, pick up the workpiece, turn around, "
    "move to the placement rack, and place it in the designated position",
}


class InstructionError(UserError):
    """An instruction is empty, not text, or longer than the policy reads."""


@dataclass(frozen=True)
class InstructionTokenizer:
    """The backbone's tokenizer reduced to what an instruction needs; can be stored as bytes in a
    checkpoint.
    """

    tokenizer: Tokenizer
    pad_id: int

    @classmethod
    def from_folder(cls, folder: Path) -> InstructionTokenizer:
        """Read the tokenizer of a model folder in Hugging Face layout."""
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if loaded.pad_token_id is None:
            raise InstructionError(f"{folder}: the tokenizer names no padding token")
        return cls.from_text(loaded.backend_tokenizer.to_str(), loaded.pad_token_id)

    @classmethod
    def from_text(cls, text: str, pad_id: int) -> InstructionTokenizer:
        """From the contents of a `tokenizer.json`; any padding or cutting configured there is switched
        off.
        """
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, pad_id)

    def to_state(self) -> dict[str, Tensor]:
        """As tensors, the only thing a processor's state file can hold."""
        text = bytearray(self.tokenizer.to_str().encode("utf-8"))
        return {
            "tokenizer_json": torch.frombuffer(text, dtype=torch.uint8),
            "pad_id": torch.tensor(self.pad_id),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> InstructionTokenizer:
        """Inverse of `to_state`."""
        text = bytes(state["tokenizer_json"].cpu().numpy()).decode("utf-8")
        return cls.from_text(text, int(state["pad_id"]))

    def lengths(self, instructions: Sequence[str]) -> list[int]:
        """Tokens of each instruction, its final newline included."""
        return [len(e.ids) for e in self.tokenizer.encode_batch([with_newline(i) for i in instructions])]

    def __call__(
        self, instructions: Sequence[str], max_length: int, padding: str = "max_length"
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask of real tokens, both (B, length), padded on the right."""
        if padding not in PADDINGS:
            raise InstructionError(f"padding is {padding!r}; it is one of {', '.join(PADDINGS)}")
        encoded = [e.ids for e in self.tokenizer.encode_batch([with_newline(i) for i in instructions])]
        _require_fit(instructions, map(len, encoded), max_length)
        length = max_length if padding == "max_length" else max(map(len, encoded))
        ids = torch.full((len(encoded), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(encoded), length), dtype=torch.bool)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, : len(tokens)] = True
        return ids, mask


def with_newline(instruction: str) -> str:
    """The instruction as the model was trained to read it: ending in one newline."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise InstructionError(f"an instruction must be a sentence, not {instruction!r}")
    return instruction if instruction.endswith("\n") else instruction + "\n"


def check_instructions(tokenizer: InstructionTokenizer, instructions: Sequence[str], max_length: int) -> None:
    """Fail on the first instruction that does not fit, with its length and what to set."""
    _require_fit(instructions, tokenizer.lengths(instructions), max_length)


def _require_fit(instructions: Iterable[str], lengths: Iterable[int], max_length: int) -> None:
    for instruction, length in zip(instructions, lengths, strict=True):
        if length > max_length:
            raise InstructionError(
                f"the instruction {instruction.strip()!r} is {length} tokens long, the policy reads "
                f"{max_length}: "
                f"shorten it, or set tokenizer_max_length to at least {length}"
            )
