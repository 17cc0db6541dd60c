"""Which chunks may be used now: their own form, their order, and their distance from the measured pose."""

from __future__ import annotations

from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal, Terms, refuse
from kuavo_smolvla_ros.control.reasons import RefusalReason
from kuavo_smolvla_ros.control.records import JointSample
from kuavo_smolvla_ros.control.settings import Settings


class Intake:
    """Remembers what came before; `newest` is the key of the newest chunk that was accepted."""

    def __init__(self, settings: Settings) -> None:
        near = tuple(name for name in settings.pose_names if name in settings.chunk_names)
        self._near_in_sample = settings.places(settings.measured_names, near)
        self._terms = Terms(
            limits=settings.chunk_limits,
            fingerprint=settings.fingerprint,
            max_excess=settings.max_excess,
            pose_at=settings.places(settings.chunk_names, near),
            max_distance=settings.refuse_above,
            max_age_s=settings.chunk_max_age_s,
            max_ahead_s=settings.max_ahead_s,
            gates=settings.chunk_gates,
        )
        self.newest: tuple[int, int] | None = None
        self.not_before_ns: int | None = None

    def forget_before(self, ros_ns: int) -> None:
        """From now on, use nothing that was observed before this time."""
        self.newest, self.not_before_ns = None, ros_ns

    def refuse(self, chunk: ActionChunk, ros_ns: int, joints: JointSample) -> Refusal | None:
        """Why a chunk that has just arrived must not be used."""
        if self.not_before_ns is not None and chunk.stamp_ns < self.not_before_ns:
            detail = "from an observation before the last resume or clock jump"
            return Refusal(RefusalReason.STALE, detail, chunk.sequence)
        measured = joints.positions[self._near_in_sample]
        return refuse(chunk, self._terms, ros_ns, newest=self.newest, measured=measured)

    def refuse_waiting(self, chunk: ActionChunk, ros_ns: int, joints: JointSample) -> Refusal | None:
        """The same for a chunk that was accepted before and had to wait for its turn."""
        measured = joints.positions[self._near_in_sample]
        return refuse(chunk, self._terms, ros_ns, measured=measured)
