"""Which sentence the policy is given: a sentence, or the name of a task that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

UNKNOWN_CHOICES = ("accept", "warn", "refuse")
FREE_TASK = "free"


@dataclass(frozen=True)
class Instruction:
    """A sentence, and the task it belongs to (`free` for a sentence of the operator's own)."""

    sentence: str
    task: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of a request: an instruction (perhaps with a warning), or none and why."""

    instruction: Instruction | None
    remark: str = ""


def resolve(text: str, known: Mapping[str, Sequence[str]], on_unknown: str) -> Verdict:
    """Find the instruction meant by `text` among the tasks `known` (name to sentences, its own first)."""
    wanted = " ".join(text.split())
    if not wanted:
        return Verdict(None, "the instruction is empty")
    if wanted in known:
        return Verdict(Instruction(known[wanted][0], wanted))
    for task, sentences in known.items():
        for sentence in sentences:
            if _same(wanted, sentence):
                return Verdict(Instruction(sentence, task))
    tasks = ", ".join(known) or "none known"
    remark = f"'{wanted}' is none of the instructions the policy was trained on ({tasks})"
    if on_unknown == "refuse":
        return Verdict(None, remark)
    return Verdict(Instruction(wanted, FREE_TASK), remark if on_unknown == "warn" else "")


def _same(a: str, b: str) -> bool:
    def plain(text: str) -> str:
        return " ".join(text.lower().rstrip(". ").split())

    return plain(a) == plain(b)


def known_tasks(
    tasks: Mapping[str, Sequence[str]], instructions: Sequence[str], shipped: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """What a policy was trained on, by task: as it says itself, or, where it does not, as its sentences tell.

    A sentence whose task is unknown stands for itself.
    """
    if tasks:
        return {name: tuple(sentences) for name, sentences in tasks.items()}
    task_of = {sentence: task for task, sentence in shipped.items()}
    return {task_of.get(sentence, sentence): (sentence,) for sentence in instructions}
