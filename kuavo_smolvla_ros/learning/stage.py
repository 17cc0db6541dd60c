"""A stage of the curriculum as data: what is learnt, from what mix, how, and when it counts as retained.

A stage is immutable and knows everything that decides its result (not where results go); its hash names that
result. A curriculum is nothing but stages in a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.schedule import Schedule

if TYPE_CHECKING:
    from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

BEST = "best"
LAST = "last"
PRECISIONS = ("bf16", "no")


class StageError(UserError):
    """A stage or a curriculum contradicts itself, or lacks what it builds on."""


@dataclass(frozen=True)
class TaskData:
    """A task: what it is called, what the robot is told, and where its demonstrations are."""

    number: int  # task_id of the outputs
    name: str
    description: str
    instruction: str
    datasets: tuple[str, ...]  # folders or hub ids; together they are the task's data
    held_out_share: float  # of the episodes, for validation
    split_seed: int = 0
    paraphrases: tuple[str, ...] = ()
    paraphrase_share: float = 0.0  # of the samples
    hold_share: float = 0.0  # of the samples: told one of the sentences below, which mean something else
    hold_sentences: tuple[str, ...] = ()  # told one of these, the robot stays where it is

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise StageError(f"task.name is {self.name!r}; it names a folder, so it must be a plain word")
        for sentence in (*self.sentences, *self.hold_sentences):
            if not sentence.strip():
                raise StageError(f"{self.name} has an empty instruction, paraphrase or hold sentence")
        if not self.datasets:
            raise StageError(f"{self.name} names no data set: set task.datasets to a list of folders")
        if len(set(self.datasets)) != len(self.datasets):
            raise StageError(f"{self.name} names a data set twice: {', '.join(self.datasets)}")
        if not 0 < self.held_out_share < 1:
            raise StageError(
                f"task.held_out_share of {self.name} is {self.held_out_share}; give 0 < share < 1"
            )
        if not 0 <= self.paraphrase_share <= 1:
            raise StageError(f"task.paraphrase_share of {self.name} is {self.paraphrase_share}; give 0 to 1")
        if not 0 <= self.hold_share < 1:
            raise StageError(
                f"task.hold_share of {self.name} is {self.hold_share}; give a share of 0 or more and below 1"
            )
        own = set(self.sentences)
        for sentence in self.hold_sentences:
            if sentence in own:
                raise StageError(
                    f"{self.name} is done and held at the same sentence: {sentence!r}; take it out of one"
                )

    @property
    def sentences(self) -> tuple[str, ...]:
        """The instruction, then its paraphrases."""
        return (self.instruction, *self.paraphrases)


@dataclass(frozen=True)
class Initialisation:
    """Where a stage's weights come from; `target` is a task's name, or a folder or hub id."""

    kind: Literal["pretrained", "task", "path", "scratch"]
    target: str | None = None

    def source(self, output_root: Path) -> str | None:
        """The checkpoint to load (a folder, or a hub id), or None for random weights."""
        if self.kind != "task":
            return self.target
        assert self.target is not None
        folder = output_root / self.target / BEST
        if not (folder / "checkpoint.json").is_file():
            raise StageError(
                f"this stage starts from {self.target}, of which there is no checkpoint at {folder}; train "
                f"it first (task=tasks/{self.target}, or its file's path), or give another start (init=PATH, "
                "init=pretrained)"
            )
        return str(folder)


@dataclass(frozen=True)
class Optimizer:
    """AdamW; vision layers have their own rate."""

    lr: float
    vision_lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip_norm: float

    def __post_init__(self) -> None:
        for name in ("lr", "vision_lr", "eps", "grad_clip_norm"):
            if not getattr(self, name) > 0:
                raise StageError(f"optimizer.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class BatchLayout:
    """A batch of `per_device * accumulation * devices` samples is one optimizer step."""

    per_device: int
    accumulation: int
    devices: int

    @property
    def total(self) -> int:
        return self.per_device * self.accumulation * self.devices


@dataclass(frozen=True)
class Training:
    """How long and in what numbers a stage trains."""

    epochs: int  # passes over the new task's training samples
    effective_batch_size: int
    seed: int
    precision: str = "bf16"
    max_steps: int | None = None
    ema_decay: float | None = None
    interpolate_previous: float | None = None  # share of the previous stage's weights in the result

    def __post_init__(self) -> None:
        for name in ("epochs", "effective_batch_size", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StageError(f"training.{name} is {value}; it is at least 1")
        if self.precision not in PRECISIONS:
            raise StageError(
                f"training.precision is {self.precision!r}; it is one of {', '.join(PRECISIONS)}"
            )
        for name in ("ema_decay", "interpolate_previous"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise StageError(
                    f"training.{name} is {value}; give a share of 0 or more and below 1, or null"
                )

    def layout(self, per_device: int, devices: int) -> BatchLayout:
        """How the effective batch is put together on this many devices."""
        at_once = per_device * devices
        if at_once < 1 or self.effective_batch_size % at_once:
            raise StageError(
                f"an effective batch of {self.effective_batch_size} cannot be made of {per_device} per "
                f"device on {devices} devices: set run.batch_size so that {devices} times it divides "
                f"{self.effective_batch_size}"
            )
        return BatchLayout(per_device, self.effective_batch_size // at_once, devices)


@dataclass(frozen=True)
class Validation:
    """How tasks are validated; noise and times are fixed by the seed, so that numbers can be compared."""

    freq_epochs: int
    max_frames_per_task: int
    noise_samples: int  # per frame, each at another time of the grid
    seed: int

    def __post_init__(self) -> None:
        for name in ("freq_epochs", "max_frames_per_task", "noise_samples"):
            if getattr(self, name) < 1:
                raise StageError(f"validation.{name} is {getattr(self, name)}; it is at least 1")


@dataclass(frozen=True)
class Thresholds:
    """What validation losses mean in this stage; ratios are to the value right after a task was learnt."""

    own_below: float
    retained_below: float
    forgotten_above: float
    retained_ratio: float | None = None
    forgotten_ratio: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.retained_below <= self.forgotten_above or not self.own_below > 0:
            raise StageError(
                "thresholds must satisfy 0 < retained_below <= forgotten_above and 0 < own_below, they are "
                f"{self.retained_below}, {self.forgotten_above} and {self.own_below}"
            )
        low, high = self.retained_ratio, self.forgotten_ratio
        given = [ratio for ratio in (low, high) if ratio is not None]
        if len(given) == 1 or (given and not 1 <= given[0] <= given[1]):
            raise StageError(
                "thresholds.retained_ratio and forgotten_ratio are given together and rise from at least 1; "
                f"they are {low} and {high}"
            )


@dataclass(frozen=True)
class Adapter:
    """LoRA in place of full training: what the freezing lets train is held, small ones train beside."""

    rank: int
    alpha: float  # the matrices' product counts alpha / rank times
    target_modules: tuple[str, ...]  # linear layers by the last part of their name
    dropout: float = 0.0
    lr: float | None = None  # of the matrices; None: optimizer.lr. Vision keeps its ratio to it
    full: tuple[str, ...] = ("action_heads", "state_proj")  # parts (docs/freezing.md) that train as a whole
    kind: Literal["lora"] = "lora"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.target_modules:
            raise StageError("an adapter needs a rank of at least 1 and target_modules")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise StageError(
                f"adapter.alpha is {self.alpha} and adapter.dropout {self.dropout}; alpha is above 0, "
                "dropout at least 0 and below 1"
            )
        if self.lr is not None and not self.lr > 0:
            raise StageError(f"adapter.lr is {self.lr}; it must be positive, or null for optimizer.lr")
        if self.kind != "lora":
            raise StageError(f"adapter.kind is {self.kind!r}; there is only lora")


@dataclass(frozen=True)
class Stage:
    """One stage. `tasks` are all tasks seen so far, its own last; `shares` what each has of every batch."""

    name: str
    tasks: tuple[TaskData, ...]
    shares: tuple[Fraction, ...]
    init: Initialisation
    optimizer: Optimizer
    schedule: Schedule
    training: Training
    validation: Validation
    thresholds: Thresholds
    policy: tuple[tuple[str, Any], ...] = ()  # fields of the policy's configuration
    buffer_frames: int | None = None  # kept of all earlier tasks together; None: everything
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if not self.tasks or len(self.tasks) != len(self.shares):
            raise StageError(f"{self.name} has {len(self.tasks)} tasks and {len(self.shares)} shares")
        names = self.task_names
        if len(set(names)) != len(names):
            raise StageError(f"{self.name} lists a task twice: {', '.join(names)}")
        check_shares(dict(zip(names, self.shares, strict=True)), self.name)
        if not self.shares[-1] > 0:
            raise StageError(f"{self.name} gives its own task {names[-1]} no share of the batches")
        if self.buffer_frames is not None and self.buffer_frames < 1:
            raise StageError(
                f"replay.buffer_frames of {self.name} is {self.buffer_frames}; give 1 or more, or null"
            )
        for task in self.tasks:
            if task.hold_share and not task.hold_sentences:
                raise StageError(
                    f"{task.name} has a hold_share of {task.hold_share:g}, but {self.name} has no other task "
                    "whose sentences it could be told: give task.hold_sentences, or task.hold_share=0"
                )

    @property
    def task(self) -> TaskData:
        return self.tasks[-1]

    @property
    def earlier(self) -> tuple[TaskData, ...]:
        return self.tasks[:-1]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def hash(self) -> str:
        """Sixteen hex digits: two stages with the same hash do the same with the same data.

        Where data lies is left out, so that it can be moved; what it holds is told by the data's own digest.
        So are sentences that are never said.
        """
        content = asdict(self)
        for task in content["tasks"]:
            del task["datasets"]
            if not task["hold_share"]:
                del task["hold_share"], task["hold_sentences"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def folder(self, output_root: Path) -> Path:
        """Where this stage's checkpoints and results are."""
        return output_root / self.name

    def steps_per_epoch(self, own_samples: int) -> int:
        """Optimizer steps until the new task's samples have been drawn once."""
        if own_samples < 1:
            raise StageError(f"{self.task.name} has no training sample")
        per_step = self.training.effective_batch_size * self.shares[-1]
        return -(-own_samples * per_step.denominator // per_step.numerator)

    def total_steps(self, own_samples: int) -> int:
        """Optimizer steps of the stage.

        Replay comes on top: the new task is seen `epochs` times however large the share of the old ones.
        """
        wanted = self.training.epochs * self.steps_per_epoch(own_samples)
        return wanted if self.training.max_steps is None else min(wanted, self.training.max_steps)

    def policy_config(self, **fields: Any) -> KuavoSmolVLAConfig:
        """The policy's configuration for this stage; `fields` go on top (device, features, fingerprint)."""
        from kuavo_smolvla_ros.learning.policy_fields import build_policy_config

        return build_policy_config(self, fields)


Curriculum = tuple[Stage, ...]


def check_shares(shares: dict[str, Fraction], owner: str) -> None:
    """Fail unless no share is negative and they sum to exactly 1."""
    negative = [name for name, share in shares.items() if share < 0]
    if negative:
        raise StageError(f"the replay shares of {owner} are negative for {', '.join(negative)}")
    total = sum(shares.values(), Fraction(0))
    if total != 1:
        listed = ", ".join(f"{name} {float(share):g}" for name, share in shares.items())
        raise StageError(f"the replay shares of {owner} sum to {float(total):g} instead of 1 ({listed})")


def holding_at_others(tasks: Sequence[TaskData]) -> tuple[TaskData, ...]:
    """The tasks; where the robot is to hold at other sentences, those of the other tasks are among them."""
    return tuple(
        replace(task, hold_sentences=tuple(dict.fromkeys((*task.hold_sentences, *_others(task, tasks)))))
        if task.hold_share
        else task
        for task in tasks
    )


def _others(task: TaskData, tasks: Sequence[TaskData]) -> tuple[str, ...]:
    return tuple(sentence for other in tasks if other.name != task.name for sentence in other.sentences)


def without_replay(stage: Stage) -> Stage:
    """The reference that shows what replay is worth: the same stage on its own task's samples only."""
    shares = (*(Fraction(0),) * len(stage.earlier), Fraction(1))
    return replace(stage, shares=shares)


def single_task(stage: Stage, first: Stage) -> Stage:
    """The reference without history: this task alone, from where the first stage starts."""
    return replace(stage, tasks=(stage.task,), shares=(Fraction(1),), init=first.init, buffer_frames=None)


def joint(curriculum: Curriculum, name: str = "joint") -> Stage:
    """The reference with all data at once: every task with the same share, from where the first stage starts.

    Length, rate and what trains are those of the last stage, unless they are replaced.
    """
    last = curriculum[-1]
    share = Fraction(1, len(last.tasks))
    return replace(
        last, name=name, shares=(share,) * len(last.tasks), init=curriculum[0].init, buffer_frames=None
    )


def check_curriculum(curriculum: Sequence[Stage]) -> None:
    """Fail unless stages have names and numbers of their own and each builds on those before it."""
    seen: list[str] = []
    numbers: dict[int, str] = {}
    for stage in curriculum:
        if numbers.setdefault(stage.task.number, stage.name) != stage.name:
            raise StageError(
                f"{stage.name} and {numbers[stage.task.number]} both have task.number {stage.task.number}, "
                "by which results are kept; give one of them another"
            )
        if stage.name in seen:
            raise StageError(f"the curriculum contains {stage.name} twice")
        if stage.init.kind == "task" and stage.init.target not in seen:
            raise StageError(
                f"{stage.name} starts from {stage.init.target}, which is not before it in the curriculum "
                f"({', '.join(seen) or 'it is the first'})"
            )
        seen.append(stage.name)
