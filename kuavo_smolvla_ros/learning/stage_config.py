"""From `config/policy/*.yaml`, files of one's own and a command line to a curriculum of stages.

Every stage is composed on its own: base file, then the task's file, then the command line. The parts that
decide which tasks came before (data, order) are the same for all; the rest of a command line given with
`task=` is for that stage only, so that training one stage differently does not rewrite the definition of
the others.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import draccus
from draccus.utils import DecodingError
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kuavo_smolvla_ros.data.task_file import is_task_path, read_task_yaml
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.schedule import Schedule
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import (
    Adapter,
    Curriculum,
    Initialisation,
    Optimizer,
    Stage,
    StageError,
    TaskData,
    Thresholds,
    Training,
    Validation,
    check_curriculum,
    holding_at_others,
)
from kuavo_smolvla_ros.paths import config_dir

BASE = "smolvla_sequential_base"
OWN_GROUP = "own_task"  # no folder beside the base file may have this name
SHARED = ("data", "curriculum", "pretrained", "run")  # apply to every task, also with task=...
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What a command line asks for: the curriculum, which of its stages to train, and how to run."""

    curriculum: Curriculum
    selected: tuple[str, ...]  # names, in the curriculum's order
    run: RunSettings

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.curriculum if stage.name in self.selected)


def read_request(overrides: Sequence[str] = (), folder: Path | None = None) -> Request:
    """The request of a command line such as `task=tasks/task2_weighing optimizer.lr=1e-5`, or `stages=all`.

    `folder` holds the base file and the tasks' files; the package's own is `config/policy`. A task of one's
    own is a path that ends in .yaml; given as `task=` it comes after the curriculum's, unless those name it.
    """
    folder = config_dir() / "policy" if folder is None else folder
    chosen, rest = _take(overrides, "task")
    wanted, rest = _take(rest, "stages")
    if (chosen is None) == (wanted is None):
        raise UsageError(
            "say which stage to train: task=tasks/NAME, task=FILE.yaml for one of your own, or "
            "stages=all for all in a row"
        )
    if wanted not in (None, "all"):
        raise UsageError(f"stages={wanted} means nothing; write stages=all, or task=tasks/NAME for one stage")
    shared = [text for text, key in rest if key.split(".")[0] in SHARED]
    base = _compose(folder, tuple(shared))
    files = base["curriculum"]
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise UsageError(f"curriculum is {files!r}; it is a list of the tasks' files, such as [tasks/NAME]")
    files = [_resolved(file, folder) for file in files]
    chosen = None if chosen is None else _resolved(chosen, folder)
    if chosen is not None and is_task_path(chosen) and chosen not in files:
        files.append(chosen)
    if chosen is not None and chosen not in files:
        raise UsageError(
            f"{chosen} is not in the curriculum ({', '.join(files)}); add it with "
            f"curriculum='[{','.join([*files, chosen])}]', or give the path of a file of your own (.yaml)"
        )
    stages: list[Stage] = []
    selected: list[str] = []
    settings = base["run"]
    for file in files:
        mine = chosen is None or file == chosen
        given = _compose(folder, tuple(text for text, _ in rest) if mine else tuple(shared), file)
        stages.append(_stage(given, stages))
        if mine:
            selected.append(stages[-1].name)
            settings = given["run"]
    check_curriculum(stages)
    return Request(tuple(stages), tuple(selected), _decode(RunSettings, settings, "run"))


def load_curriculum(overrides: Sequence[str] = (), folder: Path | None = None) -> Curriculum:
    """All stages, `overrides` applying to each of them."""
    return read_request([*overrides, "stages=all"], folder).curriculum


def _resolved(file: str, folder: Path) -> str:
    """A file of one's own by its whole path, one of `folder` by its name there, however it was written."""
    if not is_task_path(file):
        return file
    path = Path(file).expanduser().resolve()
    if path.is_relative_to(folder.resolve()):
        return path.relative_to(folder.resolve()).with_suffix("").as_posix()
    return str(path)


def _take(overrides: Sequence[Any], name: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The value of the override `name`, and all others with their keys."""
    texts = [entry if isinstance(entry, str) else entry[0] for entry in overrides]
    try:
        parsed = OverridesParser.create().parse_overrides(texts)
    except HydraException as fault:
        raise UsageError(f"the command line cannot be read: {_one_line(fault)}") from None
    values = [p.value() for p in parsed if p.key_or_group == name and not p.is_delete()]
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        raise UsageError(f"{name}= is given once, with one name; it has {values}")
    rest = [(t, p.key_or_group) for t, p in zip(texts, parsed, strict=True) if p.key_or_group != name]
    return (values[0] if values else None), rest


@lru_cache(maxsize=64)
def _composed(
    folder: Path, overrides: tuple[str, ...], stamp: tuple[int, ...], own: str | None = None
) -> Any:
    """`own` is the text of a task's file from elsewhere; it is laid over the base like one of `tasks/`."""
    with (
        tempfile.TemporaryDirectory() as place,
        initialize_config_dir(str(folder.resolve()), version_base="1.3"),
    ):
        if own is not None:
            file = Path(place) / OWN_GROUP / "task.yaml"
            file.parent.mkdir()
            file.write_text(own, encoding="utf-8")
            overrides = (f"hydra.searchpath=[file://{place}]", f"+{OWN_GROUP}@_global_=task", *overrides)
        return compose(BASE, overrides=list(overrides))


def _compose(folder: Path, overrides: tuple[str, ...], file: str | None = None) -> dict[str, Any]:
    """One stage's configuration as plain data; without a task's file, only what needs none."""
    if not (folder / f"{BASE}.yaml").is_file():
        raise UsageError(f"{folder} holds no {BASE}.yaml")
    own = None
    if file is not None and is_task_path(file):
        read_task_yaml(file)
        own = Path(file).read_text(encoding="utf-8")
    elif file is not None:
        group, _, option = file.rpartition("/")
        if not group or not (folder / f"{file}.yaml").is_file():
            known = sorted(
                path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("tasks/*.yaml")
            )
            raise UsageError(
                f"there is no task file {file}.yaml in {folder}; there are {', '.join(known)}, or give the "
                "path of one of your own (.yaml)"
            )
        overrides = (f"+{group}={option}", *overrides)
    stamp = tuple(path.stat().st_mtime_ns for path in sorted(folder.rglob("*.yaml")))
    try:
        composed = _composed(folder, overrides, stamp, own)
        if file is None:
            return {
                key: OmegaConf.to_container(composed, resolve=False)[key] for key in ("curriculum", "run")
            }
        _require_known(composed, _composed(folder, (), stamp), file)
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as fault:
        where = file if own is not None else f"{file}.yaml"
        raise UsageError(f"{fault.full_key} is not given; set it in {where}") from None
    except MissingConfigException as fault:
        raise UsageError(_one_line(fault)) from None
    except (HydraException, OmegaConfBaseException) as fault:
        raise UsageError(f"{file or BASE}: {_one_line(fault)}") from None


def _require_known(given: Any, base: Any, file: str) -> None:
    """Fail on a section no one reads: a slip of the pen would leave the base's value standing."""
    for section in given:
        if section not in base:
            close = difflib.get_close_matches(section, list(base), n=1)
            hint = f"did you mean {close[0]}" if close else f"there are {', '.join(base)}"
            raise UsageError(f"{file} has a section {section!r} that means nothing; {hint}")


def _one_line(fault: Exception) -> str:
    return " ".join(line.strip() for line in str(fault).splitlines() if line.strip())


def _stage(given: Mapping[str, Any], earlier: Sequence[Stage]) -> Stage:
    task = _decode(TaskData, given["task"], "task")
    tasks = holding_at_others([*(stage.task for stage in earlier), task])
    adapter = given["adapter"]
    return Stage(
        name=task.name,
        tasks=tasks,
        shares=_shares(given["replay"], [t.name for t in tasks]),
        buffer_frames=_decode(_Replay, given["replay"], "replay").buffer_frames,
        init=_initialisation(
            given["init"], given["pretrained"], [stage.name for stage in earlier], task.name
        ),
        optimizer=_decode(Optimizer, given["optimizer"], "optimizer"),
        schedule=_decode(Schedule, given["schedule"], "schedule"),
        training=_decode(Training, given["training"], "training"),
        validation=_decode(Validation, given["validation"], "validation"),
        thresholds=_decode(Thresholds, given["thresholds"], "thresholds"),
        adapter=None if adapter is None else _decode(Adapter, adapter, "adapter"),
        policy=tuple(sorted((key, _frozen(value)) for key, value in given["policy"].items())),
    )


@dataclass(frozen=True)
class _Replay:
    shares: dict[str, Any] | None
    fraction: float | None
    buffer_frames: int | None


def _shares(replay: Mapping[str, Any], tasks: Sequence[str]) -> tuple[Fraction, ...]:
    """Exact shares: what is written as 0.1 means a tenth, not its nearest binary number."""
    own, earlier = tasks[-1], tasks[:-1]
    shares, fraction = replay["shares"], replay["fraction"]
    if (shares is None) == (fraction is None):
        raise StageError(f"{own}: give either replay.shares or replay.fraction (the other one null)")
    if fraction is not None:
        part = _fraction(fraction, f"{own}: replay.fraction") if earlier else Fraction(0)
        return (*(part / len(earlier) for _ in earlier), 1 - part)
    if not isinstance(shares, Mapping):
        raise StageError(f"{own}: replay.shares is {shares!r}; it maps tasks to shares")
    unknown = [name for name in shares if name not in tasks]
    if unknown:
        raise StageError(
            f"{own} has replay shares of {', '.join(unknown)}, but up to this stage the curriculum has only "
            f"{', '.join(tasks)}; give replay.shares=null replay.fraction=0.2, which fits any order (0: no "
            "replay), or a file of your own that does (docs/training.md, 'Other curricula')"
        )
    return tuple(_fraction(shares.get(name, 0), f"{own}: the share of {name}") for name in tasks)


def _fraction(value: Any, where: str) -> Fraction:
    try:
        if isinstance(value, bool):
            raise ValueError
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise StageError(
            f"{where} is {value!r}; give a number such as 0.2, or a fraction such as 1/3"
        ) from None


def _initialisation(given: Any, pretrained: str, earlier: Sequence[str], own: str) -> Initialisation:
    text = str(given).strip()
    if text == "scratch":
        return Initialisation("scratch")
    if text == "pretrained":
        return Initialisation("pretrained", str(pretrained))
    if text == "previous":
        if not earlier:
            raise StageError(
                f"{own} is the first stage and cannot start from a previous one; set init=pretrained, "
                "scratch or a path, or use a file of your own that does (docs/training.md, 'Other curricula')"
            )
        return Initialisation("task", earlier[-1])
    if text in earlier:
        return Initialisation("task", text)
    number = text.removeprefix("task").strip()
    if number.isdigit() and (text.startswith("task") or text == number):
        if not 1 <= int(number) <= len(earlier):
            raise StageError(f"{own} cannot start from task {number}: before it come {len(earlier)}")
        return Initialisation("task", earlier[int(number) - 1])
    if "/" not in text and not Path(text).exists():
        raise StageError(
            f"{own}: init is {text!r}; it is pretrained, previous, scratch, an earlier task"
            f"{' (' + ', '.join(earlier) + ')' if earlier else ''}, a folder, or a hub id"
        )
    return Initialisation("path", text)


def _decode(kind: type[T], given: Any, section: str) -> T:
    if not isinstance(given, Mapping):
        raise StageError(f"{section} is {given!r}; it is a section of settings")
    hints = get_type_hints(kind)
    for key, value in given.items():
        # draccus would take a text for a list of letters.
        if str(hints.get(key, "")).startswith("tuple") and not isinstance(value, list):
            raise StageError(f"{section}.{key} is {value!r}; it is a list")
        if isinstance(value, bool) and hints.get(key) is not bool:
            raise StageError(f"{section}.{key} is {value!r}; it is no yes-or-no setting")
    try:
        return draccus.decode(kind, dict(given))
    except DecodingError as fault:
        raise StageError(f"{section}: {_one_line(fault)}") from None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
