"""The quality report as one HTML file: no server, no network, nothing beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template

from kuavo_smolvla_ros.data import charts
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.quality import EpisodeQuality
from kuavo_smolvla_ros.data.report import VERDICTS, JointStatistics, QualityReport, TopicSummary
from kuavo_smolvla_ros.data.stream_figures import AGE_EDGES_MS, GRID_EDGES_MS, INTERVAL_EDGES
from kuavo_smolvla_ros.robot.spec import load_spec

_MOST_EXAMPLES = 12
_SYMBOLS = {"good": "✓", "suspect": "!", "bad": "✗"}
_TITLES = {
    Code.UNREADABLE: "cannot be read",
    Code.DAMAGED: "damaged file",
    Code.OTHER_ROBOT: "another robot",
    Code.NO_TASK: "no task",
    Code.BACKLOG: "the recorder lagged",
    Code.UNSTAMPED: "no stamps",
    Code.SKEWED: "streams too far apart",
    Code.STALE: "samples too old",
    Code.NOT_FINITE: "values that are no numbers",
    Code.NO_COMMAND: "before the first command",
    Code.PART: "divided",
    Code.TRIMMED: "idle ends cut off",
    Code.FAST: "faster than the limits",
    Code.JERKY: "jerkier than the limits",
    Code.LAG: "action and state apart in time",
    Code.SHIFTED: "differs from the earlier dataset",
    Code.FEW_EPISODES: "few episodes",
}


def render(report: QualityReport) -> str:
    """The whole page."""
    sections = [
        _section("What was found", _findings(report)),
        _section("Tasks", _tasks(report)),
        _section("Left out", _left_out(report)) if report.left_out else "",
        _section("Episodes", _episodes(report)),
        _section("Joints", _joints(report)),
        _section("Topics", _topics(report)) if report.topics else "",
        _section("Thresholds", _thresholds(report)),
    ]
    page = Template(files("kuavo_smolvla_ros.data").joinpath("report_page.html").read_text())
    return page.substitute(
        title=escape(f"{report.root.name}: quality report"),
        name=escape(report.root.name),
        about=escape(
            f"robot {report.robot}, {report.fps:g} frames per second"
            + (f", compared with {report.against}" if report.against else "")
        ),
        banner=_banner(report),
        tiles=_tiles(report),
        sections="".join(sections),
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _banner(report: QualityReport) -> str:
    if not report.failures:
        return '<p class="banner good">✓ passes every threshold</p>'
    items = "".join(f"<li>{escape(failure)}</li>" for failure in report.failures)
    return f'<div class="banner bad">✗ does not pass<ul>{items}</ul></div>'


def _tiles(report: QualityReport) -> str:
    seconds = sum(episode.seconds for episode in report.episodes)
    steps = sum(episode.steps for episode in report.episodes)
    long = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    rows = [
        ("episodes", f"{len(report.episodes)}", ""),
        ("recorded", long, ""),
        ("steps", f"{steps:,}".replace(",", " "), ""),
        ("tasks", f"{len(report.tasks)}", ""),
        *((verdict, f"{report.verdicts[verdict]}", verdict) for verdict in VERDICTS),
        ("left out", f"{len(report.left_out)}", "bad" if report.left_out else ""),
    ]
    return "".join(
        f'<div class="tile {kind}"><b>{value}</b><span>{label}</span></div>' for label, value, kind in rows
    )


def _findings(report: QualityReport) -> str:
    groups: dict[tuple[Severity, Code], list[Finding]] = defaultdict(list)
    for finding in report.all_findings:
        groups[finding.severity, finding.code].append(finding)
    if not groups:
        return '<p class="none">nothing: every recording and every episode is as it should be</p>'
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0].rank, -len(item[1])))
    lines = []
    for (severity, code), found in ordered:
        title = _TITLES.get(code, code.value.replace("_", " "))
        examples = "".join(f"<li>{_where(finding)}</li>" for finding in found[:_MOST_EXAMPLES])
        if len(found) > _MOST_EXAMPLES:
            examples += f"<li>and {len(found) - _MOST_EXAMPLES} more (all of them in report.json)</li>"
        is_open = " open" if severity is Severity.ERROR else ""
        lines.append(
            f'<details{is_open}><summary><span class="tag {severity.value}">{severity.value}</span> '
            f"{escape(title)} <i>{len(found)}</i></summary><ul>{examples}</ul></details>"
        )
    return "".join(lines)


def _where(finding: Finding) -> str:
    place = [f"<b>{escape(finding.bag)}</b>"] if finding.bag else []
    if finding.topic:
        place.append(f"<code>{escape(finding.topic)}</code>")
    if finding.at_s is not None:
        place.append(f"at {finding.at_s:.2f} s")
    often = f" ({finding.count} times)" if finding.count > 1 else ""
    text = escape(finding.sentence) + often
    return f"{' '.join(place)}: {text}" if place else text


def _tasks(report: QualityReport) -> str:
    most = max(entry["episodes"] for entry in report.tasks.values())
    rows = []
    for task, entry in report.tasks.items():
        bar = "".join(
            f'<i class="{verdict}" style="width:{entry[verdict] / most * 100:.1f}%"></i>'
            for verdict in VERDICTS
        )
        sentences = "<br>".join(escape(sentence) for sentence in entry["instructions"][:6])
        rows.append(
            f"<tr><td>{escape(task)}</td><td class=n>{entry['episodes']}</td>"
            f"<td class=n>{entry['seconds'] / 60:.1f} min</td>"
            f'<td class="share"><div class="stack">{bar}</div></td><td class="wide">{sentences}</td></tr>'
        )
    head = "<tr><th>task</th><th>episodes</th><th>time</th><th>verdicts</th><th>instructions</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _left_out(report: QualityReport) -> str:
    rows = "".join(
        f"<tr><td><b>{escape(left.source)}</b></td><td class=wide>{escape(left.reason)}</td></tr>"
        for left in report.left_out
    )
    return f"<table><tr><th>recording</th><th>why</th></tr>{rows}</table>"


def _episodes(report: QualityReport) -> str:
    episodes = report.episodes
    rows = [(e.index, e.seconds, e.verdict, e.source) for e in episodes]
    lags = [e.figures["lag_s"] for e in episodes if e.figures["lag_s"] is not None]
    speeds = [e.figures["speed"]["of_limit"] for e in episodes if e.figures["speed"]]
    jumps = [e.figures["acceleration"]["of_limit"] for e in episodes if e.figures["acceleration"]]
    lag_limits = [] if report.rules.lag_s is None else [report.rules.lag_s]
    small = [
        ("length", charts.distribution([e.seconds for e in episodes], "s")),
        ("state follows action after", charts.distribution(lags, "s", limits=lag_limits)),
        ("fastest command, of the limit", charts.distribution(speeds, "x", limits=[1.0])),
        ("hardest change, of the limit", charts.distribution(jumps, "x", limits=[1.0])),
    ]
    figures = "".join(f"<figure><figcaption>{title}</figcaption>{chart}</figure>" for title, chart in small)
    order = {verdict: number for number, verdict in enumerate(reversed(VERDICTS))}
    chosen = sorted(report.shown, key=lambda index: (order[episodes[index].verdict], index))
    cards = "".join(_card(report, episodes[index]) for index in chosen)
    note = ""
    if len(chosen) < len(episodes):
        note = f"<p class=note>{len(chosen)} of {len(episodes)} episodes are shown, the worst ones first.</p>"
    return (
        f"{charts.strip(rows)}<p class=note>In the dataset's order; as high as long.</p>"
        f'<div class="row">{figures}</div>{note}<div class="cards">{cards}</div>'
    )


def _card(report: QualityReport, episode: EpisodeQuality) -> str:
    shown = report.shown[episode.index]
    pictures = "".join(
        f'<figure><img src="{first}" alt="first"><img src="{last}" alt="last">'
        f"<figcaption>{escape(role)}</figcaption></figure>"
        for role, first, last in shown.thumbnails
    )
    figures = episode.figures
    facts = [f"{episode.seconds:.1f} s"]
    if figures["lag_s"] is not None:
        facts.append(f"lag {figures['lag_s'] * 1000:.0f} ms")
    if figures["speed"]:
        facts.append(f"speed {figures['speed']['of_limit']:.2f} of limit")
    if closings := figures.get("gripper_closings"):
        facts.append(f"{sum(closings.values())} grips")
    groups: dict[Code, list[Finding]] = defaultdict(list)
    for finding in sorted(episode.findings, key=lambda f: -f.severity.rank):
        if finding.code is not Code.STREAM:
            groups[finding.code].append(finding)
    found = "".join(_short(group) for group in groups.values())
    return (
        f'<article class="{episode.verdict}"><header><span class="mark">{_SYMBOLS[episode.verdict]}</span>'
        f"<b>{episode.index}</b> {escape(episode.source)} <i>{escape(episode.task)}</i>"
        f'<span class="facts">{" · ".join(facts)}</span></header>'
        f'<div class="pictures">{pictures}</div>{charts.course(shown.spark, shown.grippers)}'
        f"<ul>{found}</ul></article>"
    )


def _short(group: list[Finding]) -> str:
    """The first finding of a kind, and how many more there are."""
    finding = group[0]
    topic = f"<code>{escape(finding.topic)}</code> " if finding.topic else ""
    at = f" <i>at {finding.at_s:.1f} s</i>" if finding.at_s is not None else ""
    more = f" <i>(and {len(group) - 1} more like it)</i>" if len(group) > 1 else ""
    return f'<li class="{finding.severity.value}">{topic}{escape(finding.sentence)}{at}{more}</li>'


def _joints(report: QualityReport) -> str:
    columns = []
    for what, joints in report.joints.items():
        rows = [
            (j.name, j.lower, j.upper, j.low, j.p1, j.mean, j.p99, j.high, j.earlier_mean) for j in joints
        ]
        columns.append(f"<figure><figcaption>{what}</figcaption>{charts.ranges(rows)}</figure>")
    key = "Track: the limits. Thin: all values. Thick: 98 % of them. Line: the mean" + (
        " (dashed: in the earlier dataset)." if report.against else "."
    )
    tables = "".join(_joint_table(what, joints) for what, joints in report.joints.items())
    return (
        f'<p class=note>{key}</p><div class="row">{"".join(columns)}</div>'
        f"<details><summary>all figures</summary>{tables}</details>"
    )


def _joint_table(what: str, joints: list[JointStatistics]) -> str:
    rows = []
    for j in joints:
        numbers = "".join(
            f"<td class=n>{v:.3f}</td>" for v in (j.low, j.p1, j.mean, j.p99, j.high, j.deviation)
        )
        shift = "" if j.shift is None else f"<td class=n>{j.shift:+.2f}</td>"
        rows.append(f"<tr><td>{escape(j.name)}</td><td>{escape(j.unit)}</td>{numbers}{shift}</tr>")
    compared = "<th>shift</th>" if joints and joints[0].shift is not None else ""
    head = (
        f"<tr><th>{what}</th><th>unit</th><th>min</th><th>1 %</th><th>mean</th><th>99 %</th><th>max</th>"
        f"<th>deviation</th>{compared}</tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _topics(report: QualityReport) -> str:
    spec = load_spec(report.robot)
    ages_ms = {s.topic: s.max_age_s * 1000 for s in spec.inputs.values()}
    return "".join(_topic(topic, ages_ms.get(topic.topic), spec.max_skew_s * 1000) for topic in report.topics)


def _topic(topic: TopicSummary, max_age_ms: float | None, max_skew_ms: float) -> str:
    rates = topic.rates_hz or [0.0]
    facts = [
        f"{topic.recordings} recordings, {topic.messages} messages",
        f"{_span(min(rates), max(rates))} Hz (declared {topic.declared_hz:g})",
        f"jitter up to {max(topic.jitter_ms, default=0):.1f} ms",
        f"longest gap {topic.gap_max_ms:.0f} ms",
    ]
    if topic.repeated:
        facts.append(f"{topic.repeated} pictures repeat the one before")
    shapes = [
        ("time between messages, in periods", "interval", INTERVAL_EDGES, "", None),
        ("from stamp to recorder", "latency", AGE_EDGES_MS, " ms", None),
        ("age when used", "age", GRID_EDGES_MS, " ms", max_age_ms),
        ("behind the newest stream", "skew", GRID_EDGES_MS, " ms", max_skew_ms),
    ]
    figures = ""
    for title, name, edges, unit, limit in shapes:
        if name in topic.histograms:
            after = None if limit is None else sum(edge <= limit for edge in edges)
            chart = charts.histogram(topic.histograms[name], charts.bins(edges, unit), limit_after=after)
            figures += f"<figure><figcaption>{title}</figcaption>{chart}</figure>"
    return (
        f'<div class="topic"><h3><code>{escape(topic.topic)}</code></h3><p class=note>{" · ".join(facts)}</p>'
        f'<div class="row">{figures}</div></div>'
    )


def _span(low: float, high: float) -> str:
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} .. {high:.1f}"


def _thresholds(report: QualityReport) -> str:
    rows: Iterable[str] = (
        f"<tr><td>{escape(name)}</td><td class=n>{'off' if value is None else f'{value:g}'}</td></tr>"
        for name, value in report.rules.__dict__.items()
    )
    return f"<details><summary>what was held against what</summary><table>{''.join(rows)}</table></details>"
