"""Pictures of a curriculum as SVG text, to stand inside a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kuavo_smolvla_ros.learning.record import StageRecord

COLOURS = ("#1f6fb4", "#d1701c", "#3a8f3a", "#a23b9c", "#7a6a4f", "#c03040")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "curriculum",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def colour(number: str) -> str:
    """The same for a task in every picture."""
    return COLOURS[(int(number) - 1) % len(COLOURS)]


def loss_curves(stages: Sequence[StageRecord]) -> str:
    """Validation losses of all tasks over all stages, behind each other; training loss in grey."""
    figure = Figure((9, 3.4), layout="constrained")
    axes = figure.subplots()
    offset, named = 0, set()
    for record in stages:
        train = record.of_kind("train")
        axes.plot([offset + r["step"] for r in train], [r["loss"] for r in train], color="0.75", lw=0.8)
        for task in record.tasks:
            number = str(task["number"])
            points = [(offset + r["step"], r["tasks"][number]["loss"]) for r in record.validations]
            label = None if number in named else task["name"]
            named.add(number)
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour(number), label=label)
        axes.axvline(offset, color="0.5", lw=0.8, ls=":")
        offset += record.begin["total_steps"]
    axes.set(xlabel="step", ylabel="flow loss", yscale="log")
    axes.legend(loc="upper right", ncols=2, fontsize=8)
    return svg(figure)


def rates(stages: Sequence[StageRecord]) -> str:
    """Learning rates of all groups over all stages."""
    figure = Figure((9, 2.0), layout="constrained")
    axes = figure.subplots()
    offset = 0
    for place, record in enumerate(stages):
        train = record.of_kind("train")
        for index, name in enumerate(train[0]["lr_by_group"]):
            axes.plot(
                [offset + r["step"] for r in train],
                [r["lr_by_group"][name] for r in train],
                color=COLOURS[index],
                label=name if place == 0 else None,
            )
        offset += record.begin["total_steps"]
    axes.set(xlabel="step", ylabel="learning rate", yscale="log")
    axes.legend(fontsize=8)
    return svg(figure)


def heat_map(
    matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], title: str, *, success: bool = False
) -> str:
    """Tasks across, stages down. Losses: the darker the worse; success rates: the darker the better."""
    values = np.array([[np.nan if v is None else v for v in row] for row in matrix], float)
    figure = Figure((0.9 * len(tasks) + 1.6, 0.6 * len(tasks) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    known = values[np.tril_indices(len(values))]
    top = 1.0 if success else 2 * float(np.nanmedian(known)) or 1.0
    axes.imshow(values, cmap="Greens" if success else "Oranges", vmin=0, vmax=top, aspect="auto")
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        weight, ink = "bold" if row == column else "normal", "white" if value > 0.7 * top else "black"
        text = f"{value:.0%}" if success else f"{value:.3g}"
        axes.text(column, row, text, ha="center", va="center", weight=weight, color=ink)
    axes.set_xticks(range(len(tasks)), [f"task {n}" for n in tasks])
    axes.set_yticks(range(len(tasks)), [f"after {n}" for n in tasks])
    axes.set_title(title, fontsize=9)
    return svg(figure)


def freezing(stages: Sequence[StageRecord]) -> str:
    """Which vision layers train in which stage."""
    layers = max(record.begin["vision_layers"] for record in stages)
    grid = np.zeros((len(stages), layers))
    for row, record in enumerate(stages):
        grid[row, record.begin["unfrozen_layers"]] = 1
    figure = Figure((0.4 * layers + 2.2, 0.35 * len(stages) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    axes.set_xticks(range(layers))
    axes.set_yticks(range(len(stages)), [record.name for record in stages])
    axes.set(xlabel="vision layer (from the image on); blue trains")
    return svg(figure)


def bars(groups: Mapping[str, Mapping[str, float]], label: str) -> str:
    """Stacked bars, one per group."""
    figure = Figure((9, 0.4 * len(groups) + 1.0), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for parts in groups.values() for kind in parts))
    left = np.zeros(len(groups))
    for index, kind in enumerate(kinds):
        widths = np.array([parts.get(kind, 0.0) for parts in groups.values()])
        axes.barh(list(groups), widths, left=left, color=COLOURS[index % len(COLOURS)], label=kind)
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return svg(figure)


def shares(
    kinds: Mapping[str, Sequence[tuple[float, float, float] | None]], groups: Sequence[str], label: str
) -> str:
    """Bars side by side, one of each kind in a group: a share and its bounds; None: no bar."""
    figure = Figure((9, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for index, (kind, entries) in enumerate(kinds.items()):
        known = [(place, entry) for place, entry in enumerate(entries) if entry is not None]
        places = [place + (index - (len(kinds) - 1) / 2) * width for place, _ in known]
        values = [share for _, (share, _, _) in known]
        # Rounding may put a bound a hair inside.
        below = [max(share - low, 0.0) for _, (share, low, _) in known]
        above = [max(high - share, 0.0) for _, (share, _, high) in known]
        axes.bar(places, values, 0.9 * width, color=COLOURS[index % len(COLOURS)], label=kind)
        axes.errorbar(places, values, [below, above], fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=label, ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return svg(figure)


def horizon(tasks: Mapping[str, Any]) -> str:
    """Open-loop error over the steps of a chunk, for each task."""
    figure = Figure((9, 2.4), layout="constrained")
    axes = figure.subplots()
    for number, values in tasks.items():
        axes.plot(values["error_by_horizon"], color=colour(number), label=f"task {number}")
    axes.set(xlabel="step of the chunk", ylabel="mean error (rad)", ylim=(0, None))
    axes.legend(fontsize=8)
    return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an element of a page; the same figure is the same text."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
