"""What the robot sees now: messages taken as bytes, ordered by their own stamps, decoded only when used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.serialization import deserialize_message

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.ahead import next_pictures
from kuavo_smolvla_ros.nodes.diagnostics import seconds
from kuavo_smolvla_ros.nodes.ears import Ears
from kuavo_smolvla_ros.nodes.stream_watch import StreamFigures, StreamWatch
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.images import decode_image
from kuavo_smolvla_ros.robot.serialized import peek_stamp_ns, serialized_digest, starts_with_header
from kuavo_smolvla_ros.robot.timeline import NoObservation, Observation, Reason, Sample, Timeline
from kuavo_smolvla_ros.robot.vectors import decode_state


@dataclass(frozen=True)
class Decoded:
    """An observation as the policy takes it."""

    t_ns: int
    state: np.ndarray
    images: dict[str, np.ndarray]
    newest_image_ns: int


class Observer:
    """Feeds a timeline from a robot's inputs. `listen` and `latest` belong to one thread, `decode` to any."""

    def __init__(self, spec: RobotSpec, ears: Ears, frozen_after_s: float | None) -> None:
        self.spec = spec
        self._ears = ears
        self._timeline: Timeline[bytes] = Timeline.for_inputs(spec, max_frozen_s=frozen_after_s)
        self._cameras = {camera.stream for camera in spec.cameras.values()}
        self._pictures = self._cameras if frozen_after_s else set()
        self._waited_for = {
            name: buffer
            for name, buffer in self._timeline.buffers.items()
            if self._timeline.budgets[name].max_age_ns is not None
        }
        for name, stream in spec.inputs.items():
            if stream.stamp == "header" and not starts_with_header(ears.types[name]()):
                raise UserError(
                    f"stream '{name}': {stream.type} does not begin with a header; use stamp: receive"
                )
        self.bad: dict[str, str] = {}
        self.skew_ns: int | None = None
        """Of the newest observation that was asked for, or of what stood in its way."""
        self._watch = StreamWatch(self._timeline.budgets)

    def listen(self, now_ns: int) -> None:
        """Take in all that arrived. A message without a readable stamp is noted and left out."""
        for heard in self._ears.drain():
            try:
                receive = self.spec.streams[heard.stream].stamp == "receive"
                stamp_ns = now_ns if receive else peek_stamp_ns(heard.data)
            except MessageError as error:
                self.bad[heard.stream] = str(error)
                continue
            digest = serialized_digest(heard.data) if heard.stream in self._pictures else None
            self._timeline.push(heard.stream, stamp_ns, heard.data, digest, now_ns)

    def latest(self, now_ns: int) -> Observation[bytes] | NoObservation:
        """The newest observation that later arrivals cannot change, or why there is none."""
        outcome = self._timeline.latest(now_ns)
        if isinstance(outcome, Observation):
            self.skew_ns = outcome.skew_ns
        elif outcome.reason is Reason.SKEWED:
            self.skew_ns = outcome.problems[0].measured_ns
        return outcome

    def pictures_ahead(self, due_ns: int) -> dict[str, Sample[bytes]]:
        """What is here of the pictures that the next observation from then on will show, by camera role."""
        found = next_pictures(self._waited_for, self._cameras, due_ns)
        return {role: found[c.stream] for role, c in self.spec.cameras.items() if c.stream in found}

    def forget(self) -> None:
        """Start anew, as after the clock was set."""
        self._timeline.clear()

    def figures(self, now_ns: int) -> dict[str, StreamFigures]:
        """How each stream does, for who wants to know why there is no observation."""
        return self._watch.look(self._timeline.buffers, now_ns)

    def decode(
        self, observation: Observation[bytes], ready: Mapping[str, np.ndarray] | None = None
    ) -> Decoded:
        """Bytes to vectors and pictures; a broken message is an error that names stream and fault.

        `ready` are pictures of this observation that were decoded before (`decode_picture`), by role.
        """
        messages = {
            name: self._deserialized(name, sample.item)
            for name, sample in observation.samples.items()
            if name not in self._cameras
        }
        images = dict(ready or {})
        for role, camera in self.spec.cameras.items():
            if role not in images:
                images[role] = self.decode_picture(role, observation.samples[camera.stream].item)
        return Decoded(
            t_ns=observation.t_ns,
            state=decode_state(self.spec, messages),
            images=images,
            newest_image_ns=max(observation.samples[c.stream].stamp_ns for c in self.spec.cameras.values()),
        )

    def decode_picture(self, role: str, data: bytes) -> np.ndarray:
        """The picture in one camera's message."""
        message = self._deserialized(self.spec.cameras[role].stream, data)
        try:
            return decode_image(message)
        except UserError as error:
            raise MessageError(f"camera '{role}': {error}") from None

    def _deserialized(self, stream: str, data: bytes) -> Any:
        try:
            return deserialize_message(data, self._ears.types[stream])
        except Exception as error:  # the middleware raises its own for bytes it cannot read
            raise MessageError(f"stream '{stream}': {error}") from None


def stream_values(observer: Observer, now_ns: int) -> dict[str, Any]:
    """What diagnostics tell of the streams."""
    figures = observer.figures(now_ns)
    values: dict[str, Any] = {
        "skew_s": seconds(observer.skew_ns),
        "dead_streams": ", ".join(name for name, stream in figures.items() if stream.dead),
    }
    for name, stream in figures.items():
        values[f"{name}.rate_hz"] = "" if stream.rate_hz is None else round(stream.rate_hz, 1)
        values[f"{name}.age_s"] = seconds(stream.age_ns)
        values[f"{name}.dead"] = stream.dead
        values[f"{name}.received"] = stream.received
    return values | {f"{stream}.bad": text for stream, text in observer.bad.items()}
