"""What keeps a time of a recording from use, in sentences: gaps, broken pictures, commands that come late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.notes import NS_PER_S, Notes
from kuavo_smolvla_ros.data.pieces import SLIVER_S, Piece
from kuavo_smolvla_ros.data.sampling import Cause, Sampler, Stretch
from kuavo_smolvla_ros.data.segments import Window
from kuavo_smolvla_ros.robot.grid import Recorded


def note_faults(notes: Notes, stretch: Stretch) -> None:
    """What could not be decoded, one finding per kind."""
    first: dict[tuple[Code, str, str], int] = {}
    often: Counter[tuple[Code, str, str]] = Counter()
    for step, cause in sorted(stretch.faults.items()):
        # Sentences differ by byte counts; the kind and its first sentence are what is worth a line.
        key = (cause.code, cause.stream, cause.sentence if cause.code is Code.WRONG_SIZE else "")
        first.setdefault(key, step)
        often[key] += 1
    for key, step in first.items():
        cause = stretch.faults[step]
        notes.add(
            cause.code,
            Severity.WARNING,
            cause.sentence,
            cause.stream,
            int(stretch.grid_ns[step]),
            often[key],
        )


def note_before_commands(
    notes: Notes, found: Sequence[Piece], sampler: Sampler, window: Window, start_ns: int | None
) -> None:
    """Time that is cut off because no command had come yet; `start_ns` is a marker's, where there is one."""
    commands, _ = sampler.recorded(sampler.commands, window)
    inputs, _ = sampler.recorded(sampler.inputs, window)
    if any(not stream.stamps_ns.size for stream in inputs.values()):
        return
    begin = max(int(stream.stamps_ns[0]) for stream in inputs.values())
    begin = begin if start_ns is None else max(begin, start_ns)
    for name, command in commands.items():
        if not command.stamps_ns.size:
            notes.add(Code.NO_COMMAND, Severity.ERROR, "no command in this part", name, begin)
            continue
        late = (int(command.stamps_ns[0]) - begin) / NS_PER_S
        if late > SLIVER_S and found and sampler.waits_for(name, window, begin):
            sentence = (
                f"the first command comes after {late:.1f} s, which are cut off; "
                "extract.uncommanded=measured keeps them, where the joints rest until then"
            )
            notes.add(Code.NO_COMMAND, Severity.WARNING, sentence, name, begin)


def gap(notes: Notes, before: Piece, after: Piece, streams: Mapping[str, Recorded]) -> Finding:
    """What lies between two pieces, and how long."""
    start = before.end_ns
    seconds = (after.start_ns - start) / NS_PER_S
    if before.stretch is after.stretch:
        cause = before.stretch.cause(after.steps.start - 1)  # what began it has grown clear by then
    else:
        cause = _silence(start, after.start_ns, streams)
    sentence = f"{cause.sentence}; {seconds:.2f} s without an observation"
    return replace(
        notes.finding(cause.code, Severity.WARNING, sentence, cause.stream or None, start),
        data={"seconds": seconds},
    )


def _silence(start_ns: int, end_ns: int, streams: Mapping[str, Recorded]) -> Cause:
    """The stream that was silent the longest between two grids."""
    silent: tuple[int, str] = (0, "")
    for name, stream in streams.items():
        stamps = stream.stamps_ns
        inside = stamps[(stamps > start_ns) & (stamps < end_ns)]
        edges = np.concatenate(([start_ns], inside, [end_ns]))
        silent = max(silent, (int(np.diff(edges).max()), name))
    return Cause(Code.GAP, silent[1], f"no message for {silent[0] / NS_PER_S:.2f} s")


def why_nothing(notes: Notes, stretches: Sequence[Stretch]) -> Finding:
    """The most frequent reason at all grid times; or that the streams never overlap."""
    reasons: Counter[tuple[Code, str]] = Counter()
    first: dict[tuple[Code, str], tuple[int, str]] = {}
    for stretch in stretches:
        for step in np.flatnonzero(~stretch.usable)[:2000].tolist():
            cause = stretch.cause(step)
            key = (cause.code, cause.stream)
            reasons[key] += 1
            first.setdefault(key, (int(stretch.grid_ns[step]), cause.sentence))
    if not reasons:
        sentence = "the robot's streams have no time in common; see the spans and latencies of the topics"
        if stretches:
            sentence = f"no {SLIVER_S:g} s in one piece can be used"
        return notes.finding(Code.GAP, Severity.ERROR, sentence, None, None)
    (code, stream), _ = reasons.most_common(1)[0]
    time_ns, sentence = first[code, stream]
    return notes.finding(code, Severity.ERROR, f"no episode: {sentence}", stream or None, time_ns)
