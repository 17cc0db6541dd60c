"""What the trials say: matrices, intervals and the figures that follow from them, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.experiment.measured import (
    HELD_OUT,
    OTHERS,
    OTHERS_HELD_OUT,
    Cell,
    Conditions,
    Measured,
    Tally,
)
from kuavo_smolvla_ros.experiment.ways import CURRICULUM
from kuavo_smolvla_ros.learning import charts
from kuavo_smolvla_ros.learning.metrics import average, max_forgetting, negative_backward_transfer

PAGE = "results.md"
TITLES = {
    CURRICULUM: "one after the other, with replay",
    "no_replay": "one after the other, without replay",
    "joint": "all four at once",
    "single": "each alone",
}
TASKS = (1, 2, 3, 4)
Cells = Mapping[Cell, Tally]


def matrix(cells: Cells, way: str) -> NDArray[np.float64] | None:
    """Success by stage and task; None unless every task was tried after its own and each later stage."""
    scores = np.full((4, 4), np.nan)
    for (of, stage, task), told in cells.items():
        if of == way:
            scores[stage, task - 1] = told["success"]
    return None if np.isnan(scores[np.tril_indices(4)]).any() else scores


def write_results(measured: Measured, conditions: Conditions, folder: Path) -> Path:
    """The page of what has been measured so far, its figures and pictures."""
    cells = measured.cells
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for way in (CURRICULUM, "no_replay"):
        scores = matrix(cells, way)
        if scores is not None:
            rows = [[None if np.isnan(v) else float(v) for v in row] for row in scores]
            picture = charts.heat_map(rows, ["1", "2", "3", "4"], TITLES[way], success=True)
            (images / f"results_{way}.svg").write_text(picture, encoding="utf-8")
    ends = _last(cells)
    if ends:
        bars = {
            TITLES[way]: [told and (told["success"], *told["interval_95"]) for told in row]
            for way, row in ends.items()
        }
        picture = charts.shares(bars, [f"task {task}" for task in TASKS], "success in the end")
        (images / "results_end.svg").write_text(picture, encoding="utf-8")
    page = folder / PAGE
    page.write_text("\n".join(_page(measured, conditions)) + "\n", encoding="utf-8")
    measured.write(folder, conditions)
    return page


def _page(measured: Measured, conditions: Conditions) -> Iterator[str]:
    cells, training, trials = measured.cells, conditions.training, conditions.trials
    steps = ", ".join(map(str, training.steps))
    yield "# What the curriculum keeps, measured by what the policies do"
    yield ""
    yield "Written by `python training/experiment.py` (`make experiment`); how it is done, and what it does"
    yield "not show: [experiment.md](experiment.md)."
    yield ""
    yield (
        f"{conditions.demonstrations} demonstrations of each task, {steps} steps of "
        f"{training.batch} by stage, tiny network; {trials.episodes} episodes per cell at the level "
        f"`{trials.level}`, whose "
        f"seeds no demonstration has; realtime mode, a chunk {trials.manner.latency_s:g} s after its "
        f"observation and an observation every {trials.manner.n_action_steps} steps, noise "
        f"scaled by {trials.manner.noise_scale:g}. Brackets: Wilson's 95 % "
        f"intervals."
    )
    machines = sorted({told["machine"] for told in cells.values()})
    if machines:
        yield from ("", f"Measured on: {'; '.join(machines)}.")
    for way in (CURRICULUM, "no_replay"):
        yield from _stages(cells, way)
    yield from _ends(cells)
    yield from _figures(cells)
    yield from _language(measured)


def _stages(cells: Cells, way: str) -> Iterator[str]:
    if not any(of == way for of, _, _ in cells):
        return
    yield from ("", f"## {TITLES[way].capitalize()}", "", "| success | task 1 | task 2 | task 3 | task 4 |")
    yield "| --- | --- | --- | --- | --- |"
    for stage in range(4):
        entries = [_cell(cells.get((way, stage, task))) for task in TASKS]
        yield f"| after stage {stage + 1} | {' | '.join(entries)} |"
    if matrix(cells, way) is not None:
        yield from ("", f"![success by stage and task](images/results_{way}.svg)")


def _ends(cells: Cells) -> Iterator[str]:
    yield from ("", "## In the end", "", "| success | task 1 | task 2 | task 3 | task 4 | mean |")
    yield "| --- | --- | --- | --- | --- | --- |"
    ends = _last(cells)
    for way, told in ends.items():
        known = [entry["success"] for entry in told if entry is not None]
        mean = f"{np.mean(known):.1%}" if len(known) == len(TASKS) else "not measured"
        yield f"| {TITLES[way]} | {' | '.join(map(_cell, told))} | {mean} |"
    if ends:
        yield from ("", "![success in the end, by task and way](images/results_end.svg)")


def _last(cells: Cells) -> dict[str, list[Tally | None]]:
    """What each way ends with, by task; ways of which nothing is known are left out."""
    ends = {way: [cells.get((way, last_stage(way, task), task)) for task in TASKS] for way in TITLES}
    return {way: told for way, told in ends.items() if any(told)}


def last_stage(way: str, task: int) -> int:
    """The stage whose policy a way ends with for a task."""
    return {"joint": 0, "single": task - 1}.get(way, 3)


def _figures(cells: Cells) -> Iterator[str]:
    single = [cells.get(("single", task - 1, task)) for task in TASKS]
    rows = [(way, scores) for way in (CURRICULUM, "no_replay") if (scores := matrix(cells, way)) is not None]
    if not rows:
        return
    yield from ("", "| figure | " + " | ".join(TITLES[way] for way, _ in rows) + " |")
    yield "| --- |" + " --- |" * len(rows)
    for title, figure in (
        ("mean success in the end", average),
        ("success lost per task over later stages (NBT)", negative_backward_transfer),
        ("largest loss from a task's best", max_forgetting),
    ):
        yield f"| {title} | " + " | ".join(f"{figure(scores):.1%}" for _, scores in rows) + " |"
    if all(single):
        alone = float(np.mean([entry["success"] for entry in single if entry]))
        shares = " | ".join(f"{average(scores) / alone:.2f} x" if alone else "-" for _, scores in rows)
        yield f"| mean success, of that of each alone | {shares} |"


def _language(measured: Measured) -> Iterator[str]:
    """Success under other words for the task, and under the words of other tasks, by the scene."""
    rows = [
        ("the task's own sentence", [measured.cells.get((CURRICULUM, 3, task)) for task in TASKS]),
        *(
            (title, [measured.spoken.get((what, task)) for task in TASKS])
            for what, title in (
                (HELD_OUT, "sentences held out of training"),
                (OTHERS, "sentences of other tasks"),
                (OTHERS_HELD_OUT, "sentences for other tasks, held out"),
            )
        ),
    ]
    if not any(any(told) for _, told in rows[1:]):
        return
    yield from ("", "## Told in other words", "")
    yield "The last policy of the curriculum with replay, in the scene of each task. A policy that listens"
    yield "does not do the scene's task when told another one: the lower the last two rows, the more the"
    yield "sentence decides."
    yield from (
        "",
        "| success when told | task 1 | task 2 | task 3 | task 4 | together |",
        "| --- |" + " --- |" * 5,
    )
    for title, told in rows:
        yield f"| {title} | {' | '.join(map(_cell, told))} | {_together(told)} |"
    yield from ("", "How far the arms got: the joint that moved farthest from where it began, median of the")
    yield from (
        "episodes.",
        "",
        "| when told | task 1 | task 2 | task 3 | task 4 |",
        "| --- |" + " --- |" * 4,
    )
    for title, told in rows:
        moved = (f"{entry['median_moved_rad']:.2f} rad" if entry is not None else "" for entry in told)
        yield f"| {title} | {' | '.join(moved)} |"


def _together(told: Sequence[Tally | None]) -> str:
    known = [entry for entry in told if entry is not None]
    if len(known) < len(told):
        return "not measured"
    return f"{sum(entry['successes'] for entry in known) / sum(entry['trials'] for entry in known):.1%}"


def _cell(told: Tally | None) -> str:
    if told is None:
        return ""
    low, high = told["interval_95"]
    return f"{told['success']:.0%} [{low:.0%}, {high:.0%}]"
