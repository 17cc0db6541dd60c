"""Training a delta expert: the base's outputs are cached, then the same trainer as ever does the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.curriculum_run import OpenTask, chunk_size, require_finished
from kuavo_smolvla_ros.learning.delta_cache import base_sha256, cache_task
from kuavo_smolvla_ros.learning.delta_data import DeltaDataset, DeltaPreprocess
from kuavo_smolvla_ros.learning.delta_stage import FOLDER, CacheSettings, DeltaRequest
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.mixed_dataset import Standing
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import StageError
from kuavo_smolvla_ros.learning.stage_run import (
    Feed,
    clear_stage,
    finished_results,
    frozen_checksum,
    run_stage,
)
from kuavo_smolvla_ros.policy.checkpoint import fetch_folder
from kuavo_smolvla_ros.policy.delta_settings import EXTRAS_OFF
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors
from kuavo_smolvla_ros.policy.steps import TokenizeInstruction

Say = Callable[[str], None]


def delta_root(run: RunSettings) -> Path:
    """Where delta experts lie: below the curriculum, and out of its report's way."""
    return run.root / FOLDER


def train_delta(
    request: DeltaRequest,
    accelerator: Any,
    open_task: OpenTask,
    *,
    interruption: Interruption,
    restart: bool = False,
    say: Say = print,
) -> dict[str, Any] | None:
    """Train it to its end and return the results; None where a signal stopped it before."""
    stage, run, root = request.stage, request.run, delta_root(request.run)
    folder = stage.folder(root)
    if restart and accelerator.is_main_process:
        clear_stage(folder)
    accelerator.wait_for_everyone()
    _require_whole_batch(request, accelerator.num_processes)
    if stage.init.kind == "task":
        require_finished(stage, run.root)
    source = stage.init.source(run.root)
    assert source is not None
    results = finished_results(stage, folder)
    if results is not None:
        _require_same_base(results, source, folder)
        say(f"{stage.name}: finished already (best loss {results['best_loss']:.4g})")
        return results
    chunk = chunk_size(stage)
    return run_stage(
        stage,
        {task.name: open_task(task, chunk) for task in stage.tasks},
        run,
        root,
        accelerator,
        source=source,
        when_learnt={},
        interruption=interruption,
        say=say,
        make_feed=partial(make_feed, run=run, cache=request.cache, accelerator=accelerator, say=say),
    )


def make_feed(
    policy: KuavoSmolVLAPolicy,
    manager: ReplayDatasetManager,
    *,
    run: RunSettings,
    cache: CacheSettings,
    accelerator: Any,
    say: Say = print,
) -> Feed:
    """Samples of the stage with what the base says of them, computed now where no cache holds it yet."""
    folder = delta_root(run) / "cache" if cache.folder is None else Path(cache.folder).expanduser()
    policy.to(accelerator.device)
    preprocess, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    base = base_sha256(policy)
    standing = Standing(manager.sources)

    def cached() -> list[Any]:
        return [
            cache_task(
                policy,
                task,
                source,
                np.union1d(frames, manager.validation_frames(task)),
                preprocess,
                run,
                folder,
                standing=standing,
                base=base,
                draws=cache.draws,
                seed=cache.seed,
                say=say,
            )
            for task, source, frames in zip(
                manager.stage.tasks, manager.sources, manager.training_frames, strict=True
            )
        ]

    if accelerator.is_main_process:
        cached()
    accelerator.wait_for_everyone()
    config = policy.config
    samples = DeltaDataset(
        manager.stage.tasks,
        manager.sources,
        cached(),
        standing,
        config.delta_max_age,
        len(manager.facts.state_names),
    )
    (tokenize,) = (step for step in preprocess.steps if isinstance(step, TokenizeInstruction))
    return Feed(samples, DeltaPreprocess(policy.statistics, tokenize, accelerator.device))


def _require_whole_batch(request: DeltaRequest, devices: int) -> None:
    """VICReg compares the samples that go through together; that must not depend on the device."""
    total, at_once = request.stage.training.effective_batch_size, request.run.batch_size * devices
    if dict(request.stage.policy).get("use_cls_head") and at_once != total:
        raise UsageError(
            f"with use_cls_head a batch of {total} must go through {devices} device{'s'[: devices != 1]} at "
            f"once, since VICReg compares its samples: set run.batch_size={total // devices}, or "
            f"training.effective_batch_size={at_once}"
        )


def _require_same_base(results: dict[str, Any], source: str, folder: Path) -> None:
    """A delta expert corrects the errors of one base; one that was trained again has others."""
    base = KuavoSmolVLAPolicy.from_pretrained(
        fetch_folder(source), overrides={**EXTRAS_OFF, "device": "cpu"}
    ).requires_grad_(False)
    if frozen_checksum(base) != results["frozen_sha256"]:
        raise StageError(f"{folder} refines another base than {source} is now; train it again with --restart")
