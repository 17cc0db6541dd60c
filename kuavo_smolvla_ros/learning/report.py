"""`report.html`: what happened, in plain sentences and pictures, in one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.learning.estimate import duration
from kuavo_smolvla_ros.learning.record import StageRecord, forgetting, read_stages
from kuavo_smolvla_ros.policy.checkpoint import atomic_file, write_json

REPORT_FILE = "report.html"
FORGETTING_FILE = "forgetting.json"

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>The curriculum</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
{body}
</body></html>
"""

FIGURES = {
    "average": "average loss of all tasks at the end",
    "negative_backward_transfer": "loss gained per task over later stages (NBT; small is good)",
    "backward_transfer": "change of earlier tasks since they were learnt (BWT; negative is forgetting)",
    "max_forgetting": "largest rise of any task above its best",
    "forward_transfer": "mean loss of each task during its own stage (learning speed)",
    "joint_gap": "distance to training on all tasks at once",
    "single_gap": "distance to a policy of its own for each task",
}


SUCCESS_FIGURES = {
    "average": "average success of all tasks at the end",
    "negative_backward_transfer": "success lost per task over later stages (NBT; small is good)",
    "backward_transfer": "change of earlier tasks since they were learnt (BWT; negative is forgetting)",
    "max_forgetting": "largest fall of any task below its best",
    "joint_gap": "distance to training on all tasks at once",
    "single_gap": "distance to a policy of its own for each task",
}


def write_report(root: Path) -> Path | None:
    """Make the report of all stages below `root` from their files; None where no stage has begun."""
    stages = read_stages(root)
    if not stages:
        return None
    matrices = forgetting(root)
    write_json(root / FORGETTING_FILE, matrices)
    with atomic_file(root / REPORT_FILE) as fresh:
        fresh.write_text(PAGE.format(body="\n".join(_body(stages, matrices))), encoding="utf-8")
    return root / REPORT_FILE


def write_figures(root: Path, folder: Path) -> list[Path]:
    """The report's loss curves and loss matrices as files, for documents."""
    from kuavo_smolvla_ros.learning import charts

    stages, matrices = read_stages(root), forgetting(root)
    pictures = {"losses": charts.loss_curves(stages)} if stages else {}
    for name in ("curriculum", "no_replay"):
        if name in matrices:
            title = "with replay" if name == "curriculum" else "without replay"
            pictures[name] = charts.heat_map(matrices[name]["loss"], matrices[name]["tasks"], title)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in pictures.items():
        files.append(folder / f"rehearsal_{name}.svg")
        files[-1].write_text(text, encoding="utf-8")
    return files


def sentences(stages: Sequence[StageRecord], matrices: dict[str, Any]) -> Iterator[str]:
    """What happened, one statement at a time."""
    done = [record for record in stages if record.results is not None]
    yield f"{len(done)} of {len(stages)} stages that were begun are finished."
    for record in stages:
        last = record.validations[-1]
        step, total = last["step"], record.begin["total_steps"]
        state = "" if record.results else f" so far (validated at step {step} of {total})"
        for verdict in (record.results or last)["verdicts"]:
            ratio = "" if verdict["ratio"] is None else f", {verdict['ratio']:.2f} times its loss when learnt"
            advice = f". {verdict['advice']}" if verdict["advice"] else ""
            yield (
                f"{record.name}{state}: {verdict['task']} is {verdict['verdict']} "
                f"(loss {verdict['loss']:.4g}{ratio}){advice}."
            )
    both = matrices.get("curriculum"), matrices.get("no_replay")
    if both[0] and both[1] and len(both[0]["tasks"]) == len(both[1]["tasks"]) > 1:
        with_replay, without = (entry["figures"]["average"] for entry in both)
        yield (
            f"At the end the average loss of all tasks is {with_replay:.4g} with replay and {without:.4g} "
            f"without, {without / with_replay:.1f} times as much."
        )
    success = matrices.get("curriculum", {}).get("success")
    if success and all(value is not None for value in success["success"][-1]):
        parts = ", ".join(
            f"task {n} {_interval(*cell)}"
            for n, *cell in zip(
                success["tasks"],
                success["success"][-1],
                success["interval_95"][-1],
                success["trials"][-1],
                strict=True,
            )
        )
        yield f"Success in simulation after the last stage: {parts}."


def _body(stages: Sequence[StageRecord], matrices: dict[str, Any]) -> Iterator[str]:
    from kuavo_smolvla_ros.learning import charts

    yield "<h1>The curriculum</h1><ul>"
    yield from (f"<li>{html.escape(sentence)}</li>" for sentence in sentences(stages, matrices))
    yield "</ul><h2>Losses</h2>"
    yield "<p>Held-out flow loss of every task seen so far; training loss in grey; stages begin at dots.</p>"
    yield charts.loss_curves(stages)
    yield charts.rates(stages)
    yield "<h2>Forgetting</h2><p>The loss of each task (column) after each stage (row).</p>"
    for name, title in (("curriculum", "with replay"), ("no_replay", "without replay")):
        if name in matrices:
            yield charts.heat_map(matrices[name]["loss"], matrices[name]["tasks"], title)
    yield from _figures(matrices)
    yield from _success(matrices)
    yield "<h2>What trained</h2>" + charts.freezing(stages) + _stage_table(stages)
    yield "<h2>Replay</h2><p>Share of each task in all batches, as wanted and as realised.</p>"
    yield from _shares(stages)
    yield "<h2>Where the time went</h2><p>Seconds per step: waiting for data, preprocessing, updating.</p>"
    speeds = {record.name: record.throughput() for record in stages}
    split = {
        name: {k.removesuffix("_s"): v for k, v in parts.items() if k != "samples_per_s"}
        for name, parts in speeds.items()
    }
    yield charts.bars(split, "seconds per step")
    last = stages[-1].validations[-1]["tasks"]
    yield f"<h2>Open loop</h2><p>Whole chunks on held-out frames, last validation of {stages[-1].name}.</p>"
    yield charts.horizon(last) + _joint_table(last)


def _figures(matrices: dict[str, Any]) -> Iterator[str]:
    runs = [name for name in ("curriculum", "no_replay") if name in matrices]
    if not runs:
        return
    rows = [
        [text, *(_number(matrices[run]["figures"][key]) for run in runs)]
        for key, text in FIGURES.items()
        if any(matrices[run]["figures"][key] is not None for run in runs)
    ]
    yield table(["figure", *(run.replace("_", " ") for run in runs)], rows)


def _success(matrices: dict[str, Any]) -> Iterator[str]:
    """What was evaluated in simulation: it decides, the loss only warns."""
    from kuavo_smolvla_ros.learning import charts

    entries = {
        run: matrices[run]["success"]
        for run in ("curriculum", "no_replay")
        if run in matrices and matrices[run]["success"] is not None
    }
    yield "<h2>Success in simulation</h2>"
    if not entries:
        yield "<p>Not evaluated yet: python training/evaluate.py FOLDER OF THIS REPORT.</p>"
        return
    yield "<p>Share of episodes in which each task (column) succeeds after each stage (row).</p>"
    for run, entry in entries.items():
        title = "with replay" if run == "curriculum" else "without replay"
        yield charts.heat_map(entry["success"], entry["tasks"], title, success=True)
    for run, entry in entries.items():
        rows = [
            [f"after {n}", *(_interval(*cell) for cell in zip(*row, strict=True))]
            for n, row in zip(
                entry["tasks"],
                zip(entry["success"], entry["interval_95"], entry["trials"], strict=True),
                strict=True,
            )
        ]
        yield f"<p>{run.replace('_', ' ')}, with 95 % intervals:</p>"
        yield table(["", *(f"task {n}" for n in entry["tasks"])], rows)
    figured = {run: entry["figures"] for run, entry in entries.items() if entry["figures"] is not None}
    rows = [
        [text, *(_number(figures[key]) for figures in figured.values())]
        for key, text in SUCCESS_FIGURES.items()
        if any(figures[key] is not None for figures in figured.values())
    ]
    if rows:
        yield table(["figure", *(run.replace("_", " ") for run in figured)], rows)


def _interval(share: float | None, interval: Sequence[float] | None, trials: int | None) -> str:
    if share is None or interval is None:
        return ""
    return f"{share:.0%} ({interval[0]:.0%} to {interval[1]:.0%}, n {trials})"


def _stage_table(stages: Sequence[StageRecord]) -> str:
    rows = []
    for record in stages:
        parts = record.begin["parameters"].values()
        speed = record.throughput()
        rows.append(
            [
                record.name,
                f"{record.begin['total_steps']:,}",
                f"{record.stage['optimizer']['lr']:g}",
                f"{sum(p['trained'] for p in parts):,} of {sum(p['total'] for p in parts):,}",
                f"{speed['samples_per_s']:.1f}",
                duration(record.results["elapsed_s"]) if record.results else "not finished",
            ]
        )
    return table(["stage", "steps", "learning rate", "trained parameters", "samples/s", "time"], rows)


def _shares(stages: Sequence[StageRecord]) -> Iterator[str]:
    rows = []
    for record in stages:
        wanted = record.begin["shares"]
        train = record.of_kind("train")
        weights = [
            r["step"] - before for r, before in zip(train, [0, *(r["step"] for r in train)], strict=False)
        ]
        for task in record.tasks:
            number = str(task["number"])
            realised = sum(
                r["realised_shares"].get(number, 0.0) * w for r, w in zip(train, weights, strict=True)
            ) / sum(weights)
            rows.append([record.name, task["name"], f"{wanted[number]:.2%}", f"{realised:.2%}"])
    yield table(["stage", "task", "wanted", "realised"], rows)


def _joint_table(tasks: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for values in tasks.values() for name in values["error_by_joint"]))
    rows = [
        [name, *(_number(values["error_by_joint"].get(name)) for values in tasks.values())] for name in names
    ]
    grippers = ["gripper on the right side", *(_number(v["gripper_accuracy"]) for v in tasks.values())]
    return table(["mean error (rad)", *(f"task {n}" for n in tasks)], [*rows, grippers])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if index else ''}>{html.escape(cell)}</td>" for index, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{titles}</tr>{lines}</table>"
