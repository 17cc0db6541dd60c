"""A stage from data and its start to its results on the disk; begun, continued, or already there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from kuavo_smolvla_ros.learning.adapters import start_of
from kuavo_smolvla_ros.learning.card import write_card
from kuavo_smolvla_ros.learning.checkpointing import (
    EARLIER,
    STATE_FOLDER,
    Progress,
    read_progress,
    recover,
)
from kuavo_smolvla_ros.learning.drift import DriftReport, drift, require_unchanged
from kuavo_smolvla_ros.learning.estimate import fitting_batch
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.mixed_dataset import Standing
from kuavo_smolvla_ros.learning.outputs import (
    RESULTS_FILE,
    RunLog,
    SilentLog,
    make_board,
    make_wandb,
    read_rows,
)
from kuavo_smolvla_ros.learning.record import STAGE_FILE, SUCCESS_FILE
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.learning.stage import BEST, LAST, Stage, StageError
from kuavo_smolvla_ros.learning.stage_policy import begin_policy, resume_policy, start_weights
from kuavo_smolvla_ros.learning.trainer import StageTrainer, Tools, TrainingError
from kuavo_smolvla_ros.learning.validation import TaskResult
from kuavo_smolvla_ros.learning.verdict import judge
from kuavo_smolvla_ros.policy.checkpoint import RECORDED_VERSIONS, read_json, write_json
from kuavo_smolvla_ros.policy.freezing import count_parameters
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.network import LM_HEAD
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors


@dataclass(frozen=True)
class Feed:
    """Samples by `Draw`, and what makes a batch of them ready for the policy."""

    samples: Dataset[Any]
    preprocess: Callable[[dict[str, Any]], dict[str, Any]]


MakeFeed = Callable[[KuavoSmolVLAPolicy, ReplayDatasetManager], Feed]

BUFFERS_FILE = "replay_buffers.json"


def finished_results(stage: Stage, folder: Path) -> dict[str, Any] | None:
    """The results of a stage that has been trained to its end, or None; another stage's are an error."""
    recover(folder, BEST, LAST)
    if not (folder / RESULTS_FILE).is_file():
        return None
    results = read_json(folder / RESULTS_FILE)
    if results["reproduce"]["stage_hash"] != stage.hash:
        raise StageError(
            f"{folder} holds the results of {stage.name} with other settings{_difference(stage, folder)}; "
            f"give the "
            "same settings, another run.output_root, or --restart to replace them"
        )
    return results


def run_stage(
    stage: Stage,
    sources: Mapping[str, TaskSource],
    run: RunSettings,
    root: Path,
    accelerator: Any,
    *,
    source: str | None,
    when_learnt: Mapping[str, float],
    interruption: Interruption,
    say: Callable[[str], None] = print,
    make_feed: MakeFeed | None = None,
) -> dict[str, Any] | None:
    """Train the stage to its end and return its results; None where a signal stopped it before.

    `make_feed` may put other samples than the sources' own, and what prepares them, in their place.
    """
    folder, main = stage.folder(root), accelerator.is_main_process
    manager = ReplayDatasetManager(stage, sources)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder, BEST, LAST)
    accelerator.wait_for_everyone()
    device = accelerator.device.type
    if (folder / LAST).is_dir():
        progress = _stored_progress(stage, manager, folder)
        policy = resume_policy(folder / LAST, manager, device)
        say(f"{stage.name}: goes on after step {progress.step} of {manager.total_steps}")
    else:
        progress = Progress(stage.hash)
        policy, inherited = begin_policy(stage, manager, source, device, run.robot)
        if inherited is not None:
            require_unchanged(inherited, policy.statistics)
        progress.frozen_sha256 = frozen_checksum(policy)
        reports = [drift(s, inherited) for s in manager.sources] if inherited else []
        if main:
            _begin_folder(stage, manager, folder, reports)
        for report in reports:
            for sentence in report.advice:
                say(f"note: {sentence}")
        for sentence in Standing(manager.sources).advice():
            say(f"note: {sentence}")
    log = RunLog(folder, progress.step) if main else SilentLog()
    if main and run.tensorboard:
        log.watch(make_board(folder))
    if main and run.wandb:
        log.watch(make_wandb(folder, stage.hash))
    preprocess, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    feed = None if make_feed is None else make_feed(policy, manager)
    freezing = policy.freezing

    def judged(results: Mapping[int, TaskResult]) -> dict[str, Any]:
        losses = {task.name: results[task.number].loss for task in stage.tasks}
        # Thresholds are of the flow loss; what else is trained has no verdict.
        verdicts = judge(stage, losses, when_learnt) if feed is None else []
        for verdict in verdicts:
            say(f"  {verdict}")
        return {"verdicts": [verdict.to_json() for verdict in verdicts]}

    tools = Tools(
        accelerator=accelerator,
        log=log,
        say=say,
        judge=judged,
        write_card=lambda place, now: write_card(place, stage, now, manager),
        interruption=interruption,
        fitting_batch=lambda size: fitting_batch(
            policy.config, freezing, size, accelerator.device, stage.adapter
        ),
    )
    trainer = StageTrainer(
        policy,
        manager,
        preprocess if feed is None else feed.preprocess,
        run,
        folder,
        progress,
        tools,
        None if feed is None else feed.samples,
    )
    if stage.training.interpolate_previous:
        trainer.result.start_from(start_of(trainer.trained, start_weights(stage, source)))
    if not progress.step:
        counts = count_parameters(policy.model, freezing)
        log.write(
            "stage",
            0,
            name=stage.name,
            hash=stage.hash,
            total_steps=manager.total_steps,
            batch=asdict(trainer.layout),
            shares={str(t.number): float(s) for t, s in zip(stage.tasks, stage.shares, strict=True)},
            samples={
                str(t.number): len(f) for t, f in zip(stage.tasks, manager.training_frames, strict=True)
            },
            vision_layers=freezing.num_vision_layers,
            unfrozen_layers=list(freezing.unfrozen_layers),
            parameters={c.part: {"total": c.total, "trained": c.trained} for c in counts},
        )
    try:
        progress = trainer.fit()
    finally:
        log.close()
    if not progress.finished:
        return None
    if main:
        if frozen_checksum(policy) != progress.frozen_sha256:
            raise TrainingError(
                f"frozen parameters of {stage.name} have changed; this is a fault of the program"
            )
        write_json(
            folder / RESULTS_FILE, stage_results(stage, manager, progress, folder, policy.statistics.sha256)
        )
    accelerator.wait_for_everyone()
    return read_json(folder / RESULTS_FILE)


def clear_stage(folder: Path) -> None:
    """Remove what a stage has made, to begin it anew."""
    for name in (LAST, EARLIER, BEST):
        shutil.rmtree(folder / name, ignore_errors=True)
    for old in folder.glob("epoch*"):
        shutil.rmtree(old)
    for name in (RESULTS_FILE, STAGE_FILE, BUFFERS_FILE, SUCCESS_FILE):
        (folder / name).unlink(missing_ok=True)


def frozen_checksum(policy: nn.Module) -> str:
    """SHA-256 of what does not train, without the unused head, which checkpoints leave out."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad and not name.endswith(LM_HEAD):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def stage_results(
    stage: Stage, manager: ReplayDatasetManager, progress: Progress, folder: Path, statistics_sha256: str
) -> dict[str, Any]:
    """`training_results.json`."""
    assert progress.best is not None
    final = read_rows(folder, "validation")[-1]
    train = read_rows(folder, "train")
    own = str(stage.task.number)
    drawn = sum(progress.drawn.values())
    return {
        "task_id": stage.task.number,
        "task_name": stage.task.name,
        "description": stage.task.description,
        "language_instruction": stage.task.instruction,
        "best_loss": progress.best["tasks"][own]["loss"],
        "best_step": progress.best["step"],
        "best_validation": {number: values["loss"] for number, values in progress.best["tasks"].items()},
        "final_validation": {number: values["loss"] for number, values in final["tasks"].items()},
        "verdicts": progress.best["verdicts"],
        "training_epochs": stage.training.epochs,
        "learning_rate": stage.optimizer.lr,
        "steps": progress.step,
        "elapsed_s": progress.elapsed_s,
        "samples_per_s": sum(row["samples_per_s"] for row in train) / len(train),
        "shares_wanted": {t.name: float(s) for t, s in zip(stage.tasks, stage.shares, strict=True)},
        "shares_realised": {name: count / drawn for name, count in progress.drawn.items()},
        "exposure": {name: e._asdict() for name, e in manager.plan.exposure(progress.step).items()},
        "held_out_episodes": {
            t.name: list(s.held_out_episodes) for t, s in zip(stage.tasks, manager.splits, strict=True)
        },
        "statistics_sha256": statistics_sha256,
        "frozen_sha256": progress.frozen_sha256,
        "reproduce": {
            "stage_hash": stage.hash,
            "stage": _content(stage),
            "data_digest": manager.digest,
            "versions": {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS},
        },
    }


def _begin_folder(
    stage: Stage, manager: ReplayDatasetManager, folder: Path, reports: list[DriftReport]
) -> None:
    clear_stage(folder)
    content = {"hash": stage.hash, "data_digest": manager.digest, "stage": _content(stage)}
    write_json(folder / STAGE_FILE, content)
    write_json(folder / BUFFERS_FILE, manager.buffers_json())
    if reports:
        write_json(folder / "drift.json", {"tasks": [report.to_json() for report in reports]})


def _stored_progress(stage: Stage, manager: ReplayDatasetManager, folder: Path) -> Progress:
    progress = read_progress(folder / LAST)
    if progress.stage_hash != stage.hash:
        raise StageError(
            f"{folder / LAST} was begun with other settings{_difference(stage, folder)}; give the same "
            f"settings to "
            "go on, another run.output_root, or --restart to begin the stage anew"
        )
    stored = read_json(folder / STAGE_FILE)["data_digest"]
    if stored != manager.digest:
        raise StageError(
            f"{folder / LAST} was trained on other data than are there now ({stored}, now "
            f"{manager.digest}): a data "
            "set has grown or shrunk; give the same data to go on, or --restart to begin the stage anew"
        )
    manager.require_buffers(folder / BUFFERS_FILE)
    if not (folder / LAST / STATE_FOLDER).is_dir():
        raise StageError(f"{folder / LAST} holds no {STATE_FOLDER}; begin the stage anew (--restart)")
    return progress


def _content(stage: Stage) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(stage), default=str))


def _difference(stage: Stage, folder: Path) -> str:
    """Which settings differ from those the folder was begun with."""
    if not (folder / STAGE_FILE).is_file():
        return ""
    before, now = _flat(read_json(folder / STAGE_FILE)["stage"]), _flat(_content(stage))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
    return f" ({shown})" if changed else ""


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, dict):
        pairs = content.items()
    elif isinstance(content, list):
        pairs = ((str(index), value) for index, value in enumerate(content))
    else:
        return {prefix: content}
    return {
        key: value
        for name, inner in pairs
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
