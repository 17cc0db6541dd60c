"""Listens to the live robot for a while and holds what it hears against the description."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.message_types import message_class
from kuavo_smolvla_ros.robot.audit import StreamAudit
from kuavo_smolvla_ros.robot.description import Condition, RobotSpec

DISCOVERY_S = 3.0
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class LiveAudit(Node):
    """Subscribes to all that comes in and to the preconditions; looks who listens to what goes out."""

    def __init__(self, spec: RobotSpec, sim_time: bool) -> None:
        clock = Parameter("use_sim_time", Parameter.Type.BOOL, sim_time)
        super().__init__("kuavo_check", parameter_overrides=[clock])
        self.spec = spec
        self.audits = {s.name: StreamAudit(spec, s) for s in spec.streams.values()}
        self.conditions: dict[str, Any] = {}
        for stream in spec.inputs.values():
            try:
                kind = message_class(stream.type)
            except UserError as error:
                self.audits[stream.name].add_fault(str(error))
                continue
            self.create_subscription(kind, stream.topic, self._listener(stream.name), qos_profile_sensor_data)
        for condition in spec.preconditions:
            # Said once and kept by the publisher for those who come later.
            self.create_subscription(
                message_class(condition.type), condition.topic, self._note(condition), LATCHED
            )

    def _listener(self, name: str) -> Callable[[Any], None]:
        return lambda message: self.audits[name].add(self.get_clock().now().nanoseconds, message)

    def _note(self, condition: Condition) -> Callable[[Any], None]:
        def note(message: Any) -> None:
            self.conditions[condition.name] = condition.path.value(message)

        return note

    def look_around(self) -> None:
        """Types that publishers offer, and for streams that go out who is there to listen or to interfere."""
        for audit in self.audits.values():
            topic = audit.stream.topic
            offers = sorted({info.topic_type for info in self.get_publishers_info_by_topic(topic)})
            if audit.stream.direction == "in":
                audit.found_type = ", ".join(offers) or None
                continue
            audit.expects_messages = False
            listeners = sorted({info.topic_type for info in self.get_subscriptions_info_by_topic(topic)})
            audit.found_type = ", ".join(listeners) or None
            if offers:
                audit.add_fault("another publisher commands this topic: stop it before the policy runs")

    def broken_preconditions(self) -> list[str]:
        problems = []
        for condition in self.spec.preconditions:
            if condition.name not in self.conditions:
                problems.append(f"{condition.name}: nothing on {condition.topic}; {condition.hint}")
            elif self.conditions[condition.name] != condition.equals:
                seen = self.conditions[condition.name]
                problems.append(f"{condition.name} is {seen}, needed is {condition.equals}; {condition.hint}")
        return problems


def listen(
    spec: RobotSpec, seconds: float, *, sim_time: bool = False
) -> tuple[dict[str, StreamAudit], list[str]]:
    """Audit the live robot for `seconds`, counted from when all streams were heard (or discovery gave up)."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = LiveAudit(spec, sim_time)
        inputs = [node.audits[name] for name in spec.inputs]
        _spin(node, DISCOVERY_S, until=lambda: all(a.stamps_ns for a in inputs))
        for audit in inputs:
            audit.forget_times()  # the gap before the last stream was discovered is ours, not the robot's
        _spin(node, seconds, until=lambda: False)
        node.look_around()
        return node.audits, node.broken_preconditions()
    finally:
        rclpy.try_shutdown()


def _spin(node: Node, seconds: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        rclpy.spin_once(node, timeout_sec=0.05)
