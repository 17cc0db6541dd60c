"""Stages in a row, and the reference runs that show what the curriculum is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.heap import keep_freed_memory
from kuavo_smolvla_ros.learning.hub import push, require_hub
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.outputs import RESULTS_FILE
from kuavo_smolvla_ros.learning.report import write_report
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.learning.stage import (
    BEST,
    LAST,
    Curriculum,
    Stage,
    StageError,
    TaskData,
    joint,
    single_task,
    without_replay,
)
from kuavo_smolvla_ros.learning.stage_run import clear_stage, finished_results, run_stage
from kuavo_smolvla_ros.policy.checkpoint import CHECKPOINT_FILE, read_json
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

REFERENCES = ("no_replay", "joint", "single")
OpenTask = Callable[[TaskData, int], TaskSource]  # a task, with chunks of so many actions


def reference_stages(curriculum: Curriculum, reference: str | None) -> Curriculum:
    """The curriculum itself (None), or what a reference trains in its place."""
    if reference is None:
        return curriculum
    if reference == "no_replay":
        return tuple(without_replay(stage) for stage in curriculum)
    if reference == "joint":
        return (joint(curriculum),)
    if reference == "single":
        return tuple(single_task(stage, curriculum[0]) for stage in curriculum)
    raise UsageError(f"reference={reference} is not known; it is one of {', '.join(REFERENCES)}")


def reference_root(root: Path, reference: str | None) -> Path:
    """Where a reference's stages are: below the curriculum they are compared with."""
    return root if reference is None else root / "references" / reference


def stage_source(stage: Stage, root: Path, shared: Path, curriculum: Curriculum) -> str | None:
    """The checkpoint a stage begins with; a reference shares stages that are the curriculum's own work."""
    if stage.init.kind != "task" or root == shared:
        return stage.init.source(root)
    target = stage.init.target
    assert target is not None
    if not (root / target / BEST / CHECKPOINT_FILE).is_file():
        same = next(s for s in curriculum if s.name == target)
        file = shared / target / RESULTS_FILE
        if file.is_file() and read_json(file)["reproduce"]["stage_hash"] == same.hash:
            return stage.init.source(shared)
    return stage.init.source(root)


def require_finished(stage: Stage, root: Path) -> None:
    """Fail where the stage before was stopped before its end: its `best` is only the best so far."""
    if stage.init.kind != "task" or stage.init.target is None:
        return
    before = root / stage.init.target
    if (before / LAST).is_dir() and not (before / RESULTS_FILE).is_file():
        raise StageError(
            f"{stage.name} starts from {stage.init.target}, which has not been trained to its end; run "
            f"its stage "
            "again to finish it, or give its checkpoint by path (init=PATH)"
        )


def chunk_size(stage: Stage) -> int:
    """Actions per chunk in a stage: its own setting, or the policy's."""
    return int(dict(stage.policy).get("chunk_size", KuavoSmolVLAConfig.chunk_size))


def run_stages(
    stages: Curriculum,
    run: RunSettings,
    accelerator: Any,
    open_task: OpenTask,
    *,
    interruption: Interruption,
    selected: tuple[str, ...] | None = None,
    shared: Path | None = None,
    restart: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Train the selected stages that are not finished; returns whether all of them are now.

    Below `shared` a curriculum may lie whose equal stages are used instead of being trained again.
    """
    root = run.root
    shared = root if shared is None else shared
    sources: dict[tuple[str, int], TaskSource] = {}
    when_learnt: dict[str, float] = {}
    for stage in stages:
        folder = stage.folder(root)
        chosen = selected is None or stage.name in selected
        if chosen and restart and accelerator.is_main_process:
            clear_stage(folder)
        accelerator.wait_for_everyone()
        results = finished_results(stage, folder) if chosen else _results_of_any(folder)
        if results is None and root != shared and (shared / stage.name / RESULTS_FILE).is_file():
            theirs = read_json(shared / stage.name / RESULTS_FILE)
            results = theirs if theirs["reproduce"]["stage_hash"] == stage.hash else None
            if results is not None:
                say(f"{stage.name}: the same work as the curriculum's stage, which is used")
        elif results is not None and chosen:
            say(f"{stage.name}: finished already (best loss {results['best_loss']:.4g})")
        if results is None and chosen:
            require_finished(stage, root)
            source = stage_source(stage, root, shared, stages)
            chunk = chunk_size(stage)
            for task in stage.tasks:
                if (task.name, chunk) not in sources:
                    sources[task.name, chunk] = open_task(task, chunk)
            results = run_stage(
                stage,
                {task.name: sources[task.name, chunk] for task in stage.tasks},
                run,
                root,
                accelerator,
                source=source,
                when_learnt=when_learnt,
                interruption=interruption,
                say=say,
            )
            if accelerator.is_main_process:
                write_report(shared)
                if results is not None and run.push_to_hub is not None:
                    push(folder / BEST, run.push_to_hub, stage.name, say)
            if results is None:
                return False
        if results is not None:
            when_learnt[stage.task.name] = results["best_validation"][str(stage.task.number)]
    return True


def _results_of_any(folder: Path) -> Mapping[str, Any] | None:
    return read_json(folder / RESULTS_FILE) if (folder / RESULTS_FILE).is_file() else None


def make_accelerator(stages: Sequence[Stage], run: RunSettings) -> Any:
    """Accelerate for these stages on the devices the launcher gives."""
    from accelerate import Accelerator

    precisions = {stage.training.precision for stage in stages}
    if len(precisions) > 1:
        raise UsageError(
            f"the chosen stages have the precisions {', '.join(sorted(precisions))}; a process has one: "
            f"train them "
            "one after the other (task=tasks/NAME)"
        )
    if run.device not in (None, "cpu", "cuda"):
        raise UsageError(f"run.device is {run.device}; it is cpu, cuda, or null for CUDA where there is one")
    accelerator = Accelerator(mixed_precision=precisions.pop(), cpu=run.device == "cpu")
    if run.device == "cuda" and accelerator.device.type != "cuda":
        raise UsageError("run.device is cuda, but this machine has no CUDA device that torch can use")
    if accelerator.distributed_type.value == "FSDP":
        raise UsageError(
            "this launch configuration lets accelerate divide the network, which cannot see how it is "
            "computed; use config/accelerate/gpus.yaml or nodes.yaml with run.shard=true"
        )
    if run.shard and accelerator.num_processes == 1:
        raise UsageError("run.shard divides the network among several devices, and there is one")
    if run.push_to_hub is not None and accelerator.is_main_process:
        require_hub(run.push_to_hub)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
