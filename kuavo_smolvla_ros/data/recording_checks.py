"""Judgements about a recording as a whole: what it says of itself, its topics, how its messages came."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data import stream_figures as figures_of
from kuavo_smolvla_ros.data.bags import Bag
from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.recording_index import RecordingIndex, StreamRecord, used_streams
from kuavo_smolvla_ros.data.recording_metadata import read_recording_metadata
from kuavo_smolvla_ros.data.sampling import Admitted, Sampler, Stretch
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.spec import load_spec, spec_names

NS_PER_S = 1_000_000_000
_LOWEST_RATE_SHARE = 0.8  # as `kuavo-smolvla check` judges
_FUTURE_S = 0.02  # clocks kept by NTP agree better than this
_CLOCK_OFFSET_S = 1.0  # no transport takes this long for every single message


def labels(bag: Bag, spec: RobotSpec, settings: EpisodeSettings) -> tuple[str, str, list[Finding]]:
    """Task and instruction, and why the recording must be left out: another robot, or no task given."""
    name = bag.path.name
    task, instruction = settings.task, settings.instruction
    try:
        metadata = read_recording_metadata(bag.metadata)
    except UserError as error:
        return "", "", [Finding(Code.OTHER_ROBOT, Severity.ERROR, str(error), name)]
    if metadata is not None:
        difference = metadata.difference(spec)
        if difference is not None:
            sentence = f"recorded as {metadata.robot}, which is another robot than {spec.name}: {difference}"
            return "", "", [Finding(Code.OTHER_ROBOT, Severity.ERROR, sentence, name)]
        task, instruction = task or metadata.task, instruction or metadata.instruction
    missing = [what for what, value in (("task", task), ("instruction", instruction)) if not value]
    if missing:
        settings_text = " and ".join(f"extract.{what}" for what in missing)
        sentence = f"the recording does not say its {' and '.join(missing)}; give {settings_text}"
        return "", "", [Finding(Code.NO_TASK, Severity.ERROR, sentence, name)]
    return str(task), str(instruction), []


def damages(bag: Bag, index: RecordingIndex) -> list[Finding]:
    return [
        Finding(
            Code.DAMAGED,
            Severity.WARNING,
            f"{damage.file}: {damage.sentence}",
            bag.path.name,
            None,
            damage.receive_ns,
            _since(damage.receive_ns, index),
        )
        for damage in bag.damages
    ]


def topics(bag: Bag, index: RecordingIndex, spec: RobotSpec) -> list[Finding]:
    """Topics that are missing or carry another type; with a hint at what would fit."""
    found = []
    name = bag.path.name
    types = bag.types
    if not types:
        return [Finding(Code.EMPTY, Severity.ERROR, "the recording is empty: it has no topic", name)]
    for record in index.streams.values():
        stream = record.stream
        if record.other_types and record.channel is None:
            sentence = f"its type is {', '.join(sorted(record.other_types))}, declared is {stream.type}"
            found.append(Finding(Code.WRONG_TYPE, Severity.ERROR, sentence, name, stream.topic))
        elif record.channel is None:
            others = {topic: kind for topic, kind in types.items() if topic not in _topics(spec)}
            alike = difflib.get_close_matches(stream.topic, others, 2, 0.6)
            alike = alike or [topic for topic, kind in others.items() if kind == stream.type][:3]
            hint = f"; there is {', '.join(alike)}" if alike else ""
            if stream.topic in types:
                sentence = "the topic is there, but no message was recorded"
            else:
                sentence = f"the topic is missing{hint}"
            found.append(Finding(Code.MISSING_TOPIC, Severity.ERROR, sentence, name, stream.topic))
    has_none = all(record.channel is None for record in index.streams.values())
    if found and has_none and next(bag.messages(), None) is None:
        return [Finding(Code.EMPTY, Severity.ERROR, "the recording is empty: it has no message", name)]
    if found and (fitting := _fitting_description(types, spec)):
        found[0] = Finding(
            found[0].code,
            Severity.ERROR,
            f"{found[0].sentence}; the description '{fitting}' fits this recording",
            name,
            found[0].topic,
        )
    return found


def _topics(spec: RobotSpec) -> set[str]:
    return {stream.topic for stream in spec.streams.values()}


def _fitting_description(types: dict[str, str], spec: RobotSpec) -> str | None:
    for name in spec_names():
        if name == spec.name:
            continue
        other = load_spec(name)
        streams = used_streams(other).values()
        if other.identity == spec.identity and all(types.get(s.topic) == s.type for s in streams):
            return name
    return None


def faults(name: str, index: RecordingIndex) -> list[Finding]:
    """Messages whose stamp could not be read."""
    return [
        Finding(
            Code.UNDECODABLE,
            Severity.WARNING,
            fault.sentence,
            name,
            record.stream.topic,
            fault.receive_ns,
            _since(fault.receive_ns, index),
            record.fault_count,
        )
        for record in index.streams.values()
        for fault in record.faults[:1]
    ]


def unstamped(
    name: str, record: StreamRecord, receive_ns: NDArray[np.int64], index: RecordingIndex
) -> Finding:
    at = int(receive_ns[0])
    sentence = (
        "the stamp is zero: its publisher does not fill it in; left out (extract.receive_stamped="
        f"[{record.stream.name}] uses the time of receipt instead)"
    )
    return Finding(
        Code.UNSTAMPED,
        Severity.WARNING,
        sentence,
        name,
        record.stream.topic,
        at,
        _since(at, index),
        int(receive_ns.size),
    )


def odd(
    name: str,
    record: StreamRecord,
    stamps_ns: NDArray[np.int64],
    receive_ns: NDArray[np.int64],
    index: RecordingIndex,
) -> Finding:
    at = int(receive_ns[0])
    sentence = (
        f"the stamp lies {abs(int(stamps_ns[0]) - at) / NS_PER_S:.1f} s off, those after it do not; left out"
    )
    return Finding(
        Code.ODD_STAMP,
        Severity.WARNING,
        sentence,
        name,
        record.stream.topic,
        at,
        _since(at, index),
        int(stamps_ns.size),
    )


def nothing_left(name: str, index: RecordingIndex) -> list[Finding]:
    """Streams of which no message can be used."""
    return [
        Finding(
            Code.UNSTAMPED if not record.faults else Code.UNDECODABLE,
            Severity.ERROR,
            record.faults[0].sentence
            if record.faults
            else (
                "no message has a stamp: its publisher does not fill it in "
                f"(extract.receive_stamped=[{record.stream.name}] uses the time of receipt instead)"
            ),
            name,
            record.stream.topic,
        )
        for record in index.streams.values()
        if not len(record)
    ]


def latencies(name: str, index: RecordingIndex, backlog_s: float) -> list[Finding]:
    """A recorder that fell behind, and clocks that disagree."""
    found = []
    for record in index.streams.values():
        if record.stream.stamp == "receive" or not len(record):
            continue
        late = (record.receive_ns - record.stamps_ns) / NS_PER_S
        low, middle, high = np.percentile(late, (1, 50, 99))
        topic = record.stream.topic
        if high - low > backlog_s:
            at = int(record.stamps_ns[int(np.argmax(late))])
            sentence = (
                f"up to {late.max() - low:.2f} s from stamp to recorder, half over {middle - low:.2f} s: "
                "the recorder lagged; stamps are used, not times of receipt"
            )
            found.append(
                Finding(Code.BACKLOG, Severity.WARNING, sentence, name, topic, at, _since(at, index))
            )
        if low > _CLOCK_OFFSET_S or high < -_FUTURE_S:
            sentence = (
                f"stamps differ from the recorder's clock by {middle:.2f} s throughout: clocks disagree"
            )
            found.append(Finding(Code.CLOCK_OFFSET, Severity.WARNING, sentence, name, topic))
    return found


def stream_figures(
    name: str, spec: RobotSpec, index: RecordingIndex, sampler: Sampler, stretches: Sequence[Stretch]
) -> list[Finding]:
    """One finding of figures per topic, and one where the rate is too low."""
    newest = [_newest_ns(stretch, sampler, index) for stretch in stretches]
    found = []
    for stream_name, record in index.streams.items():
        stream = record.stream
        admitted = Admitted.of(record)
        best = max(admitted.eras, key=len)
        stamps = record.stamps_ns[best]
        is_watched = any(camera.stream == stream_name for camera in spec.cameras.values())
        data = figures_of.figures(
            stream.rate_hz,
            stamps,
            record.receive_ns - record.stamps_ns,
            admitted.arrivals,
            record.digests[best] if is_watched else None,
        )
        if stream.direction == "in":
            ages, skews = [], []
            for stretch, top in zip(stretches, newest, strict=True):
                positions = stretch.chosen[stream_name]
                known = positions >= 0
                at = record.stamps_ns[positions[known]]
                ages.append(stretch.grid_ns[known] - at)
                skews.append(top[known] - at)
            if ages:
                data |= figures_of.grid_figures(np.concatenate(ages), np.concatenate(skews))
        rate = data["rate_hz"]
        if stream.direction == "in" and rate is not None and rate < _LOWEST_RATE_SHARE * stream.rate_hz:
            sentence = f"{rate:.1f} Hz, declared are {stream.rate_hz:g}"
            found.append(Finding(Code.LOW_RATE, Severity.WARNING, sentence, name, stream.topic))
        sentence = f"{data['count']} messages in {data['span_s']:.1f} s"
        found.append(Finding(Code.STREAM, Severity.INFO, sentence, name, stream.topic, data=data))
    return found


def _newest_ns(stretch: Stretch, sampler: Sampler, index: RecordingIndex) -> NDArray[np.int64]:
    newest = np.full(stretch.grid_ns.size, np.iinfo(np.int64).min)
    for name in sampler.inputs:
        positions = stretch.chosen[name]
        known = positions >= 0
        newest[known] = np.maximum(newest[known], index.streams[name].stamps_ns[positions[known]])
    return newest


def _since(receive_ns: int | None, index: RecordingIndex) -> float | None:
    if receive_ns is None or index.start_ns is None:
        return None
    return (receive_ns - index.start_ns) / NS_PER_S
