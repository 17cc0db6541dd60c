"""What the trials say: matrices, intervals and the figures that follow from them, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.experiment.trials import TrialLog
from kuavo_smolvla_ros.experiment.ways import CURRICULUM
from kuavo_smolvla_ros.learning import charts
from kuavo_smolvla_ros.learning.metrics import average, max_forgetting, negative_backward_transfer
from kuavo_smolvla_ros.learning.success import tally
from kuavo_smolvla_ros.policy.checkpoint import write_json

if TYPE_CHECKING:
    from kuavo_smolvla_ros.experiment.road import Experiment

PAGE = "results.md"
FIGURES = "results.json"
TITLES = {
    CURRICULUM: "one after the other, with replay",
    "no_replay": "one after the other, without replay",
    "joint": "all four at once",
    "single": "each alone",
}
Cells = Mapping[tuple[str, int, int], Mapping[str, Any]]


def tallies(experiment: Experiment) -> dict[tuple[str, int, int], dict[str, Any]]:
    """What was played whole, by way, stage and task."""
    log = TrialLog(experiment.output, experiment.trials)
    found = {}
    for cell in experiment.cells():
        trial = experiment.trial_of(*cell)
        if trial is not None and not log.missing(trial):
            found[cell] = log.tally(trial)
    return found


def matrix(cells: Cells, way: str) -> NDArray[np.float64] | None:
    """Success by stage and task; None unless every task was tried after its own and each later stage."""
    scores = np.full((4, 4), np.nan)
    for (of, stage, task), told in cells.items():
        if of == way:
            scores[stage, task - 1] = told["success"]
    return None if np.isnan(scores[np.tril_indices(4)]).any() else scores


def write_results(experiment: Experiment, folder: Path) -> Path:
    """The page and its figures, of what has been played so far."""
    cells = tallies(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for way in (CURRICULUM, "no_replay"):
        scores = matrix(cells, way)
        if scores is not None:
            rows = [[None if np.isnan(v) else float(v) for v in row] for row in scores]
            picture = charts.heat_map(rows, ["1", "2", "3", "4"], TITLES[way], success=True)
            (images / f"results_{way}.svg").write_text(picture, encoding="utf-8")
    page = folder / PAGE
    page.write_text("\n".join(_page(experiment, cells)) + "\n", encoding="utf-8")
    content = {f"{way}/stage{stage + 1}/task{task}": told for (way, stage, task), told in cells.items()}
    write_json(folder / FIGURES, content)
    return page


def _page(experiment: Experiment, cells: Cells) -> Iterator[str]:
    training, trials = experiment.training, experiment.trials
    steps = ", ".join(map(str, training.steps))
    yield "# What the curriculum keeps, measured by what the policies do"
    yield ""
    yield "Written by `python training/experiment.py` (`make experiment`); how it is done, and what it does"
    yield "not show: [experiment.md](experiment.md)."
    yield ""
    yield (
        f"{experiment.demonstrations} demonstrations of each task, {steps} steps of "
        f"{training.batch} by stage, tiny network; {trials.episodes} episodes per cell at the level "
        f"`{trials.level}`, whose "
        f"seeds no demonstration has; realtime mode, a chunk {trials.manner.latency_s:g} s after its "
        f"observation and an observation every {trials.manner.n_action_steps} steps, noise "
        f"scaled by {trials.manner.noise_scale:g}. Brackets: Wilson's 95 % "
        f"intervals."
    )
    for way in (CURRICULUM, "no_replay"):
        yield from _stages(cells, way)
    yield from _ends(cells)
    yield from _figures(cells)
    yield from _language(experiment, cells)


def _stages(cells: Cells, way: str) -> Iterator[str]:
    if not any(of == way for of, _, _ in cells):
        return
    yield from ("", f"## {TITLES[way].capitalize()}", "", "| success | task 1 | task 2 | task 3 | task 4 |")
    yield "| --- | --- | --- | --- | --- |"
    for stage in range(4):
        entries = [_cell(cells.get((way, stage, task))) for task in (1, 2, 3, 4)]
        yield f"| after stage {stage + 1} | {' | '.join(entries)} |"
    if matrix(cells, way) is not None:
        yield from ("", f"![success by stage and task](images/results_{way}.svg)")


def _ends(cells: Cells) -> Iterator[str]:
    yield from ("", "## In the end", "", "| success | task 1 | task 2 | task 3 | task 4 | mean |")
    yield "| --- | --- | --- | --- | --- | --- |"
    for way, title in TITLES.items():
        told = [cells.get((way, last_stage(way, task), task)) for task in (1, 2, 3, 4)]
        if not any(told):
            continue
        known = [entry["success"] for entry in told if entry is not None]
        mean = f"{np.mean(known):.1%}" if len(known) == 4 else "not measured"
        yield f"| {title} | {' | '.join(map(_cell, told))} | {mean} |"


def last_stage(way: str, task: int) -> int:
    """The stage whose policy a way ends with for a task."""
    return {"joint": 0, "single": task - 1}.get(way, 3)


def _figures(cells: Cells) -> Iterator[str]:
    single = [cells.get(("single", task - 1, task)) for task in (1, 2, 3, 4)]
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


def _language(experiment: Experiment, cells: Cells) -> Iterator[str]:
    """Success under other words for the task, and under the words of other tasks, by the scene."""
    log = TrialLog(experiment.output, experiment.trials)
    same: dict[int, list[dict[str, Any]]] = {}
    other: dict[int, list[dict[str, Any]]] = {}
    for spoken, trial in experiment.spoken():
        if log.missing(trial):
            return
        into = same if spoken.meant == spoken.task else other
        into.setdefault(spoken.task, []).extend(log.episodes(trial))
    if not same:
        return
    yield from ("", "## Told in other words", "")
    yield "The last policy of the curriculum with replay, in the scene of each task."
    yield from (
        "",
        "| success when told | task 1 | task 2 | task 3 | task 4 |",
        "| --- | --- | --- | --- | --- |",
    )
    own = [_cell(cells.get((CURRICULUM, 3, task))) for task in (1, 2, 3, 4)]
    yield f"| the task's own sentence | {' | '.join(own)} |"
    for title, found in (("sentences held out of training", same), ("sentences of other tasks", other)):
        yield f"| {title} | {' | '.join(_cell(tally(found[task])) for task in (1, 2, 3, 4))} |"


def _cell(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return ""
    low, high = told["interval_95"]
    return f"{told['success']:.0%} [{low:.0%}, {high:.0%}]"
