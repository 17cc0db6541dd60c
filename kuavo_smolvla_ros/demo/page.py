"""What the demo did, as one page beside its videos; it opens without a server."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from os import cpu_count
from string import Template
from typing import Any

from kuavo_smolvla_ros import __version__
from kuavo_smolvla_ros.demo.road import Note

Figures = Mapping[str, Any]


def render(notes: Sequence[Note], count: int) -> str:
    """The page for the steps that are done, of so many."""
    page = Template(files("kuavo_smolvla_ros.demo").joinpath("page.html").read_text())
    minutes, seconds = divmod(round(sum(note.seconds for note in notes)), 60)
    machine = f"{cpu_count()} cores, Python {platform.python_version()}"
    return page.substitute(
        about=escape(f"version {__version__}, {machine}; {minutes} min {seconds} s in all"),
        banner="" if len(notes) == count else f'<p class="banner">{len(notes)} of {count} steps are done</p>',
        sections="".join(_section(number, note) for number, note in enumerate(notes, 1)),
    )


def _section(number: int, note: Note) -> str:
    body = _BODIES.get(note.name, _plain)(note.figures)
    commands = "".join(f"{escape(line)}\n" for line in note.commands)
    by_hand = f"<details><summary>by hand</summary><pre>{commands}</pre></details>" if commands else ""
    head = f"<h2>{number}. {escape(note.title)} <i>{note.seconds:.0f} s</i></h2>"
    return f"<section>{head}{body}{by_hand}</section>"


def _plain(figures: Figures) -> str:
    return _table(("", ""), [(key, str(value)) for key, value in figures.items()])


def _check(figures: Figures) -> str:
    rows = [
        (s["topic"], s["count"], f"{s['rate_hz'] or 0:.0f}", s["shape"] or "") for s in figures["streams"]
    ]
    return _table(("topic", "messages", "Hz", "content"), rows)


def _record(figures: Figures) -> str:
    rows = [
        (e["task"], e["seed"], f"{e['seconds']:.1f} s", e["messages"], f"{e['megabytes']:.1f} MB",
         e["lost"] or "none", e["bag"])
        for e in figures["episodes"]
    ]  # fmt: skip
    table = _table(("task", "seed", "length", "messages", "size", "lost", "recording"), rows)
    sentences = dict.fromkeys(f"{e['task']}: {e['instruction']}" for e in figures["episodes"])
    return table + "".join(f"<p class=note>{escape(sentence)}</p>" for sentence in sentences)


def _convert(figures: Figures) -> str:
    rows = [
        (d["task"], d["episodes"], d["frames"], len(d["left_out"]), _speed(d["times_real_time"]))
        for d in figures["datasets"]
    ]
    return _table(("dataset", "episodes", "frames", "left out", "speed"), rows)


def _speed(times: float | None) -> str:
    return "" if times is None else f"{times:.1f}x real time"


def _report(figures: Figures) -> str:
    parts = []
    for dataset in figures["datasets"]:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in dataset["verdicts"].items() if count)
        videos = "".join(_video(path) for path in dataset["videos"])
        found = "".join(f"<li>{escape(text)}</li>" for text in dataset["findings"])
        parts.append(
            f"<h3>{escape(dataset['task'])}: {verdicts} "
            f'(<a href="{escape(dataset["page"])}">quality report</a>)</h3>{videos}<ul>{found}</ul>'
        )
    return "".join(parts)


def _train(figures: Figures) -> str:
    forgetting, tasks = figures["forgetting"], figures["tasks"]
    rows = [
        (f"after {task}", *("" if loss is None else f"{loss:.3f}" for loss in row))
        for task, row in zip(tasks, forgetting["loss"], strict=True)
    ]
    return (
        f"<p class=note>Held-out loss of each task (column) after each stage (row); what was learnt is kept "
        f'where a column does not rise. <a href="{escape(figures["page"])}">All about the training</a></p>'
        + _table(("", *tasks), rows)
    )


def _drive(figures: Figures) -> str:
    switch = figures["switch"]
    facts = [
        f"{figures['chunks']} action chunks, {figures['failures']} failed; thinking took "
        f"{figures['latency_p50_s'] * 1000:.0f} ms (median), {figures['latency_max_s'] * 1000:.0f} ms at most"
    ]
    if switch is not None:
        facts.append(
            f"told to change from {switch['from']} to {switch['to']} while moving: the arms did after "
            f"{switch['seconds']:.2f} s"
        )
    parts = []
    for task in figures["tasks"]:
        about = [
            f"moving {task['start_s']:.1f} s after the executor was started",
            f"{task['score']:.0f} points",
        ]
        if "stop_s" in task:
            about.append(
                f"stopped ({task['stop_reason']}): at rest after {task['stop_s'] * 1000:.0f} ms; "
                f"resumed: moving after {task['resume_s'] * 1000:.0f} ms"
            )
        parts.append(
            f"<h3>{escape(task['sentence'])}</h3>{_video(task['video'])}"
            f"<p class=note>{escape('; '.join(about))}</p>"
        )
    return f"<ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul>{''.join(parts)}"


def _video(path: str) -> str:
    return f'<video src="{escape(path)}" controls muted loop preload="metadata"></video>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    top = line(head, "th") if any(head) else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


_BODIES: dict[str, Callable[[Figures], str]] = {
    "check": _check,
    "record": _record,
    "convert": _convert,
    "report": _report,
    "train": _train,
    "drive": _drive,
}
