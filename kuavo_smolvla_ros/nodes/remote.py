"""Other nodes led from a program, as an operator leads them from a terminal: services, parameters, topics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from std_srvs.srv import Trigger

from kuavo_smolvla_ros.errors import UserError

POLL_S = 0.005
PATIENCE_S = 30.0
ANSWER_WITHIN_S = 10.0
ARRIVES_WITHIN_S = 2.0


class RemoteError(UserError):
    """A node did not come, did not answer, or refused."""


class Remote:
    """A node of its own, spun in a thread. `alive` is called while waiting, and may raise."""

    def __init__(self, domain: int | None = None, alive: Callable[[], None] = lambda: None) -> None:
        self._alive = alive
        self._context = Context()
        rclpy.init(context=self._context, domain_id=domain)
        self._node = rclpy.create_node("operator", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._clients: dict[tuple[type, str], Any] = {}
        self._publishers: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._spin, name="operator", daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        # The lock is for creating entities while another thread waits for messages.
        while not self._ending.wait(0.0005):
            with self._lock:
                self._executor.spin_once(timeout_sec=0.0)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """What the condition gives once it is true; `what` is for the sentence that says it never was."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            self._alive()
            if time.monotonic() > deadline:
                raise RemoteError(f"{what}: not within {timeout_s:g} s")
            time.sleep(POLL_S)
        return found

    def trigger(self, service: str) -> tuple[bool, str]:
        """Call a `std_srvs/Trigger`: whether it was done, and the answer."""
        answer = self._ask(Trigger, service, Trigger.Request())
        return bool(answer.success), str(answer.message)

    def set(self, node: str, **values: Any) -> None:
        """Set parameters of a node; refused ones are an error."""
        wanted = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        answer = self._ask(SetParameters, f"{node}/set_parameters", SetParameters.Request(parameters=wanted))
        for name, result in zip(values, answer.results, strict=True):
            if not result.successful:
                raise RemoteError(f"{node} refuses {name}={values[name]!r}: {result.reason}")

    def hear(self, kind: type, topic: str, take: Callable[[Any], None], qos: QoSProfile | int = 10) -> None:
        """Give every message of a topic to `take`, in the spinning thread."""
        with self._lock:
            self._node.create_subscription(kind, topic, take, qos)

    def say(self, topic: str, message: Any) -> None:
        """Publish one message, once somebody listens; returns when it has arrived."""
        with self._lock:
            if topic not in self._publishers:
                self._publishers[topic] = self._node.create_publisher(type(message), topic, 10)
        publisher = self._publishers[topic]
        self.wait(publisher.get_subscription_count, f"somebody who listens on {topic}")
        publisher.publish(message)
        publisher.wait_for_all_acked(Duration(seconds=ARRIVES_WITHIN_S))

    def _ask(self, kind: type, name: str, request: Any) -> Any:
        with self._lock:
            if (kind, name) not in self._clients:
                self._clients[kind, name] = self._node.create_client(kind, name)
        client = self._clients[kind, name]
        self.wait(client.service_is_ready, f"the service {name}")
        with self._lock:
            future = client.call_async(request)
        self.wait(future.done, f"the answer of {name}", ANSWER_WITHIN_S + PATIENCE_S)
        return future.result()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
