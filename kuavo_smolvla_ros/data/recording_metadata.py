"""What a recorder writes into a recording besides messages: task, instruction, and which robot it was.

In MCAP it is a metadata record named `RECORD`, written before the first message so that a recording cut off
later still has it; in rosbag2's metadata.yaml the same keys, each with `RECORD.` in front, stand in
`custom_data`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.description import RobotSpec, fingerprint, identity_difference

RECORD = "kuavo_smolvla_ros"
VERSION = "1"


@dataclass(frozen=True)
class RecordingMetadata:
    """Task and instruction of a recording, and the identity of the description it was made under."""

    task: str
    instruction: str
    robot: str
    identity: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def of(cls, spec: RobotSpec, task: str, instruction: str) -> RecordingMetadata:
        return cls(task, instruction, spec.name, spec.identity, spec.fingerprint)

    def to_record(self) -> dict[str, str]:
        """For an MCAP metadata record named `RECORD`."""
        return {
            "version": VERSION,
            "task": self.task,
            "instruction": self.instruction,
            "robot": self.robot,
            "identity": json.dumps(dict(self.identity), sort_keys=True),
            "fingerprint": self.fingerprint,
        }

    def to_custom_data(self) -> dict[str, str]:
        """For `custom_data` in rosbag2's metadata.yaml."""
        return {f"{RECORD}.{key}": value for key, value in self.to_record().items()}

    def difference(self, spec: RobotSpec) -> str | None:
        """What makes the recording unfit for this description, in one sentence; None where nothing does."""
        return identity_difference(spec.identity, self.identity)


def read_recording_metadata(found: Mapping[str, str]) -> RecordingMetadata | None:
    """From `Bag.metadata`; None where the recording was made by another recorder."""
    ours = {key.removeprefix(f"{RECORD}."): v for key, v in found.items() if key.startswith(f"{RECORD}.")}
    if not ours:
        return None
    if ours.get("version") != VERSION:
        raise UserError(f"its metadata are of version {ours.get('version')}, this package reads {VERSION}")
    try:
        identity = json.loads(ours["identity"])
        metadata = RecordingMetadata(
            ours["task"], ours["instruction"], ours["robot"], identity, ours["fingerprint"]
        )
    except KeyError as error:
        raise UserError(f"its metadata lack '{error.args[0]}'") from None
    except json.JSONDecodeError as error:
        raise UserError(f"the identity in its metadata is no JSON: {error}") from None
    if fingerprint(identity) != metadata.fingerprint:
        raise UserError("the fingerprint in its metadata does not belong to the identity beside it")
    return metadata
