"""One side of the raw image test: `publish FRAMES` or `receive FRAMES`; prints what it counted as JSON."""

from __future__ import annotations

import array
import json
import select
import sys
import time

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

TOPICS = ("head_image", "left_image", "right_image")
QOS = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=10)
PERIOD_S = 1 / 30
PATIENCE_S = 20.0
WARM_UP = "warm-up"


def publish(frames: int) -> None:
    """Warm-up frames until told to go, so that discovery is not counted; then `frames` per camera."""
    node = rclpy.create_node("image_source")
    publishers = [node.create_publisher(Image, topic, QOS) for topic in TOPICS]
    pixels = array.array("B", bytes(640 * 480 * 3))
    message = Image(height=480, width=640, encoding="rgb8", step=640 * 3, data=pixels)

    def send() -> None:
        for publisher in publishers:
            publisher.publish(message)

    message.header.frame_id = WARM_UP
    give_up = time.monotonic() + PATIENCE_S
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        send()
        if time.monotonic() > give_up:
            raise SystemExit("nobody said go")
    message.header.frame_id = ""
    start = time.monotonic()
    for frame in range(frames):
        send()
        time.sleep(max(0.0, start + (frame + 1) * PERIOD_S - time.monotonic()))
    print(json.dumps({"published": frames * len(TOPICS)}), flush=True)
    time.sleep(1.0)  # the last frames lie in this process's shared memory until they are read


def receive(frames: int) -> None:
    """Says `ready` when every camera's warm-up frames arrive, then counts the others."""
    node = rclpy.create_node("image_sink")
    counts = dict.fromkeys(TOPICS, 0)
    waiting = set(TOPICS)
    latest = time.monotonic()

    def take(topic: str, message: Image) -> None:
        nonlocal latest
        latest = time.monotonic()
        if message.header.frame_id == WARM_UP:
            if topic in waiting:
                waiting.remove(topic)
                if not waiting:
                    print("ready", flush=True)
        else:
            counts[topic] += len(message.data) == 640 * 480 * 3

    for topic in TOPICS:
        node.create_subscription(Image, topic, lambda m, topic=topic: take(topic, m), QOS)
    while min(counts.values()) < frames and time.monotonic() < latest + (PATIENCE_S if waiting else 2.0):
        rclpy.spin_once(node, timeout_sec=0.05)
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    rclpy.init()
    try:
        {"publish": publish, "receive": receive}[sys.argv[1]](int(sys.argv[2]))
    except (KeyboardInterrupt, ExternalShutdownException):
        sys.exit(1)
    finally:
        rclpy.try_shutdown()
