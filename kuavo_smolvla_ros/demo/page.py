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
        contents="".join(
            f'<li><a href="#{escape(note.name)}">{_capital(escape(note.title))}</a> '
            f"<i>{note.seconds:.0f} s</i></li>"
            for note in notes
        ),
        sections="".join(_section(number, note) for number, note in enumerate(notes, 1)),
    )


def _section(number: int, note: Note) -> str:
    body = _BODIES.get(note.name, _plain)(note.figures)
    commands = "".join(f"{escape(line)}\n" for line in note.commands)
    by_hand = f"<details><summary>by hand</summary><pre>{commands}</pre></details>" if commands else ""
    head = f"<h2>{number}. {_capital(escape(note.title))} <i>{note.seconds:.0f} s</i></h2>"
    return f'<section id="{escape(note.name)}">{head}{body}{by_hand}</section>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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
         e["lost"] or "none")
        for e in figures["episodes"]
    ]  # fmt: skip
    table = _table(("task", "seed", "length", "messages", "size", "lost"), rows)
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
        videos = "".join(
            _film(path, f"demonstration {number} of the scripted expert")
            for number, path in enumerate(dataset["videos"], 1)
        )
        found = "".join(f"<li>{escape(text)}</li>" for text in dataset["findings"])
        parts.append(
            f"<h3>{escape(dataset['task'])}: {verdicts} "
            f'(<a href="{escape(dataset["page"])}">quality report</a>)</h3>{videos}<ul>{found}</ul>'
        )
    return "".join(parts)


def _train(figures: Figures) -> str:
    from kuavo_smolvla_ros.learning.charts import heat_map

    forgetting, tasks = figures["forgetting"], figures["tasks"]
    numbers = [task.removeprefix("task").partition("_")[0] for task in tasks]
    chart = heat_map(forgetting["loss"], numbers, "held-out loss")
    return (
        "<p class=note>Held-out loss of each task (column) after each stage (row). What was learnt is kept "
        "where a column does not rise below the diagonal; above it stands what a task's loss was before its "
        f'own stage. <a href="{escape(figures["page"])}">All about the training</a></p>'
        f"<figure>{chart}</figure>"
    )


def _evaluate(figures: Figures) -> str:
    rows = [
        (
            task["name"],
            f"{task['successes']} of {task['trials']}",
            f"{task['interval_95'][0]:.0%} to {task['interval_95'][1]:.0%}",
            f"{task['mean_score']:.1f}",
        )
        for task in figures["tasks"]
    ]
    return (
        "<p class=note>In simulation, in closed loop, on scenes that no demonstration had, "
        f"{figures['max_steps'] / 10:g} s each. Two demonstrations of a task and minutes of training make no "
        "policy that succeeds, and so few episodes could not tell one from another: see the intervals.</p>"
        + _table(("task", "succeeded", "95 % interval", "mean score of 100"), rows)
    )


def _drive(figures: Figures) -> str:
    switch, held = figures["switch"], figures["held"]
    usual_ms, most_ms = figures["latency_p50_s"] * 1000, figures["latency_max_s"] * 1000
    facts = [
        f"{figures['chunks']} action chunks, {figures['failures']} failed; thinking took {usual_ms:.0f} ms "
        f"(median), {most_ms:.0f} ms at most",
        f"the simulator ran at {figures['real_time_factor']:g} of real time",
    ]
    if held:
        reasons = ", ".join(f"{reason} ({count} times)" for reason, count in held.items())
        facts.append(f"the executor held by itself and was resumed: {reasons}; the machine was too busy")
    if switch is not None:
        facts.append(
            f"told to change from {switch['from']} to {switch['to']} while moving: the arms did after "
            f"{switch['seconds']:.2f} s"
        )
    parts = []
    for task in figures["tasks"]:
        about = [
            f"moving {task['start_s']:.1f} s after the executor was started",
            f"{task['score']:.0f} of 100 points",
        ]
        if "stop_s" in task:
            about.append(
                f"stopped ({task['stop_reason']}): at rest after {task['stop_s'] * 1000:.0f} ms; "
                f"resumed: moving after {task['resume_s'] * 1000:.0f} ms"
            )
        parts.append(
            f"<h3>{escape(task['task'])}: {escape(task['sentence'])}</h3>"
            f"{_film(task['video'], '; '.join(about))}"
        )
    return f"<ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul>{''.join(parts)}"


def _film(path: str, caption: str) -> str:
    # Without controls: they would cover half of so low a picture.
    player = (
        f'<video src="{escape(path)}" autoplay muted loop playsinline title="click to pause" '
        'onclick="this.paused ? this.play() : this.pause()"></video>'
    )
    return f'<div class="film">{player}<p>{escape(caption)}</p></div>'


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
    "evaluate": _evaluate,
    "drive": _drive,
}
