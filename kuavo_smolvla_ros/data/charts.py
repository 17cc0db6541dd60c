"""Small charts as inline SVG. Colours come from the page's style sheet, so they follow its light or dark
theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray


def histogram(
    counts: Sequence[int],
    labels: Sequence[str],
    *,
    limit_after: int | None = None,
    width: int = 260,
    height: int = 88,
) -> str:
    """Bars over named bins; `limit_after` draws the allowed limit behind that many bins.

    Heights are square roots of shares, so that the few bad ones stay visible beside thousands of good ones.
    """
    total = sum(counts)
    if not total:
        return '<p class="none">no data</p>'
    left, bottom, top = 4, 20, 12
    step = (width - 2 * left) / len(counts)
    heights = np.sqrt(np.array(counts) / max(counts)) * (height - bottom - top)
    parts = [_open(width, height)]
    for i, (count, bar) in enumerate(zip(counts, heights, strict=True)):
        x, over = left + i * step, limit_after is not None and i >= limit_after
        if count:
            bar = max(float(bar), 1.5)
            kind = "bar over" if over else "bar"
            share = f"{labels[i]}: {count} ({count / total:.2%})"
            parts.append(
                f'<rect class="{kind}" x="{x + 0.75:.1f}" y="{height - bottom - bar:.1f}" '
                f'width="{step - 1.5:.1f}" height="{bar:.1f}"><title>{escape(share)}</title></rect>'
            )
    parts.append(_line(left, height - bottom, width - left, height - bottom, "axis"))
    every = max(1, round(len(labels) / 5))
    shown = range(0, len(labels), every)
    for i in shown:
        if i == shown[-1] and len(labels) - i <= 1:
            parts.append(_text(width - left, height - 6, labels[i], "end"))
        elif i == 0:
            parts.append(_text(left, height - 6, labels[i], "start"))
        else:
            parts.append(_text(left + (i + 0.5) * step, height - 6, labels[i], "middle"))
    if limit_after is not None and limit_after < len(counts):
        x = left + limit_after * step
        parts.append(_line(x, top - 6, x, height - bottom, "limit"))
        parts.append(_text(x + 3, top, "limit", "start", "limit-text"))
    return "".join(parts) + "</svg>"


def bins(edges: Sequence[float], unit: str) -> list[str]:
    """Names of the bins below, between and above edges."""
    named = [f"{edge:g}" for edge in edges]
    return [f"≤{named[0]}{unit}", *(f"≤{name}{unit}" for name in named[1:]), f">{named[-1]}{unit}"]


def distribution(
    values: Sequence[float], unit: str, *, limits: Sequence[float] = (), width: int = 266, height: int = 100
) -> str:
    """A histogram over even bins of the values' own range, with vertical lines at `limits`."""
    if not values:
        return '<p class="none">no data</p>'
    low, high = min(*values, *limits, max(values)), max(*values, *limits, min(values))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=24, range=(low, high))
    left, bottom, top = 6, 22, 12
    scale = (width - 2 * left) / (high - low)
    parts = [_open(width, height)]
    for count, a, b in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        if count:
            bar = max(1.5, count / counts.max() * (height - bottom - top))
            x = left + (a - low) * scale
            over = any(a >= limit for limit in limits)
            parts.append(
                f'<rect class="bar{" over" if over else ""}" x="{x + 0.5:.1f}" '
                f'y="{height - bottom - bar:.1f}" width="{(b - a) * scale - 1:.1f}" height="{bar:.1f}">'
                f"<title>{a:.3g} .. {b:.3g} {unit}: {count}</title></rect>"
            )
    parts.append(_line(left, height - bottom, width - left, height - bottom, "axis"))
    for value, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end")):
        parts.append(_text(left + (value - low) * scale, height - 7, f"{value:.3g} {unit}", anchor))
    for limit in limits:
        x = left + (limit - low) * scale
        parts.append(_line(x, 2, x, height - bottom, "limit"))
    return "".join(parts) + "</svg>"


def ranges(
    rows: Sequence[tuple[str, float, float, float, float, float, float, float, float | None]],
    *,
    width: int = 520,
    row_height: int = 17,
) -> str:
    """One line per joint within its limits: whole range, middle 98 %, mean, and the earlier dataset's mean.

    Rows are (name, lower, upper, low, p1, mean, p99, high, earlier mean).
    """
    left, right = 118, 10
    height = row_height * len(rows) + 8
    parts = [_open(width, height)]
    for number, (name, lower, upper, low, p1, mean, p99, high, earlier) in enumerate(rows):
        y = 4 + row_height * (number + 0.5)

        # Values beyond the limits are drawn beyond the track, up to the margin.
        def at(value: float, lower: float = lower, upper: float = upper) -> float:
            inner = left + 14, width - right - 14
            x = inner[0] + (value - lower) / (upper - lower) * (inner[1] - inner[0])
            return min(max(x, left + 1), width - right)

        outside = low < lower or high > upper
        title = f"{name}: {low:.3g} .. {high:.3g}, mean {mean:.3g}, limits {lower:.3g} .. {upper:.3g}" + (
            f", earlier mean {earlier:.3g}" if earlier is not None else ""
        )
        parts.append(f"<g><title>{escape(title)}</title>")
        parts.append(_text(left - 4, y + 3.5, name, "end", "name"))
        parts.append(_box(at(lower), at(upper), y, 7, "track"))
        parts.append(_box(at(low), at(high), y, 3, "whole over" if outside else "whole"))
        parts.append(_box(at(p1), at(p99), y, 7, "middle"))
        parts.append(_line(at(mean), y - 5, at(mean), y + 5, "mean"))
        if earlier is not None:
            parts.append(_line(at(earlier), y - 6, at(earlier), y + 6, "earlier"))
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def course(
    state: NDArray[np.float32], grippers: NDArray[np.float32], *, width: int = 300, height: int = 54
) -> str:
    """How an episode goes: each joint within its limits as a line, the grippers as bands below."""
    parts = [_open(width, height, "course")]
    upper = height - 14
    x = np.linspace(1, width - 1, len(state))
    for column in state.T:
        y = 1 + (1 - np.clip(column, 0, 1)) * (upper - 3)
        parts.append(f'<polyline class="joint" points="{_points(x, y)}"/>')
    band = 12 / max(1, grippers.shape[1])
    for number, column in enumerate(grippers.T):
        base = upper + band * (number + 1)
        y = base - np.clip(column, 0, 1) * (band - 1)
        points = f"{x[0]:.1f},{base:.1f} {_points(x, y)} {x[-1]:.1f},{base:.1f}"
        parts.append(f'<polygon class="gripper" points="{points}"/>')
    return "".join(parts) + "</svg>"


def strip(episodes: Sequence[tuple[int, float, str, str]], *, width: int = 1040, height: int = 64) -> str:
    """All episodes side by side: as high as long, coloured by verdict. Rows are (index, seconds, verdict,
    name).
    """
    longest = max(seconds for _, seconds, _, _ in episodes)
    step = min(26.0, (width - 4) / len(episodes))
    parts = [_open(width, height, "strip")]
    for place, (index, seconds, verdict, name) in enumerate(episodes):
        bar = max(2.0, seconds / longest * (height - 4))
        gap = 1 if step > 3 else 0
        parts.append(
            f'<rect class="{verdict}" x="{2 + place * step:.2f}" y="{height - bar:.1f}" '
            f'width="{step - gap:.2f}" height="{bar:.1f}">'
            f"<title>{index}: {escape(name)}, {seconds:.1f} s, {verdict}</title></rect>"
        )
    return "".join(parts) + "</svg>"


def _points(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _open(width: int, height: int, kind: str = "chart") -> str:
    stretch = ' preserveAspectRatio="none"' if kind == "course" else ""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}"{stretch} '
        'role="img">'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x1: float, x2: float, y: float, size: float, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x1:.1f}" y="{y - size / 2:.1f}" '
        f'width="{max(0.8, x2 - x1):.1f}" height="{size}" rx="1.5"/>'
    )
