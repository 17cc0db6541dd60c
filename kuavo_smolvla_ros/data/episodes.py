"""A recording becomes episodes: sampled causally on a uniform grid of header time, cut by stated rules.

The rules, in this order. A recording is left out as a whole where it cannot be read, was made with another
robot description, lacks a topic, or does not say what it shows. Each time a clock was set back separates it.
Markers, where there are any, bound episodes. A time without an observation (`robot/timeline`'s rule: age,
skew, a dead camera, values that are no numbers, broken pictures) ends an episode or rejects it (`on_gap`). A
long standstill separates two. Idle ends are cut off. What is then too short, or never moves, is left out.
Everything left out is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kuavo_smolvla_ros.data import recording_checks as checks
from kuavo_smolvla_ros.data.bag_frames import BagFrames
from kuavo_smolvla_ros.data.bags import Bag, BagError, open_bag
from kuavo_smolvla_ros.data.episode import Episode, Rejection
from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.gaps import gap, note_before_commands, note_faults, why_nothing
from kuavo_smolvla_ros.data.notes import NS_PER_S, Notes
from kuavo_smolvla_ros.data.pieces import Candidate, Cutter, Piece
from kuavo_smolvla_ros.data.recording_index import RecordingIndex, index_recording
from kuavo_smolvla_ros.data.sampling import Admitted, Sampler, Stretch
from kuavo_smolvla_ros.data.segments import (
    Window,
    clock_windows,
    live_stretches,
    odd_stamps,
    runs,
)
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.robot.description import RobotSpec

_COARSE_GAP_NS = 1_000_000_000  # a longer gap begins a new grid: stamps may lie years apart

Part = Episode | Rejection


def extract(
    bag_path: Path | str, spec: RobotSpec, settings: Mapping[str, Any] | EpisodeSettings
) -> list[Part] | Rejection:
    """All that a recording holds: episodes, and parts that are left out; or why it is left out as a whole."""
    chosen = settings if isinstance(settings, EpisodeSettings) else EpisodeSettings.from_mapping(settings)
    path = Path(bag_path)
    try:
        with open_bag(path) as bag:
            return _Extraction(bag, spec, chosen).run()
    except BagError as error:
        sentence = str(error).removeprefix(f"{path}: ")
        finding = Finding(Code.UNREADABLE, Severity.ERROR, sentence, path.name)
        return Rejection(path.name, sentence, (finding,))


class _Extraction:
    """One recording on its way."""

    def __init__(self, bag: Bag, spec: RobotSpec, settings: EpisodeSettings) -> None:
        self._bag = bag
        self._spec = spec
        self._settings = settings
        self._name = bag.path.name
        self._notes = Notes(spec, self._name)  # about the recording as a whole
        self._findings = self._notes.findings
        self._cutter = Cutter(spec.fps, settings, self._notes)

    def run(self) -> list[Part] | Rejection:
        unknown = sorted(set(self._settings.receive_stamped) - set(self._spec.streams))
        if unknown:
            known = ", ".join(self._spec.streams)
            raise UsageError(
                f"extract.receive_stamped: {self._spec.name} has no stream '{unknown[0]}'; it has {known}"
            )
        task, instruction, bad = checks.labels(self._bag, self._spec, self._settings)
        index = index_recording(
            self._bag, self._spec, self._settings.receive_stamped, self._settings.marker_topic
        )
        self._findings += checks.damages(self._bag, index)
        if bad:
            return self._reject(bad)
        bad = checks.topics(self._bag, index, self._spec)
        if bad:
            return self._reject(bad)
        self._findings += checks.faults(self._name, index)
        self._findings += self._clean(index)
        bad = checks.nothing_left(self._name, index)
        if bad:
            return self._reject(bad)
        sampler = self._prepare(index)
        candidates = self._candidates(index, sampler)
        self._findings += checks.stream_figures(self._name, self._spec, index, sampler, self._stretches)
        self._findings += checks.latencies(self._name, index, self._settings.backlog_s)
        return self._parts(candidates, index, task, instruction)

    def _reject(self, findings: Sequence[Finding]) -> Rejection:
        reason = "; ".join(f.sentence if f.topic is None else f"{f.topic}: {f.sentence}" for f in findings)
        return Rejection(self._name, reason, (*findings, *self._findings))

    def _clean(self, index: RecordingIndex) -> list[Finding]:
        """Drop messages without a stamp, and those with a stamp from nowhere; say which."""
        findings = []
        for record in index.streams.values():
            stamps, receive = record.stamps_ns, record.receive_ns
            empty = stamps <= 0
            if empty.any():
                findings.append(checks.unstamped(self._name, record, receive[empty], index))
                record.keep(~empty)
                stamps, receive = record.stamps_ns, record.receive_ns
            odd = odd_stamps(stamps)
            if odd.any():
                findings.append(checks.odd(self._name, record, stamps[odd], receive[odd], index))
                record.keep(~odd)
        return findings

    def _prepare(self, index: RecordingIndex) -> Sampler:
        admitted = {name: Admitted.of(record) for name, record in index.streams.items()}
        inputs = [a for n, a in admitted.items() if self._spec.streams[n].direction == "in"]
        firsts = [int(a.record.stamps_ns.min()) for a in inputs if len(a.record)]
        self._notes.origin_ns = min(firsts, default=0)
        jumps = [(jump, name) for name, a in admitted.items() for jump in a.jumps_ns]
        self._windows = clock_windows([jump for jump, _ in jumps])
        for window in self._windows[1:]:
            near = sorted(name for jump, name in jumps if abs(jump - window.start_ns) < 10 * NS_PER_S)
            topics = ", ".join(dict.fromkeys(index.streams[n].stream.topic for n in near))
            sentence = "the clock was set back here; nothing is sampled across"
            self._findings.append(
                Finding(
                    Code.CLOCK_JUMP,
                    Severity.WARNING,
                    sentence,
                    self._name,
                    topics,
                    window.start_ns,
                    (window.start_ns - (index.start_ns or 0)) / NS_PER_S,
                )
            )
        return Sampler(self._bag, self._spec, self._settings, admitted)

    def _candidates(self, index: RecordingIndex, sampler: Sampler) -> list[Candidate]:
        self._stretches: list[Stretch] = []
        candidates: list[Candidate] = []
        for window in self._windows:
            for span in self._spans(index, sampler, window):
                candidates += self._of_span(sampler, window, span)
        return candidates

    def _spans(
        self, index: RecordingIndex, sampler: Sampler, window: Window
    ) -> list[tuple[int | None, int | None]]:
        """Header times between which an episode may lie, by the markers; all of the window without any."""
        if not index.markers:
            return [(None, None)]
        inputs = [index.streams[name] for name in sampler.inputs]

        def header_time(receive_ns: int) -> int | None:
            """The newest stamp received by then: the recorder may lag, and have a clock of its own."""
            newest = []
            for record in inputs:
                known = window.holds(record.receive_ns) & (record.receive_ns <= receive_ns)
                if known.any():
                    newest.append(int(record.stamps_ns[known].max()))
            return max(newest, default=None)

        spans: list[tuple[int | None, int | None]] = []
        start: int | None = None
        is_open = False
        for marker in index.markers:
            if not window.start_ns <= marker.receive_ns < window.end_ns:
                continue
            if marker.text == "start":
                start, is_open = header_time(marker.receive_ns), True
            elif marker.text in ("stop", "discard") and is_open:
                is_open = False
                if marker.text == "stop":
                    spans.append((start, header_time(marker.receive_ns)))
                else:
                    self._notes.add(Code.DISCARDED, Severity.INFO, "marked to be discarded", None, start)
        if is_open:
            spans.append((start, None))
        return spans

    def _of_span(
        self, sampler: Sampler, window: Window, span: tuple[int | None, int | None]
    ) -> list[Candidate]:
        streams, _ = sampler.recorded(sampler.inputs, window)
        longest = max([_COARSE_GAP_NS, *(b.max_age_ns for b in sampler.budgets.values() if b.max_age_ns)])
        found: list[Piece] = []
        for start, end in live_stretches(streams, longest, *span):
            stretch = sampler.sample(window, start, end)
            self._stretches.append(stretch)
            found += [Piece(stretch, steps) for steps in runs(stretch.usable)]
            note_faults(self._notes, stretch)
        if self._settings.uncommanded == "trim":
            note_before_commands(self._notes, found, sampler, window, span[0])
        gaps = [gap(self._notes, a, b, streams) for a, b in pairwise(found)]
        self._findings += gaps
        least_s = self._settings.min_episode_s
        long_enough = [piece for piece in found if self._cutter.seconds(len(piece)) >= least_s]
        if self._settings.on_gap == "reject" and len(long_enough) > 1:
            whole = [g for g in gaps if long_enough[0].end_ns <= (g.time_ns or 0) <= long_enough[-1].start_ns]
            worst = max(whole, key=lambda g: (g.data or {}).get("seconds", 0.0))
            where = f"{worst.topic}: " if worst.topic else ""
            reason = f"has {len(whole)} gaps, and on_gap is reject; the longest: {where}{worst.sentence}"
            return [Candidate(long_enough[0], [], reason)]
        return [candidate for piece in found for candidate in self._cutter.cut(piece)]

    def _parts(
        self, candidates: list[Candidate], index: RecordingIndex, task: str, instruction: str
    ) -> list[Part] | Rejection:
        if not candidates:
            return self._reject([why_nothing(self._notes, self._stretches)])
        parts: list[Part] = []
        for number, candidate in enumerate(candidates, 1):
            source = self._name if len(candidates) == 1 else f"{self._name}#{number}"
            own = [replace(finding, bag=source) for finding in candidate.findings]
            findings = tuple([*self._findings, *own] if number == 1 else own)
            if candidate.reason is not None:
                at = (candidate.piece.start_ns - self._notes.origin_ns) / NS_PER_S
                parts.append(Rejection(source, f"{candidate.reason} (from {at:.1f} s on)", findings))
                continue
            parts.append(self._episode(source, candidate.piece, index, task, instruction, findings))
        return parts

    def _episode(
        self,
        source: str,
        piece: Piece,
        index: RecordingIndex,
        task: str,
        instruction: str,
        findings: tuple[Finding, ...],
    ) -> Episode:
        stretch, steps = piece.stretch, piece.steps
        frames = {}
        for role, camera in self._spec.cameras.items():
            record = index.streams[camera.stream]
            assert record.channel is not None
            places = np.ascontiguousarray(record.places[stretch.chosen[camera.stream][steps]])
            frames[role] = BagFrames(self._bag.path, record.channel, camera, places, self._bag.unpacked)
        return Episode(
            source=source,
            task=task,
            instruction=instruction,
            fps=self._spec.fps,
            stamps_ns=stretch.grid_ns[steps],
            state=stretch.state[steps].astype(np.float32),
            action=stretch.action[steps].astype(np.float32),
            frames=frames,
            findings=findings,
        )


__all__ = ["EpisodeSettings", "extract"]
