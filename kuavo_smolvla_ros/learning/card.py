"""The page that travels with every checkpoint: what it can do, how it was made, and how to use it."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.learning.checkpointing import Progress
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.stage import Stage

HEAD = """---
library_name: lerobot
pipeline_tag: robotics
tags: [robotics, lerobot, smolvla, kuavo]
---

"""


def write_card(folder: Path, stage: Stage, progress: Progress, manager: ReplayDatasetManager) -> None:
    """`README.md` in a checkpoint's folder."""
    facts = manager.facts
    lines = [
        f"# {stage.name}, step {progress.step} of {manager.total_steps}",
        "",
        f"A KuavoSmolVLA policy for {len(facts.state_names)} state and {len(facts.action_names)} action "
        f"dimensions, "
        f"{len(facts.cameras)} cameras ({', '.join(facts.cameras)}), {facts.fps:g} frames per second, "
        f"robot fingerprint `{facts.fingerprint}`.",
        "",
        "## What it was taught",
        "",
        "| task | instruction | share of the batches | held-out loss |",
        "| --- | --- | --- | --- |",
    ]
    losses = (progress.best or {}).get("tasks", {})
    for task, share in zip(stage.tasks, stage.shares, strict=True):
        loss = losses.get(str(task.number), {}).get("loss")
        shown = "not measured yet" if loss is None else f"{loss:.4g}"
        lines.append(f"| {task.name} | {task.instruction} | {float(share):.0%} | {shown} |")
    if progress.best:
        lines += [
            "",
            f"Losses are those of step {progress.best['step']}, the best so far, on held-out episodes.",
        ]
    lines += [
        "",
        "## How",
        "",
        f"Stage `{stage.hash}`: starts from {stage.init.target or 'random weights'}, AdamW at "
        f"{stage.optimizer.lr:g} "
        f"(vision {stage.optimizer.vision_lr:g}), batches of {stage.training.effective_batch_size}, "
        f"{stage.training.epochs} epochs, seed {stage.training.seed}. Data `{manager.digest}`: "
        + ", ".join(dataset for task in stage.tasks for dataset in task.datasets)
        + ".",
        "",
        "## Use",
        "",
        "```python",
        "from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy",
        'policy = KuavoSmolVLAPolicy.from_pretrained("PATH OF THIS FOLDER")',
        "```",
        "",
        "It runs only on the robot with the fingerprint above. Losses say little about success: try it in "
        "simulation before it moves a robot.",
        "",
    ]
    (folder / "README.md").write_text(HEAD + "\n".join(lines), encoding="utf-8")
