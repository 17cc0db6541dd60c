"""Pieces of a recording that can be used without a gap, and what they are cut into.

Standstills separate, idle ends go, and what is too short or never moves is left out by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.notes import Notes
from kuavo_smolvla_ros.data.sampling import Stretch
from kuavo_smolvla_ros.data.segments import split_at_pauses, trim_idle

SLIVER_S = 0.5  # shorter usable times are counted, not listed


@dataclass(frozen=True)
class Piece:
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

    def part(self, inner: slice) -> Piece:
        return Piece(self.stretch, slice(self.steps.start + inner.start, self.steps.start + inner.stop))


@dataclass
class Candidate:
    """An episode to be, or the reason why it is none."""

    piece: Piece
    findings: list[Finding]
    reason: str | None = None


class Cutter:
    """Cuts pieces into candidates for episodes, by the settings."""

    def __init__(self, fps: float, settings: EpisodeSettings, notes: Notes) -> None:
        self._fps = fps
        self._settings = settings
        self._notes = notes

    def cut(self, piece: Piece) -> list[Candidate]:
        rules = self._settings
        stretch, steps = piece.stretch, piece.steps
        values = np.concatenate([stretch.state[steps], stretch.action[steps]], axis=1)
        moving = stretch.moving[steps]
        parts = [slice(0, len(piece))]
        if rules.max_pause_s is not None:
            longest = round(rules.max_pause_s * self._fps)
            parts = split_at_pauses(values, rules.still_tolerance, moving, longest)
        candidates = []
        for part in parts:
            length = self.seconds(part.stop - part.start)
            if length < SLIVER_S:
                continue
            own = piece.part(part)
            findings: list[Finding] = []
            if len(parts) > 1 and part.start:
                sentence = f"a standstill of more than {rules.max_pause_s:g} s separates two episodes"
                findings.append(self._notes.finding(Code.PART, Severity.INFO, sentence, None, own.start_ns))
            if length < rules.min_episode_s:
                candidates.append(self._short(own, findings))
                continue
            moved = trim_idle(
                values[part], rules.still_tolerance, moving[part], round(rules.idle_margin_s * self._fps)
            )
            if moved is None:
                reason = f"nothing moves by more than {rules.still_tolerance:g} in its {length:.1f} s"
                findings.append(self._notes.finding(Code.STATIC, Severity.ERROR, reason, None, own.start_ns))
                candidates.append(Candidate(own, findings, reason))
                continue
            if rules.trim_idle:
                cut = self.seconds(moved.start), self.seconds(part.stop - part.start - moved.stop)
                if sum(cut):
                    sentence = (
                        f"cut off: {cut[0]:.1f} s before the first motion, {cut[1]:.1f} s after the last"
                    )
                    findings.append(
                        self._notes.finding(Code.TRIMMED, Severity.INFO, sentence, None, own.start_ns)
                    )
                own = own.part(moved)
            if self.seconds(len(own)) < rules.min_episode_s:
                candidates.append(self._short(own, findings))
            else:
                candidates.append(Candidate(own, findings))
        return candidates

    def _short(self, piece: Piece, findings: list[Finding]) -> Candidate:
        seconds, least = self.seconds(len(piece)), self._settings.min_episode_s
        reason = f"only {seconds:.1f} s can be used in one piece, at least {least:g} are asked for"
        findings.append(self._notes.finding(Code.TOO_SHORT, Severity.ERROR, reason, None, piece.start_ns))
        return Candidate(piece, findings, reason)

    def seconds(self, steps: int) -> float:
        return steps / self._fps
