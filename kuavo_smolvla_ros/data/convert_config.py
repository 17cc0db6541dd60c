"""`config/data/convert.yaml` with its overrides, checked and turned into what a conversion needs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kuavo_smolvla_ros.data.convert import ConversionSettings
from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.features import pictures_from_dict
from kuavo_smolvla_ros.data.task_file import find_task, shipped_tasks
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.robot.spec import load_spec

RECORDED = "recorded"


@dataclass(frozen=True)
class ConversionConfig:
    """One conversion as asked for."""

    bags: tuple[Path, ...]
    dataset: Path
    settings: ConversionSettings
    workers: int
    retry_rejected: bool


def load_conversion(overrides: Sequence[str], name: str = "convert") -> ConversionConfig:
    """Compose `config/data/NAME.yaml` with `overrides` (key=value) and check every value."""
    folder = config_dir() / "data"
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UsageError(f"there is no configuration '{name}' in {folder}; there are {known}")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(name, overrides=list(overrides))
        given = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UsageError(f"{error.full_key} is not given; add {error.full_key}=... to the command") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(" ".join(str(error).split("\n")[:2])) from None
    assert isinstance(given, dict)
    return _checked({str(key): value for key, value in given.items()})


def _checked(given: Mapping[str, Any]) -> ConversionConfig:
    bags = given["bags"] if isinstance(given["bags"], list) else [given["bags"]]
    spec = load_spec(str(given["robot"]))
    extract = dict(given["extract"] or {})
    rules = EpisodeSettings.from_mapping(extract)
    for stream in rules.receive_stamped:
        if stream not in spec.streams:
            raise UsageError(f"extract.receive_stamped: {spec.name} has no stream '{stream}'")
    if (rules.task is None) != (rules.instruction is None):
        raise UsageError("extract.task and extract.instruction go together; give both or neither")
    if given["task"] != RECORDED:
        if rules.task is not None:
            raise UsageError("task and extract.task both say what the recordings show; give one of them")
        named = find_task(str(given["task"]))
        if named is None:
            raise UsageError(
                f"there is no task '{given['task']}'; give {RECORDED}, {', '.join(shipped_tasks())}, or the "
                "path of a task's YAML file"
            )
        extract |= {"task": named.name, "instruction": named.instruction}
    try:
        pictures = pictures_from_dict(given["pictures"])
        limits = PackLimits(**given["files"])
    except TypeError as error:  # a dataclass names the key it does not know
        raise UsageError(f"pictures or files: {error}".replace("__init__() got an ", "")) from None
    for name, value in (("files.seconds", limits.seconds), ("files.megabytes", limits.megabytes)):
        if not isinstance(value, (int, float)) or not value > 0:
            raise UsageError(f"{name} is {value!r}; it must be a number above 0")
    if limits.seconds > 1000:
        raise UsageError(
            f"files.seconds is {limits.seconds:g}; beyond 1000 LeRobot rejects frames by their time"
        )
    workers = given["workers"] if given["workers"] is not None else os.cpu_count() or 1
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise UsageError(f"workers is {workers!r}; it must be a whole number from 1")
    return ConversionConfig(
        bags=tuple(Path(str(bag)) for bag in bags),
        dataset=Path(str(given["dataset"])),
        settings=ConversionSettings(str(given["robot"]), pictures, extract, limits),
        workers=workers,
        retry_rejected=bool(given["retry_rejected"]),
    )
