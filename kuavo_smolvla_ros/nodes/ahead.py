"""Which pictures the next observation will be made of, known before that observation is.

An observation is made at the first time after the last one's steps that every stream has reached. So cameras
that run freely have delivered what it shows up to a period before it can be made, and cameras that expose
together deliver one after another: time in which their pictures can pass the vision encoder. Which pictures
those will be follows from the streams' rhythm:

1. each stream's first stamp at or after the due time is there, or is expected one period after another;
2. the last of these ends the wait, and the earliest stamp that is then the newest of its stream is the time
   of the observation (`timeline.Timeline.settled_ns`);
3. a camera's picture is named if it is the newest up to that time and no newer one is expected before it.

A quarter of the shortest camera period counts as the same moment: so much may stamps jitter. A camera that
breaks its rhythm makes the forecast wrong. That costs one encoding for nothing, never a wrong chunk: what an
observation shows is decided without this module, and a picture encoded ahead is used only where it is the one
shown (`inference.Thinker`).

All pictures of an observation were taken within the permitted skew, and the wait for it ends within a period.
More than these few tens of milliseconds cannot be gained, so a machine that takes longer than a camera's
period for one picture does not encode ahead at all: it would risk far more than it can gain.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Any, TypeVar

import numpy as np

from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.timeline import Sample, StreamBuffer

T = TypeVar("T")

INTERVALS = 8
TRIES = 4  # the first builds what is built at first use; of the others the best counts, on a busy machine too
JITTER_SHARE = 0.25


def camera_period_s(spec: RobotSpec) -> float:
    """Of the fastest camera, as described."""
    return min(1.0 / spec.streams[camera.stream].rate_hz for camera in spec.cameras.values())


def time_to_encode_s(runner: Any, spec: RobotSpec) -> float | None:
    """Seconds for one camera's picture, warm and undisturbed; None where all of them are encoded together.

    Builds what is built at first use: for single pictures, and for chunks of which some are encoded already.
    """
    images = {role: np.zeros((c.height, c.width, 3), np.uint8) for role, c in spec.cameras.items()}
    role, picture = next(iter(images.items()))
    took_s = []
    for number in range(-TRIES, 0):  # no picture that is encoded later bears a number below zero
        started = time.monotonic()
        if not runner.encode_camera(role, picture, number):
            return None
        took_s.append(time.monotonic() - started)
    best_s = min(took_s[1:])
    if best_s > camera_period_s(spec):
        return best_s
    limits = spec.limits(spec.state_names)
    for known in range(1, len(images) + 1):
        stamps = dict.fromkeys(list(images)[:known], -TRIES - 1)
        for name in stamps:
            runner.encode_camera(name, images[name], -TRIES - 1)
        runner.chunk(images, (limits.lower + limits.upper) / 2, "warm up", seed=0, stamps=stamps)
    return best_s


def period_ns(buffer: StreamBuffer[T]) -> int | None:
    """Mean distance of a stream's newest stamps; None while there is only one."""
    newest = buffer.stamps[-INTERVALS - 1 :]
    return None if len(newest) < 2 else (newest[-1] - newest[0]) // (len(newest) - 1)


def next_pictures(
    buffers: Mapping[str, StreamBuffer[T]], cameras: Collection[str], due_ns: int
) -> dict[str, Sample[T]]:
    """What is here of the pictures that the first observation at or after `due_ns` will show, by stream.

    `buffers` are the streams an observation waits for, `cameras` those among them that hold pictures. Nothing
    while a stream's rhythm is not known, or while every camera will deliver another picture before that.
    """
    periods = {}
    for name, buffer in buffers.items():
        period = period_ns(buffer)
        if period is None:
            return {}
        periods[name] = period
    slack = round(JITTER_SHARE * min(periods[name] for name in cameras))
    if all(buffers[name].stamps[-1] + periods[name] + slack < due_ns for name in cameras):
        return {}
    t_ns = _observation_ns(buffers, periods, due_ns, slack)
    # Cameras that expose together do so at slightly other stamps than expected.
    seen = [stamp for name in cameras for stamp in _from(buffers[name], due_ns) if abs(stamp - t_ns) <= slack]
    t_ns = min(seen, key=lambda stamp: abs(stamp - t_ns), default=t_ns)
    found = {}
    for name in cameras:
        sample, newest = buffers[name].asof(t_ns), buffers[name].stamps[-1]
        if sample is not None and (newest > t_ns or newest + periods[name] > t_ns + slack):
            found[name] = sample
    return found


def _observation_ns(
    buffers: Mapping[str, StreamBuffer[T]], periods: Mapping[str, int], due_ns: int, slack: int
) -> int:
    firsts = {name: _first(buffer, periods[name], due_ns) for name, buffer in buffers.items()}
    end = max(firsts.values()) + slack
    reached = []
    for name, first in firsts.items():
        known = max(first, buffers[name].stamps[-1])
        reached.append(known + max(0, end - known) // periods[name] * periods[name])
    return min(reached)


def _from(buffer: StreamBuffer[T], t_ns: int) -> Sequence[int]:
    return buffer.stamps[bisect_left(buffer.stamps, t_ns) :]


def _first(buffer: StreamBuffer[T], period: int, due_ns: int) -> int:
    """The stream's first stamp from the due time on."""
    here = _from(buffer, due_ns)
    if here:
        return here[0]
    newest = buffer.stamps[-1]
    return newest + max(1, ceil((due_ns - newest) / period)) * period
