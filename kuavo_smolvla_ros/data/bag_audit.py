"""A recording held against a description, stream by stream; what `kuavo-smolvla check --bag` shows."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.robot.audit import StreamAudit
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.fields import MessageError


def audit_bag(spec: RobotSpec, path: Path) -> tuple[dict[str, StreamAudit], list[str]]:
    """Feed a recording through one audit per stream; with them, what of the recording cannot be read."""
    audits = {s.name: StreamAudit(spec, s) for s in spec.streams.values()}
    by_topic = {audit.stream.topic: audit for audit in audits.values()}
    with open_bag(path) as bag:
        for topic, audit in by_topic.items():
            audit.found_type = bag.types.get(topic)
        fitting = {t for t, audit in by_topic.items() if audit.found_type == audit.stream.type}
        for message in bag.messages(fitting):
            audit = by_topic[message.topic]
            try:
                audit.add(message.receive_ns, message.decode())
            except MessageError as error:
                audit.add_fault(str(error))
        damages = [f"{damage.file}: {damage.sentence}" for damage in bag.damages]
    return audits, damages
