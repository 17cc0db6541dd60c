"""Subscriptions that are emptied on request instead of waking an executor for each message.

A robot sends more than a thousand messages a second, of which a policy uses a few. Waking rclpy's executor
for each costs more than all else a waiting node does. So these subscriptions belong to a node of their own
that is never spun: `drain` takes what has gathered, as serialized bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import rclpy
from rclpy.context import Context
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

from kuavo_smolvla_ros.nodes.message_types import message_class
from kuavo_smolvla_ros.robot.description import Stream

# Between two drains (10 ms) five messages of a 500 Hz stream gather; a process that was held up for a while
# must not lose the ones around the picture it is going to use.
DEPTH = 64


@dataclass(frozen=True)
class Heard:
    """One message as bytes."""

    stream: str
    data: bytes
    info: Mapping[str, int]
    """What the middleware says of it: `received_timestamp`, `source_timestamp` and more."""


class Ears:
    """Best-effort subscriptions to streams by name; `depths` are for those that must keep more than usual."""

    def __init__(
        self,
        name: str,
        namespace: str,
        streams: Mapping[str, Stream],
        context: Context | None,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        self._node = rclpy.create_node(
            name,
            namespace=namespace,
            context=context,
            use_global_arguments=False,
            start_parameter_services=False,
        )
        self.types = {s.name: message_class(s.type) for s in streams.values()}
        self._subscriptions = {
            s.name: self._node.create_subscription(
                self.types[s.name], s.topic, _never_called, _qos((depths or {}).get(s.name, DEPTH)), raw=True
            )
            for s in streams.values()
        }

    def drain(self) -> Iterator[Heard]:
        """Everything that arrived since the last call, stream by stream, in each in order of arrival."""
        for name, subscription in self._subscriptions.items():
            while True:
                with subscription.handle:
                    taken = subscription.handle.take_message(subscription.msg_type, True)
                if taken is None:
                    break
                yield Heard(name, *taken)

    def publishers(self, topic: str) -> list[str]:
        """Names of the nodes that publish a topic."""
        return [info.node_name for info in self._node.get_publishers_info_by_topic(topic)]

    def close(self) -> None:
        self._node.destroy_node()


def _qos(depth: int) -> QoSProfile:
    return QoSProfile(depth=depth, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)


def _never_called(message: object) -> None:
    raise AssertionError("a drained subscription was spun")
