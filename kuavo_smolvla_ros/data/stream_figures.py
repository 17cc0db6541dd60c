"""One topic of one recording in figures: rate, jitter, gaps, lateness, and age where a grid used it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.robot.stream_buffer import Arrival

NS_PER_MS = 1e6
# Upper edges of histogram bins; the last bin has none. Half the bins are where good recordings lie.
AGE_EDGES_MS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0)
GRID_EDGES_MS = (2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 50.0, 75.0, 100.0, 250.0)
INTERVAL_EDGES = (0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # in nominal periods

Numbers = NDArray[np.float64]


def figures(
    rate_hz: float,
    stamps_ns: NDArray[np.int64],
    latency_ns: NDArray[np.int64],
    arrivals: Counter[Arrival],
    digests: NDArray[np.int64] | None,
) -> dict[str, Any]:
    """`latency_ns` is receive time minus stamp; `stamps_ns` rise."""
    intervals = np.diff(stamps_ns) / NS_PER_MS
    span_s = float(stamps_ns[-1] - stamps_ns[0]) / 1e9 if stamps_ns.size > 1 else 0.0
    latency = latency_ns / NS_PER_MS
    result: dict[str, Any] = {
        "count": int(stamps_ns.size),
        "span_s": round(span_s, 3),
        "declared_hz": rate_hz,
        "rate_hz": round((stamps_ns.size - 1) / span_s, 3) if span_s > 0 else None,
        "jitter_ms": _round(intervals.std()) if intervals.size else None,
        "gap_max_ms": _round(intervals.max()) if intervals.size else None,
        "interval": _histogram(intervals * rate_hz / 1000, INTERVAL_EDGES),
        "arrivals": {
            arrival.value: count for arrival, count in sorted(arrivals.items(), key=lambda i: i[0].value)
        },
        "latency_ms": _quantiles(latency),
        "latency": _histogram(latency, AGE_EDGES_MS),
    }
    if digests is not None and digests.size > 1:
        result["repeated_pictures"] = int(np.count_nonzero(digests[1:] == digests[:-1]))
    return result


def grid_figures(age_ns: NDArray[np.int64], skew_ns: NDArray[np.int64]) -> dict[str, Any]:
    """How old the chosen samples were at the grid times, and how far behind the newest stream."""
    return {
        "age_ms": _quantiles(age_ns / NS_PER_MS),
        "age": _histogram(age_ns / NS_PER_MS, GRID_EDGES_MS),
        "skew_ms": _quantiles(skew_ns / NS_PER_MS),
        "skew": _histogram(skew_ns / NS_PER_MS, GRID_EDGES_MS),
    }


def _histogram(values: Numbers, edges: tuple[float, ...]) -> list[int]:
    bins = np.searchsorted(np.array(edges), values, side="left")
    return np.bincount(bins, minlength=len(edges) + 1).tolist()


def _quantiles(values: Numbers) -> dict[str, float] | None:
    if not values.size:
        return None
    low, middle, high = np.percentile(values, (1, 50, 99))
    return {
        "p1": _round(low),
        "p50": _round(middle),
        "p99": _round(high),
        "max": _round(values.max()),
    }


def _round(value: Any) -> float:
    return round(float(value), 3)
