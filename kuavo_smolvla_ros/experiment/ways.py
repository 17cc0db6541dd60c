"""The ways to train that are compared, each by what `training/train_sequential.py` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.data.task_file import shipped_tasks
from kuavo_smolvla_ros.experiment.wordings import SHARE, wordings
from kuavo_smolvla_ros.learning.curriculum_run import reference_root, reference_stages
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import (
    Curriculum,
    Initialisation,
    Stage,
    TaskData,
    holding_at_others,
)
from kuavo_smolvla_ros.learning.stage_config import read_request

CURRICULUM = "curriculum"
WAYS = (CURRICULUM, "no_replay", "joint", "single")
TASK_FILES = tuple(shipped_tasks())
LR_OF_TASK_FILES = 5e-5
"""The first stage's; those of the later ones fall from it."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast; what is not here is as in config/policy."""

    steps: tuple[int, ...] = (6000, 12000, 12000, 20000)
    """Of each stage. References see each new task as often as its stage with replay does: a stage without
    replay and a task alone get its share of the steps, joint training these of all tasks together.
    """
    shares: tuple[tuple[str, ...], ...] = (
        ("1",),
        ("0.2", "0.8"),
        ("0.15", "0.4", "0.45"),
        ("0.1", "0.25", "0.2", "0.45"),
    )
    """Of the tasks so far, by stage. More replay than in the task files: a network this small has nothing
    to keep what it learnt in, and task 2, whose grasps bear 12 mm, is lost first.
    """
    batch: int = 32
    lr: float = 2.5e-3
    """Of the first stage, for a network whose language model and expert begin with nothing."""
    fall: float = 0.5
    """How much of the fall of the curriculum's rates is kept from stage to stage: 1 all of it (to 0.4), 0
    none. Those rates protect what a large network has learnt before; this one has to learn each task anew.
    """
    vision_lr_share: float = 0.1
    chunk: int = 16
    unfrozen: tuple[int, ...] = (2, 1, 1, 1)
    """Upper vision layers that train, of the tiny backbone's four, by stage."""
    ema: float = 0.998
    hold_share: float = 0.15
    """Of the samples: told a sentence of another task, whatever the scene, the arms stay where they are."""
    seed: int = 0


def stages_of(way: str, curriculum: Curriculum) -> Curriculum:
    """What a way trains; a reference differs from the curriculum in what it is a reference for alone."""
    if way == CURRICULUM:
        return curriculum
    stages = reference_stages(curriculum, way)
    first = curriculum[0]
    steps = [round((own.training.max_steps or 0) * own.shares[-1]) for own in curriculum]
    if way == "joint":
        (stage,) = stages
        return (_as_first(_for(stage, sum(steps)), first),)
    stages = tuple(_for(stage, count) for stage, count in zip(stages, steps, strict=True))
    if way == "single":  # nothing came before, so nothing has to be kept
        return tuple(_as_first(stage, first) for stage in stages)
    return stages


def _for(stage: Stage, steps: int) -> Stage:
    return replace(
        stage,
        training=replace(stage.training, max_steps=steps),
        schedule=replace(stage.schedule, decay_steps=steps),
    )


def _as_first(stage: Stage, first: Stage) -> Stage:
    """It trains what the first stage does, as fast."""
    return replace(stage, optimizer=first.optimizer, policy=first.policy)


def curriculum_of(
    settings: TrainingSettings, base: Path, output: Path, device: str
) -> tuple[Curriculum, RunSettings]:
    """The four stages beginning with the checkpoint at `base`, and how they run."""
    stages: list[Stage] = []
    run: RunSettings | None = None
    for number, file in enumerate(TASK_FILES):
        request = read_request([f"task=tasks/{file}", *_overrides(settings, number, output, device)])
        (stage,) = request.stages
        rate = settings.lr * (stage.optimizer.lr / LR_OF_TASK_FILES) ** settings.fall
        optimizer = replace(stage.optimizer, lr=rate, vision_lr=rate * settings.vision_lr_share)
        init = Initialisation("path", str(base)) if number == 0 else stage.init
        stages.append(replace(stage, optimizer=optimizer, init=init))
        run = request.run
    assert run is not None
    # From the first stage on a task's samples carry the sentences of all others, those to come as well.
    told = [
        replace(_in_many_words(stage.task), hold_share=settings.hold_share, hold_sentences=())
        for stage in stages
    ]
    listening = {task.name: task for task in holding_at_others(told)}
    return tuple(
        replace(stage, tasks=tuple(listening[name] for name in stage.task_names)) for stage in stages
    ), run


def _in_many_words(task: TaskData) -> TaskData:
    sentences = dict.fromkeys((*task.paraphrases, *wordings(task.name)))
    sentences.pop(task.instruction, None)
    return replace(task, paraphrases=tuple(sentences), paraphrase_share=SHARE)


def _overrides(settings: TrainingSettings, number: int, output: Path, device: str) -> list[str]:
    """One stage's part of the command line; a data set is a folder of gathered demonstrations."""
    count, steps = settings.unfrozen[number], settings.steps[number]
    shares = zip(TASK_FILES, settings.shares[number], strict=False)
    layers = ",".join(str(-layer) for layer in range(1, count + 1))
    return [
        *(f"replay.shares.{task}={share}" for task, share in shares),
        f"data.root={output / 'demonstrations'}",
        f"run.output_root={output / 'train'}",
        f"run.device={device}",
        f"run.batch_size={settings.batch}",
        "run.num_workers=0",
        "run.log_freq_steps=50",
        "run.save_freq_steps=500",
        "run.save_freq_epochs=100000",
        "run.keep_last=0",
        "run.min_free_gib=1",
        "run.tensorboard=false",
        "run.feature_cache=deep",
        "policy.backbone=tiny",
        f"policy.chunk_size={settings.chunk}",
        "+policy.pad_language_to=longest",  # a third less to compute; shapes need not be static here
        f"policy.unfreeze_vision_layers={f'[{layers}]' if count else 'null'}",
        f"training.effective_batch_size={settings.batch}",
        "training.precision=no",
        "training.epochs=100000",
        f"training.max_steps={steps}",
        f"training.ema_decay={settings.ema}",
        f"training.seed={settings.seed}",
        f"schedule.warmup_steps={min(100, steps // 10)}",
        f"schedule.decay_steps={steps}",
        "validation.freq_epochs=100000",
        "validation.max_frames_per_task=128",
    ]


def root_of(way: str, output: Path) -> Path:
    """Where a way's stages are."""
    return reference_root(output / "train", None if way == CURRICULUM else way)


def train(
    way: str,
    curriculum: Curriculum,
    run: RunSettings,
    *,
    interruption: Any,
    say: Callable[[str], None],
) -> bool:
    """Train what is not trained yet; False where a signal stopped it."""
    from kuavo_smolvla_ros.experiment.demonstrations import open_demonstrations
    from kuavo_smolvla_ros.learning.curriculum_run import make_accelerator, run_stages

    shared = Path(run.output_root)
    stages = stages_of(way, curriculum)
    own = replace(run, output_root=str(reference_root(shared, None if way == CURRICULUM else way)))
    return run_stages(
        stages,
        own,
        make_accelerator(stages, own),
        lambda task, chunk: open_demonstrations(task.name, Path(task.datasets[0]), chunk),
        interruption=interruption,
        shared=shared,
        say=say,
    )
