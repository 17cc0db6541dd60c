"""Where in a recording an episode can be: clocks that were set, gaps, pauses, idle ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.robot.grid import Recorded, find_gaps
from kuavo_smolvla_ros.robot.stream_buffer import MAX_REORDER_NS

Int64s = NDArray[np.int64]
_SAME_JUMP_NS = 5_000_000_000  # streams that jump within this time were set back by the same cause
_FOREVER = 1 << 62


@dataclass(frozen=True)
class Window:
    """A stretch of receive time within which no clock was set."""

    start_ns: int = -_FOREVER
    end_ns: int = _FOREVER

    def holds(self, receive_ns: Int64s) -> NDArray[np.bool_]:
        return (receive_ns >= self.start_ns) & (receive_ns < self.end_ns)


def odd_stamps(stamps_ns: Int64s) -> NDArray[np.bool_]:
    """Stamps that lie far behind one of the next three: a lone message from the future.

    A live robot drops them because it knows what time it is; a recording knows it from what follows. Where a
    clock is set back, the last few messages before it look the same and go as well.
    """
    odd = np.zeros(stamps_ns.size, dtype=np.bool_)
    for ahead in range(1, 4):
        odd[:-ahead] |= stamps_ns[:-ahead] - stamps_ns[ahead:] > MAX_REORDER_NS
    return odd


def clock_windows(jumps_ns: Sequence[int]) -> list[Window]:
    """Windows between the receive times at which streams ran anew; near ones count as one jump."""
    windows = []
    start = -_FOREVER
    ordered = sorted(jumps_ns)
    for number, jump in enumerate(ordered):
        if number and jump - ordered[number - 1] <= _SAME_JUMP_NS:
            start = jump
            continue
        windows.append(Window(start, jump))
        start = jump
    windows.append(Window(start, _FOREVER))
    return windows


def live_stretches(
    streams: Mapping[str, Recorded], max_gap_ns: int, start_ns: int | None, end_ns: int | None
) -> list[tuple[int, int]]:
    """Where all streams are there, with no gap longer than `max_gap_ns` in any of them."""
    stretches = [(-_FOREVER if start_ns is None else start_ns, _FOREVER if end_ns is None else end_ns)]
    for stream in streams.values():
        if not stream.stamps_ns.size:
            return []
        edges = [int(stream.stamps_ns[0])]
        for gap in find_gaps(stream.stamps_ns, max_gap_ns):
            edges += [gap.start_ns, gap.end_ns]
        edges.append(int(stream.stamps_ns[-1]))
        own = list(zip(edges[::2], edges[1::2], strict=True))
        stretches = _intersect(stretches, own)
    return stretches


def _intersect(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    common = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start <= end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def runs(usable: NDArray[np.bool_]) -> list[slice]:
    """Stretches of true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], usable, [False]))))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def still_stretches(values: NDArray[np.float64], tolerance: float, moving: NDArray[np.bool_]) -> list[slice]:
    """Stretches in which every column stays within `tolerance` of its value at the stretch's first row.

    Rows marked as `moving` (the base walks, which no column shows) belong to none. Every row that is not
    moving belongs to one stretch, if only to one of a single row.
    """
    stretches: list[slice] = []
    start = 0
    while start < len(values):
        if moving[start]:
            start += 1
            continue
        end = start + _still_length(values[start:], tolerance, moving[start:])
        stretches.append(slice(start, end))
        start = end
    return stretches


def _still_length(values: NDArray[np.float64], tolerance: float, moving: NDArray[np.bool_]) -> int:
    """How many rows from the first one on stay with it; looked at in growing blocks, most stretches are
    short.
    """
    done, block = 1, 8
    while done < len(values):
        part = slice(done, done + block)
        away = (np.abs(values[part] - values[0]) > tolerance).any(axis=1) | moving[part]
        if away.any():
            return done + int(np.argmax(away))
        done, block = done + len(away), block * 2
    return len(values)


def split_at_pauses(
    values: NDArray[np.float64], tolerance: float, moving: NDArray[np.bool_], longest: int
) -> list[slice]:
    """Parts between pauses of more than `longest` rows; a pause is divided in its middle.

    Pauses at the ends divide nothing: they are idle ends.
    """
    cuts = [0]
    for still in still_stretches(values, tolerance, moving):
        if still.stop - still.start > longest and still.start > 0 and still.stop < len(values):
            cuts.append((still.start + still.stop) // 2)
    cuts.append(len(values))
    return [slice(a, b) for a, b in pairwise(cuts)]


def trim_idle(
    values: NDArray[np.float64], tolerance: float, moving: NDArray[np.bool_], margin: int
) -> slice | None:
    """The part from `margin` rows before the first motion to `margin` after the last; None where none moves.

    Before the first motion every column stays within `tolerance` of the first row, after the last one of the
    last.
    """
    length = len(values)
    leading = 0 if moving[0] else _still_length(values, tolerance, moving)
    if leading == length:
        return None
    trailing = 0 if moving[-1] else _still_length(values[::-1], tolerance, moving[::-1])
    return slice(max(0, leading - margin), min(length, length - trailing + margin))


def in_gaps(
    stamps_ns: Int64s, longer_than_ns: int, last_alive_ns: int | None, grid_ns: Int64s
) -> NDArray[np.bool_]:
    """Grid times that lie within a silence of a command stream that lasts longer than given.

    Silence after the stream's last message counts up to `last_alive_ns`, the last sign of another command.
    """
    inside = np.zeros(grid_ns.size, dtype=np.bool_)
    if not stamps_ns.size:
        return inside
    gaps = [(gap.start_ns, gap.end_ns) for gap in find_gaps(stamps_ns, longer_than_ns)]
    if last_alive_ns is not None and last_alive_ns - int(stamps_ns[-1]) > longer_than_ns:
        gaps.append((int(stamps_ns[-1]), last_alive_ns + 1))
    for start, end in gaps:
        inside |= (grid_ns > start) & (grid_ns < end)
    return inside
