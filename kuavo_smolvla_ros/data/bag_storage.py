"""What the readers of the three file formats have in common.

Each walks its file from front to back and says where every message lies, so that a recording is gone through
once for its stamps and later only the messages that are used are read again, by place. Walking needs no
index, hence a recording that was cut off or never indexed is read by the same code, up to where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from kuavo_smolvla_ros.errors import UserError


class BagError(UserError):
    """A recording that cannot be read; names the file."""


@dataclass(frozen=True)
class Channel:
    """One publisher's messages in one file."""

    id: int
    topic: str
    type: str  # in the style of ROS 2: sensor_msgs/msg/JointState
    definition: str  # as embedded in the file; empty where the file has none
    definition_format: str  # "msg", "idl" or ""
    serialization: str  # "cdr" or "ros1"


class Place(NamedTuple):
    """Where a message lies in a file: in which container, and where in that."""

    container: int
    offset: int
    length: int


class Entry(NamedTuple):
    """A message met while walking. `data` is only valid until the next one."""

    channel: Channel
    receive_ns: int
    data: memoryview
    place: Place


@dataclass(frozen=True)
class Damage:
    """Something in a file that could not be read, and from which receive time on where that is known."""

    file: str
    sentence: str
    receive_ns: int | None = None


@dataclass
class Contents:
    """What is known of a file besides its messages; walking it adds what it meets."""

    channels: dict[int, Channel] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)

    def damage(self, path: Path, sentence: str, receive_ns: int | None = None) -> None:
        """Note it once. Whoever looks at the topics only does not know the time yet; reading tells it."""
        for number, known in enumerate(self.damages):
            if known.sentence == sentence:
                if known.receive_ns is None:
                    self.damages[number] = Damage(path.name, sentence, receive_ns)
                return
        self.damages.append(Damage(path.name, sentence, receive_ns))


Wanted = Callable[[Channel], bool]


class Storage(Protocol):
    """One file, open. Not locked: every thread opens its own."""

    contents: Contents

    def scan(self, wanted: Wanted) -> Iterator[Entry]:
        """Messages of the wanted channels in the order in which they were written."""
        ...

    def read(self, place: Place) -> bytes:
        """The message at a place that `scan` gave."""
        ...

    def close(self) -> None: ...


def everything(_: Channel) -> bool:
    return True


def nothing(_: Channel) -> bool:
    return False
