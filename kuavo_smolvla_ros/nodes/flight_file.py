"""The flight recorder's file: MCAP with JSON, one message each for a period's inputs and for its decision.

Where a replay may begin there is a third, the executor's memory before that period. All three carry the
period's number as their sequence. Times in the file are the wall's, made from the monotonic clock, so that
they rise even where the robot's clock jumps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcap.writer import Writer

from kuavo_smolvla_ros.control.records import Decision, Inputs
from kuavo_smolvla_ros.control.serial import Memory, decision_to_plain, inputs_to_plain, to_plain

RECORD = "kuavo_smolvla_ros.flight"
VERSION = "2"  # 2: what a gate keeps from being executed
MEMORY, INPUTS, DECISION = "/flight/memory", "/flight/inputs", "/flight/decision"
# Packing a chunk holds up whoever waits for the interpreter; small ones take well below a millisecond.
CHUNK_BYTES = 128 * 1024


@dataclass(frozen=True, eq=False)
class Period:
    """One control period as it was."""

    inputs: Inputs
    decision: Decision
    memory: Memory | None = None
    """What the executor remembered before it; taken now and then only."""


def write(
    path: Path, periods: Sequence[Period], about: Mapping[str, str], wall_offset_ns: int
) -> Iterator[None]:
    """Write the periods to a new file, one at each step of this iterator; at its end all is on the disk.

    `wall_offset_ns` is the wall's time minus the monotonic one. The first period has to have a memory.
    """
    with path.open("xb") as stream:
        writer = Writer(stream, chunk_size=CHUNK_BYTES)
        writer.start(library="kuavo_smolvla_ros")
        writer.add_metadata(RECORD, {"version": VERSION, **about})
        channels = {}
        for topic in (MEMORY, INPUTS, DECISION):
            name = topic.removeprefix("/flight/")
            schema = writer.register_schema(f"kuavo_smolvla_ros/{name}", "jsonschema", b'{"type": "object"}')
            channels[topic] = writer.register_channel(topic, "json", schema)
        for number, period in enumerate(periods):
            time_ns = period.inputs.mono_ns + wall_offset_ns
            parts = {INPUTS: inputs_to_plain(period.inputs), DECISION: decision_to_plain(period.decision)}
            if period.memory is not None:
                parts = {MEMORY: to_plain(period.memory), **parts}
            for topic, plain in parts.items():
                data = json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()
                writer.add_message(channels[topic], time_ns, data, time_ns, sequence=number)
            yield
        writer.finish()
        stream.flush()
        os.fsync(stream.fileno())
