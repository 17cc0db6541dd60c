"""Records episodes: every stream of the robot as it comes over the wire, one recording each.

Nothing is decoded. Messages are taken from drained subscriptions with the time at which the middleware
received them, and a thread writes them. An episode begins by a service, when the robot's streams are all
there; task and instruction are parameters, set before.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger

from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata
from kuavo_smolvla_ros.data.task_file import find_task
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.diagnostics import Level, status
from kuavo_smolvla_ros.nodes.ears import DEPTH, Ears
from kuavo_smolvla_ros.nodes.message_definition import definition
from kuavo_smolvla_ros.nodes.parameters import Param, declare
from kuavo_smolvla_ros.nodes.recording import (
    Episode,
    Received,
    RecordingError,
    SimClock,
    StreamWatch,
    Topic,
    Written,
    free_gb,
    next_folder,
)
from kuavo_smolvla_ros.robot.audit import LOWEST_RATE_SHARE
from kuavo_smolvla_ros.robot.description import RobotSpec, Stream
from kuavo_smolvla_ros.robot.messages import build, stamp_fields
from kuavo_smolvla_ros.robot.serialized import peek_stamp_ns
from kuavo_smolvla_ros.robot.spec import load_spec

# The time of a message is the middleware's, so draining need not be often; it has to be within the depth.
DRAIN_S = 0.02
HELD_UP_S = 3.0  # for so long this process may be put aside without losing a message
REPORT_S = 1.0
MISSING_AFTER_S = 1.0
MB = 1_000_000
UINT32 = 0xFFFFFFFF
CLOCK = Stream(
    "simulated time", "/clock", "rosgraph_msgs/msg/Clock", "in", rate_hz=1000.0, max_age_s=math.inf
)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)

PARAMETERS = {
    "robot": Param("kuavo_sim", "robot description: a shipped name or a YAML file", fixed=True),
    "folder": Param("outputs/bags", "where episodes go, a folder for each", fixed=True),
    "task": Param("", "task of the next episode: one of the curriculum, a YAML file, or a name of your own"),
    "instruction": Param("", "sentence of the next episode; empty: the task's own"),
    "min_free_gb": Param(2.0, "GB left free: an episode ends when there are fewer", 0.0, 10000.0),
}


class RecorderNode(Node):
    """Plumbing between the robot's streams and an episode."""

    def __init__(self, **node_arguments: Any) -> None:
        super().__init__("recorder", **node_arguments)
        declare(self, PARAMETERS)
        self.spec: RobotSpec = load_spec(self._value("robot"))
        self.folder = Path(self._value("folder")).expanduser().absolute()
        self.episode: Episode | None = None
        self._streams = tuple(self.spec.streams.values())
        self._place = {stream.name: place for place, stream in enumerate(self._streams)}
        self._topics = tuple(Topic(s.topic, s.type, definition(s.type)) for s in self._streams)
        self._watches = tuple(StreamWatch() for _ in self._streams)
        self._sim_clock = SimClock() if self._value("use_sim_time") else None
        self._last = ""
        heard = {**self.spec.streams, **({} if self._sim_clock is None else {CLOCK.name: CLOCK})}
        depths = {s.name: max(DEPTH, math.ceil(s.rate_hz * HELD_UP_S)) for s in heard.values()}
        self._ears = Ears(f"{self.get_name()}_ears", self.get_namespace(), heard, self.context, depths)
        self._status_out = self.create_publisher(DiagnosticStatus, "~/status", LATCHED)
        self._diagnostics_out = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        for name, serve in (("start", self.start), ("stop", self.stop), ("discard", self.discard)):
            self.create_service(Trigger, f"~/{name}", self._service(serve))
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(DRAIN_S, self.drain, clock=steady)
        self.create_timer(REPORT_S, self._look, clock=steady)
        self.get_logger().info(
            f"records {self.spec.name} to {self.folder}; call {self.get_fully_qualified_name()}/start"
        )

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _now_ns(self) -> int:
        return max(0, int(self.get_clock().now().nanoseconds))

    # --- Messages

    def drain(self) -> None:
        """Take what has gathered."""
        now_s = time.monotonic()
        messages = list(self._ears.drain())
        if self._sim_clock is not None:
            for message in messages:
                if message.stream == CLOCK.name:
                    self._sim_clock.note(message.info["received_timestamp"], peek_stamp_ns(message.data))
        batch = []
        for message in messages:
            place, info = self._place.get(message.stream), message.info
            receive_ns, publish_ns = info["received_timestamp"], info["source_timestamp"]
            if self._sim_clock is not None:
                receive_ns = publish_ns = self._sim_clock.at(receive_ns)
            if place is None or receive_ns is None:
                continue  # the clock itself, or a time that has not begun
            sequence = info["publication_sequence_number"]
            self._watches[place].hear(receive_ns, sequence, now_s)
            batch.append(Received(place, receive_ns, publish_ns, sequence & UINT32, message.data))
        if self.episode is not None:
            self.episode.add(batch)

    # --- Services

    def _service(self, serve: Any) -> Any:
        def answer(_: Any, response: Any) -> Any:
            try:
                response.success, response.message = True, serve()
                self.get_logger().info(response.message)
            except UserError as error:
                response.success, response.message = False, str(error)
                self.get_logger().warning(response.message)
            self._last = response.message
            self._report()
            return response

        return answer

    def start(self) -> str:
        """Begin an episode, if everything is there that it needs."""
        if self.episode is not None:
            raise RecordingError(f"{self.episode.folder.name} is being recorded; stop or discard it first")
        task = self._value("task").strip()
        if not task:
            raise RecordingError(f"set the parameter 'task' of {self.get_fully_qualified_name()} first")
        named = find_task(task)
        task = task if named is None else named.name
        instruction = " ".join(self._value("instruction").split()) or (named and named.instruction)
        if not instruction:
            raise RecordingError(
                f"'{task}' has no sentence of its own; set the parameter 'instruction', or set 'task' to the "
                "task's YAML file"
            )
        self.drain()
        obstacles = [*self._missing(), *filter(None, [self._full()])]
        if obstacles:
            raise RecordingError("; ".join(obstacles))
        folder = next_folder(self.folder, task)
        now_ns = self._now_ns()
        for watch in self._watches:
            watch.begin(now_ns)
        self.episode = Episode(folder, self._topics, RecordingMetadata.of(self.spec, task, instruction))
        return f"recording {folder}: {instruction}"

    def stop(self) -> str:
        """End the episode and keep it."""
        episode = self._running()
        self.drain()
        self.episode = None
        return self._summary(episode, episode.finish())

    def discard(self) -> str:
        """End the episode and remove it."""
        episode = self._running()
        self.episode = None
        episode.discard()
        return f"discarded {episode.folder}"

    def _running(self) -> Episode:
        if self.episode is None:
            raise RecordingError("nothing is being recorded")
        return self.episode

    def _full(self) -> str | None:
        free, needed = free_gb(self.folder), self._value("min_free_gb")
        if free >= needed:
            return None
        return (
            f"{free:.2f} GB are free on the disk of {self.folder}, "
            f"{needed:g} must stay free (parameter min_free_gb)"
        )

    def _summary(self, episode: Episode, written: Written) -> str:
        parts = [
            f"recorded {episode.folder}: {written.seconds:.1f} s, {written.messages} messages, "
            f"{written.bytes / MB:.1f} MB"
        ]
        for place, stream in enumerate(self._streams):
            lost = self._lost(place)
            if not written.counts[place]:
                parts.append(f"nothing on {stream.topic}")
            elif lost:
                parts.append(f"{lost} messages lost on {stream.topic}")
        return "; ".join(parts)

    # --- Streams

    def _missing(self) -> list[str]:
        """What is not there that an episode needs, in sentences."""
        now_s = time.monotonic()
        found = []
        if self._sim_clock is not None and self._sim_clock.at(0) is None:
            found.append("/clock is silent, and use_sim_time is set")
        for place, stream in enumerate(self._streams):
            if not self._watches[place].is_silent(now_s, max(MISSING_AFTER_S, 5.0 / stream.rate_hz)):
                continue
            publishers = self.get_publishers_info_by_topic(stream.topic)
            types = sorted({info.topic_type for info in publishers} - {stream.type})
            if types:
                found.append(
                    f"{stream.topic} ({stream.name}) is published as {', '.join(types)}, not as {stream.type}"
                )
            elif stream.direction == "in":
                why = "is published but silent" if publishers else "is published by nobody"
                found.append(f"{stream.topic} ({stream.name}) {why}")
            elif not publishers and stream.gate is None:
                # Commands may pause; but where nobody could ever send one there is no action to learn.
                found.append(f"{stream.topic} ({stream.name}) is published by nobody, so there is no action")
        return found

    def _lost(self, place: int) -> int | None:
        """Messages lost on the way; None where several publishers count on their own."""
        several = self.count_publishers(self._streams[place].topic) > 1
        return None if several else self._watches[place].lost

    def _slow(self, stream: Stream, watch: StreamWatch) -> bool:
        return stream.direction == "in" and watch.rate_hz < LOWEST_RATE_SHARE * stream.rate_hz

    # --- Telling

    def _look(self) -> None:
        """Once a second: rates, gaps, the disk."""
        now_ns = self._now_ns()
        for watch in self._watches:
            watch.rate(now_ns)
        episode = self.episode
        trouble = None if episode is None else episode.error or self._full()
        if trouble is not None:
            self._last = f"the episode was ended: {trouble}; {self._ended()}"
            self.get_logger().error(self._last)
        self._report()

    def _ended(self) -> str:
        try:
            return self.stop()
        except RecordingError as error:
            return str(error)

    def _report(self) -> None:
        message = self._status()
        self._status_out.publish(message)
        array = build(DiagnosticArray, stamp_fields(self._now_ns()))
        array.status = [message]
        self._diagnostics_out.publish(array)

    def _status(self) -> DiagnosticStatus:
        episode = self.episode
        values: dict[str, Any] = {
            "robot": self.spec.name,
            "fingerprint": self.spec.fingerprint,
            "recording": episode.folder.name if episode is not None else "",
            "free_gb": f"{free_gb(self.folder):.1f}",
            "last": self._last,
        }
        if episode is not None:
            written = episode.written
            values["seconds"] = f"{written.seconds:.1f}"
            values["megabytes"] = f"{written.bytes / MB:.1f}"
            values["waiting_megabytes"] = f"{episode.backlog_bytes / MB:.1f}"
        slow = []
        for place, (stream, watch) in enumerate(zip(self._streams, self._watches, strict=True)):
            lost = self._lost(place)
            values |= {
                f"{stream.name}.hz": f"{watch.rate_hz:.1f}",
                f"{stream.name}.count": watch.count,
                f"{stream.name}.longest_gap_ms": f"{watch.longest_gap_s * 1e3:.0f}",
                f"{stream.name}.lost": "several publishers" if lost is None else lost,
            }
            if self._slow(stream, watch):
                slow.append(f"{stream.name} {watch.rate_hz:.1f} of {stream.rate_hz:g} Hz")
        doing = f"recording {episode.folder.name}" if episode is not None else "waiting"
        text = f"{doing}; slow: {', '.join(slow)}" if slow else doing
        return status(f"{self.get_name()}: recorder", Level.WARN if slow else Level.OK, text, values)

    def close(self) -> None:
        """End an episode that is being recorded as if it had been stopped."""
        if self.episode is not None:
            self.get_logger().info(self._ended())
        self._ears.close()


def main(args: list[str] | None = None) -> int:
    # Signals are ours: rclpy's handlers would take the subscriptions away before the episode is ended.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    node = None
    executor = SingleThreadedExecutor()
    try:
        node = RecorderNode()
        executor.add_node(node)
        while not ending.is_set():
            executor.spin_once(timeout_sec=0.1)
    except (UserError, ValueError) as error:
        print(f"recorder_node: {error}", file=sys.stderr)
        return 1
    finally:
        if node is not None:
            node.close()
        executor.shutdown()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
