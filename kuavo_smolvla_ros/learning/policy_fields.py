"""From a stage to the policy's own configuration, so that a checkpoint states what it was trained with."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from kuavo_smolvla_ros.learning.stage import Stage, StageError
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

# Stated elsewhere in a stage; a second place would let the two disagree.
ELSEWHERE = {
    "optimizer_lr": "optimizer.lr",
    "optimizer_vision_lr": "optimizer.vision_lr",
    "optimizer_betas": "optimizer.betas",
    "optimizer_eps": "optimizer.eps",
    "optimizer_weight_decay": "optimizer.weight_decay",
    "optimizer_grad_clip_norm": "optimizer.grad_clip_norm",
    "scheduler_warmup_steps": "schedule.warmup_steps",
    "scheduler_decay_steps": "schedule.decay_steps",
    "scheduler_decay_lr": "schedule.decay_lr",
    "instructions": "task.instruction and task.paraphrases",
    "tasks": "task.name, task.instruction and task.paraphrases",
    "init_from": "init",
}


def build_policy_config(stage: Stage, fields: dict[str, Any]) -> KuavoSmolVLAConfig:
    """The configuration; every sentence any of the stage's tasks uses is checked for its length."""
    chosen = {name: list(v) if isinstance(v, tuple) else v for name, v in stage.policy}
    known = {field.name for field in dataclasses.fields(KuavoSmolVLAConfig) if field.init}
    for name in (*chosen, *fields):
        if name in chosen and name in ELSEWHERE:
            raise StageError(f"policy.{name} is not set here but in {ELSEWHERE[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean policy.{close[0]}?" if close else ""
            raise StageError(f"the policy has no setting {name!r}{hint}")
    optimizer, schedule = stage.optimizer, stage.schedule
    return KuavoSmolVLAConfig(
        **{
            **chosen,
            "optimizer_lr": optimizer.lr,
            "optimizer_vision_lr": optimizer.vision_lr,
            "optimizer_betas": optimizer.betas,
            "optimizer_eps": optimizer.eps,
            "optimizer_weight_decay": optimizer.weight_decay,
            "optimizer_grad_clip_norm": optimizer.grad_clip_norm,
            "scheduler_warmup_steps": schedule.warmup_steps,
            "scheduler_decay_steps": schedule.decay_steps,
            "scheduler_decay_lr": schedule.decay_lr,
            "instructions": list(
                dict.fromkeys(s for task in stage.tasks for s in (*task.sentences, *task.hold_sentences))
            ),
            "tasks": {task.name: list(task.sentences) for task in stage.tasks},
            **fields,
        }
    )
