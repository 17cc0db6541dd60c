"""From a curriculum's stage to the stage that trains a delta expert on its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.schedule import Schedule
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import Initialisation, Stage
from kuavo_smolvla_ros.learning.stage_config import read_request
from kuavo_smolvla_ros.paths import config_dir

NAME = "delta_expert"
FOLDER = "delta"  # below the curriculum's own output folder
# Said by the base's own training; here all of it is frozen.
FREEZING = (
    "unfreeze_vision_layers",
    "freeze_vision_layers",
    "freeze_vision_ratio",
    "freeze_preset",
    "freeze_vision_encoder",
    "train_expert_only",
    "train_state_proj",
    "train_language_model",
)
WIDEST_EXPANDER = 512


@dataclass(frozen=True)
class CacheSettings:
    """Where the base's outputs are kept, and how many chunks of it per frame."""

    folder: str | None
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UsageError(f"delta.cache.draws is {self.draws}; it is at least 1")


@dataclass(frozen=True)
class DeltaRequest:
    """What a command line asks for: the stage whose result is refined, the stage that does it, and how."""

    base: Stage
    stage: Stage
    cache: CacheSettings
    run: RunSettings


def read_delta_request(overrides: Sequence[str], folder: Path | None = None) -> DeltaRequest:
    """The request of a command line such as `task=tasks/task2_weighing delta.policy.use_cls_head=true`."""
    folder = config_dir() / "policy" if folder is None else folder
    own = [text for text in overrides if text.lstrip("+~").startswith("delta.")]
    request = read_request([text for text in overrides if text not in own], folder)
    if len(request.stages) != 1:
        raise UsageError("a delta expert is trained on one stage's result: give task=tasks/NAME")
    given = _compose(folder, own)
    (base,) = request.stages
    cache = CacheSettings(**given["cache"])
    return DeltaRequest(base, delta_stage(base, given), cache, request.run)


def delta_stage(base: Stage, given: Mapping[str, Any]) -> Stage:
    """The stage that refines the result of `base`, or of the checkpoint given in its place."""
    optimizer, training = given["optimizer"], given["training"]
    fields = {name: value for name, value in base.policy if name not in FREEZING}
    own = dict(given["policy"])
    if own.get("cls_expander_width") is None:
        own["cls_expander_width"] = min(2 * base.training.effective_batch_size, WIDEST_EXPANDER)
    source = given["base"]
    return replace(
        base,
        name=f"{base.name}_delta",
        # Sentences are the instructions, since what the base says of a frame is kept for one sentence.
        tasks=tuple(
            replace(task, paraphrases=(), paraphrase_share=0.0, hold_share=0.0, hold_sentences=())
            for task in base.tasks
        ),
        init=Initialisation("task", base.name) if source is None else Initialisation("path", str(source)),
        optimizer=replace(base.optimizer, **optimizer, vision_lr=optimizer["lr"]),
        schedule=Schedule(**given["schedule"]),
        training=replace(base.training, **training, ema_decay=None, interpolate_previous=None),
        validation=replace(base.validation, **given["validation"]),
        policy=tuple(sorted({**fields, **own, "train_delta_expert": True}.items())),
        adapter=None,
    )


def _compose(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if not (folder / f"{NAME}.yaml").is_file():
        raise UsageError(f"{folder} holds no {NAME}.yaml")
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            composed = compose(NAME, overrides=list(overrides))
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)["delta"]  # type: ignore
    except (HydraException, OmegaConfBaseException) as fault:
        reason = " ".join(line.strip() for line in str(fault).splitlines() if line.strip())
        raise UsageError(f"{NAME}: {reason}") from None
