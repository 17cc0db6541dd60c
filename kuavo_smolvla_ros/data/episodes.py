"""A recording becomes episodes: sampled causally on a uniform grid of header time, cut by stated rules.

The rules, in this order. A recording is left out as a whole where it cannot be read, was made with another
robot description, lacks a topic, or does not say what it shows. Each time a clock was set back separates it.
Markers, where there are any, bound episodes. A time without an observation (`robot/timeline`'s rule: age,
skew, a dead camera, values that are no numbers, broken pictures) ends an episode or rejects it (`on_gap`). A
long standstill separates two. Idle ends are cut off. What is then too short, or never moves, is left out.
Everything left out is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from kuavo_smolvla_ros.data.recording_index import RecordingIndex, index_recording
from kuavo_smolvla_ros.data.sampling import Admitted, Cause, Sampler, Stretch
from kuavo_smolvla_ros.data.segments import (
    Window,
    clock_windows,
    live_stretches,
    odd_stamps,
    runs,
    split_at_pauses,
    trim_idle,
)
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.robot.description import RobotSpec

_COARSE_GAP_NS = 1_000_000_000  # a longer gap begins a new grid: stamps may lie years apart
_SLIVER_S = 0.5  # shorter usable times are counted, not listed
NS_PER_S = 1_000_000_000

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


@dataclass(frozen=True)
class _Run:
    """Consecutive usable grid steps."""

    stretch: Stretch
    steps: slice

    @property
    def start_ns(self) -> int:
        return int(self.stretch.grid_ns[self.steps.start])

    @property
    def end_ns(self) -> int:
        return int(self.stretch.grid_ns[self.steps.stop - 1])

    def __len__(self) -> int:
        return self.steps.stop - self.steps.start

    def part(self, inner: slice) -> _Run:
        return _Run(self.stretch, slice(self.steps.start + inner.start, self.steps.start + inner.stop))


@dataclass
class _Candidate:
    """An episode to be, or the reason why it is none."""

    run: _Run
    findings: list[Finding]
    reason: str | None = None


class _Extraction:
    """One recording on its way."""

    def __init__(self, bag: Bag, spec: RobotSpec, settings: EpisodeSettings) -> None:
        self._bag = bag
        self._spec = spec
        self._settings = settings
        self._name = bag.path.name
        self._findings: list[Finding] = []  # about the recording as a whole
        self._origin_ns = 0

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
        self._origin_ns = min(firsts, default=0)
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

    def _candidates(self, index: RecordingIndex, sampler: Sampler) -> list[_Candidate]:
        self._stretches: list[Stretch] = []
        candidates: list[_Candidate] = []
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
                    self._find(Code.DISCARDED, Severity.INFO, "marked to be discarded", None, start)
        if is_open:
            spans.append((start, None))
        return spans

    def _of_span(
        self, sampler: Sampler, window: Window, span: tuple[int | None, int | None]
    ) -> list[_Candidate]:
        streams, _ = sampler.recorded(sampler.inputs, window)
        longest = max([_COARSE_GAP_NS, *(b.max_age_ns for b in sampler.budgets.values() if b.max_age_ns)])
        found: list[_Run] = []
        for start, end in live_stretches(streams, longest, *span):
            stretch = sampler.sample(window, start, end)
            self._stretches.append(stretch)
            found += [_Run(stretch, steps) for steps in runs(stretch.usable)]
            self._note_faults(stretch)
        self._note_before_commands(found, sampler, window, span)
        gaps = [self._gap(a, b, sampler, streams) for a, b in pairwise(found)]
        self._findings += gaps
        long_enough = [run for run in found if self._seconds(len(run)) >= self._settings.min_episode_s]
        if self._settings.on_gap == "reject" and len(long_enough) > 1:
            whole = [g for g in gaps if long_enough[0].end_ns <= (g.time_ns or 0) <= long_enough[-1].start_ns]
            worst = max(whole, key=lambda g: (g.data or {}).get("seconds", 0.0))
            where = f"{worst.topic}: " if worst.topic else ""
            reason = f"has {len(whole)} gaps, and on_gap is reject; the longest: {where}{worst.sentence}"
            return [_Candidate(long_enough[0], [], reason)]
        return [candidate for run in found for candidate in self._of_run(run)]

    def _of_run(self, run: _Run) -> list[_Candidate]:
        rules = self._settings
        stretch, steps = run.stretch, run.steps
        values = np.concatenate([stretch.state[steps], stretch.action[steps]], axis=1)
        moving = stretch.moving[steps]
        parts = [slice(0, len(run))]
        if rules.max_pause_s is not None:
            longest = round(rules.max_pause_s * self._spec.fps)
            parts = split_at_pauses(values, rules.still_tolerance, moving, longest)
        candidates = []
        for part in parts:
            length = self._seconds(part.stop - part.start)
            if length < _SLIVER_S:
                continue
            own = run.part(part)
            findings: list[Finding] = []
            if len(parts) > 1 and part.start:
                sentence = f"a standstill of more than {rules.max_pause_s:g} s separates two episodes"
                findings.append(self._finding(Code.PART, Severity.INFO, sentence, None, own.start_ns))
            if length < rules.min_episode_s:
                candidates.append(self._short(own, findings))
                continue
            moved = trim_idle(
                values[part], rules.still_tolerance, moving[part], round(rules.idle_margin_s * self._spec.fps)
            )
            if moved is None:
                reason = f"nothing moves by more than {rules.still_tolerance:g} in its {length:.1f} s"
                findings.append(self._finding(Code.STATIC, Severity.ERROR, reason, None, own.start_ns))
                candidates.append(_Candidate(own, findings, reason))
                continue
            if rules.trim_idle:
                cut = self._seconds(moved.start), self._seconds(part.stop - part.start - moved.stop)
                if sum(cut):
                    sentence = (
                        f"cut off: {cut[0]:.1f} s before the first motion, {cut[1]:.1f} s after the last"
                    )
                    findings.append(self._finding(Code.TRIMMED, Severity.INFO, sentence, None, own.start_ns))
                own = own.part(moved)
            if self._seconds(len(own)) < rules.min_episode_s:
                candidates.append(self._short(own, findings))
            else:
                candidates.append(_Candidate(own, findings))
        return candidates

    def _short(self, run: _Run, findings: list[Finding]) -> _Candidate:
        seconds, least = self._seconds(len(run)), self._settings.min_episode_s
        reason = f"only {seconds:.1f} s can be used in one piece, at least {least:g} are asked for"
        findings.append(self._finding(Code.TOO_SHORT, Severity.ERROR, reason, None, run.start_ns))
        return _Candidate(run, findings, reason)

    def _parts(
        self, candidates: list[_Candidate], index: RecordingIndex, task: str, instruction: str
    ) -> list[Part] | Rejection:
        if not candidates:
            return self._reject([self._why_nothing()])
        parts: list[Part] = []
        for number, candidate in enumerate(candidates, 1):
            source = self._name if len(candidates) == 1 else f"{self._name}#{number}"
            own = [replace(finding, bag=source) for finding in candidate.findings]
            findings = tuple([*self._findings, *own] if number == 1 else own)
            if candidate.reason is not None:
                at = (candidate.run.start_ns - self._origin_ns) / NS_PER_S
                parts.append(Rejection(source, f"{candidate.reason} (from {at:.1f} s on)", findings))
                continue
            parts.append(self._episode(source, candidate.run, index, task, instruction, findings))
        return parts

    def _episode(
        self,
        source: str,
        run: _Run,
        index: RecordingIndex,
        task: str,
        instruction: str,
        findings: tuple[Finding, ...],
    ) -> Episode:
        stretch, steps = run.stretch, run.steps
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

    def _note_faults(self, stretch: Stretch) -> None:
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
            self._find(
                cause.code,
                Severity.WARNING,
                cause.sentence,
                cause.stream,
                int(stretch.grid_ns[step]),
                often[key],
            )

    def _note_before_commands(
        self, found: list[_Run], sampler: Sampler, window: Window, span: tuple[int | None, int | None]
    ) -> None:
        commands, _ = sampler.recorded(sampler.commands, window)
        inputs, _ = sampler.recorded(sampler.inputs, window)
        if self._settings.uncommanded != "trim" or any(not s.stamps_ns.size for s in inputs.values()):
            return
        begin = max(
            [int(s.stamps_ns[0]) for s in inputs.values()] + ([span[0]] if span[0] is not None else [])
        )
        for name, command in commands.items():
            if not command.stamps_ns.size:
                self._find(Code.NO_COMMAND, Severity.ERROR, "no command in this part", name, begin)
                continue
            late = (int(command.stamps_ns[0]) - begin) / NS_PER_S
            if late > _SLIVER_S and found and sampler.waits_for(name, window, begin):
                sentence = (
                    f"the first command comes after {late:.1f} s, which are cut off; "
                    "extract.uncommanded=measured keeps them, where the joints rest until then"
                )
                self._find(Code.NO_COMMAND, Severity.WARNING, sentence, name, begin)

    def _gap(self, before: _Run, after: _Run, sampler: Sampler, streams: Mapping[str, Any]) -> Finding:
        start = before.end_ns
        seconds = (after.start_ns - start) / NS_PER_S
        if before.stretch is after.stretch:
            cause = before.stretch.cause(after.steps.start - 1)  # what began it has grown clear by then
        else:
            cause = self._silence(start, after.start_ns, streams)
        sentence = f"{cause.sentence}; {seconds:.2f} s without an observation"
        return replace(
            self._finding(cause.code, Severity.WARNING, sentence, cause.stream or None, start),
            data={"seconds": seconds},
        )

    def _silence(self, start_ns: int, end_ns: int, streams: Mapping[str, Any]) -> Cause:
        """The stream that was silent the longest between two grids."""
        silent: tuple[int, str] = (0, "")
        for name, stream in streams.items():
            stamps = stream.stamps_ns
            inside = stamps[(stamps > start_ns) & (stamps < end_ns)]
            edges = np.concatenate(([start_ns], inside, [end_ns]))
            silent = max(silent, (int(np.diff(edges).max()), name))
        return Cause(Code.GAP, silent[1], f"no message for {silent[0] / NS_PER_S:.2f} s")

    def _why_nothing(self) -> Finding:
        """The most frequent reason at all grid times; or that the streams never overlap."""
        reasons: Counter[tuple[Code, str]] = Counter()
        first: dict[tuple[Code, str], tuple[int, str]] = {}
        for stretch in self._stretches:
            for step in np.flatnonzero(~stretch.usable)[:2000].tolist():
                cause = stretch.cause(step)
                key = (cause.code, cause.stream)
                reasons[key] += 1
                first.setdefault(key, (int(stretch.grid_ns[step]), cause.sentence))
        if not reasons:
            sentence = "the robot's streams have no time in common; see the spans and latencies of the topics"
            if self._stretches:
                sentence = f"no {_SLIVER_S:g} s in one piece can be used"
            return self._finding(Code.GAP, Severity.ERROR, sentence, None, None)
        (code, stream), _ = reasons.most_common(1)[0]
        time_ns, sentence = first[code, stream]
        return self._finding(code, Severity.ERROR, f"no episode: {sentence}", stream or None, time_ns)

    def _find(
        self,
        code: Code,
        severity: Severity,
        sentence: str,
        stream: str | None,
        time_ns: int | None,
        count: int = 1,
    ) -> None:
        self._findings.append(self._finding(code, severity, sentence, stream, time_ns, count))

    def _finding(
        self,
        code: Code,
        severity: Severity,
        sentence: str,
        stream: str | None,
        time_ns: int | None,
        count: int = 1,
    ) -> Finding:
        topic = self._spec.streams[stream].topic if stream else None
        at_s = None if time_ns is None else (time_ns - self._origin_ns) / NS_PER_S
        return Finding(code, severity, sentence, self._name, topic, time_ns, at_s, count)

    def _seconds(self, steps: int) -> float:
        return steps / self._spec.fps


__all__ = ["EpisodeSettings", "extract"]
