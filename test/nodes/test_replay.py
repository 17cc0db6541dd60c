"""A stop of a real executor over DDS, its file, and `kuavo-smolvla replay` on it, whole and damaged."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros import cli
from kuavo_smolvla_ros.nodes.flight_replay import read_flight, replay


@pytest.fixture
def flights(tmp_path: Path) -> Path:
    return tmp_path / "flights"


@pytest.fixture
def following(stage: Any, robot: Any, thinker: Any, ready: np.ndarray, flights: Path, towards: Any) -> Any:
    """An executor that follows a chunk and writes its flights into `flights`."""
    process = stage.start("executor_node", dry_run=False, flight_folder=str(flights))
    status = stage.status_of("executor")
    status.wait(state="idle", detail="waiting for a chunk")
    thinker.say(thinker.chunk(towards(ready)))
    status.wait(state="following")
    return process, status


def flight_of(stage: Any, status: Any, flights: Path) -> Path:
    """The file that the status names; it is named only when it is whole."""
    stage.wait_for(lambda: status.now.get("last_flight"), "the file of the stop")
    path = Path(status.now["last_flight"])
    assert path.parent == flights
    return path


def test_a_lost_policy_is_recorded_and_replays_to_the_same_decisions(
    stage: Any, robot: Any, thinker: Any, following: Any, flights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, status = following
    thinker.alive = False
    status.wait(state="holding", reason="policy_lost")
    path = flight_of(stage, status, flights)
    assert cli.main(["replay", str(path), "--json", str(flights / "replay.json")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("policy_lost: ")
    assert "state     holding (policy_lost)" in out
    assert "chunks: 1 accepted" in out
    assert out.splitlines()[-1].startswith("same decisions in all ")
    document = json.loads((flights / "replay.json").read_text())
    assert document["same"] is True
    assert document["about"]["reason"] == "policy_lost"
    assert document["periods"] == len(read_flight(path).inputs) > 20
    assert "is recorded in" in process.output


def test_the_flight_holds_what_was_really_commanded(
    stage: Any, robot: Any, following: Any, flights: Path, spec: Any
) -> None:
    _, status = following
    assert stage.call("/executor/stop").success
    status.wait(state="holding", reason="operator_stop")
    flight = read_flight(flight_of(stage, status, flights))
    arms = [i for i, name in enumerate(spec.action_names) if name.startswith("zarm")]
    decided = [np.array(d["command"])[arms] for d in flight.decisions if d["command"] is not None]
    heard = robot.arms()
    for command in heard[-40:-20]:  # degrees went over the wire
        assert min(np.abs(d - command).max() for d in decided) < 1e-9
    assert [request for given in flight.inputs for request in given["requests"]] == ["stop"]
    assert replay(flight) is None


def test_an_end_while_moving_is_recorded_in_time(following: Any, flights: Path) -> None:
    process, _ = following
    process.send(signal.SIGTERM)
    assert process.ended_within(2.0) == 0
    (path,) = flights.iterdir()
    assert path.name.endswith("_shutdown.mcap")
    assert replay(read_flight(path)) is None


def test_a_dry_run_follows_to_the_end_though_no_arm_moves(
    stage: Any, robot: Any, thinker: Any, ready: np.ndarray, flights: Path, towards: Any
) -> None:
    stage.start("executor_node", flight_folder=str(flights))
    status = stage.status_of("executor")
    status.wait(state="idle", detail="waiting for a chunk", dry_run="True")
    thinker.say(thinker.chunk(towards(ready, reach=0.9)))
    status.wait(state="following")
    status.wait(state="holding")
    assert status.now["reason"] == "starved", "not following_error: nobody was told to move"
    flight = read_flight(flight_of(stage, status, flights))
    assert flight.about["dry_run"] == "True"
    assert replay(flight) is None


def test_a_folder_that_cannot_be_written_stops_nothing(
    stage: Any, robot: Any, thinker: Any, ready: np.ndarray, tmp_path: Path, towards: Any
) -> None:
    (tmp_path / "file").write_text("")
    process = stage.start("executor_node", dry_run=False, flight_folder=str(tmp_path / "file" / "flights"))
    status = stage.status_of("executor")
    status.wait(state="idle", detail="waiting for a chunk")
    assert stage.call("/executor/stop").success
    assert stage.call("/executor/resume").success
    thinker.say(thinker.chunk(towards(ready)))
    status.wait(state="following")
    process.send(signal.SIGINT)
    assert process.ended_within(2.0) == 0
    assert "could not be recorded" in process.output
    assert "Traceback" not in process.output


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"not mcap at all", "is no MCAP file"),
        (None, "there is no such recording"),
    ],
)
def test_what_is_no_flight_is_one_sentence(
    content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flight.mcap"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["replay", str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kuavo-smolvla replay: {path}: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_folder_is_no_flight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(tmp_path)]) == 1
    assert "name one of the files in it" in capsys.readouterr().err


def test_a_truncated_flight_is_one_sentence(
    stage: Any, following: Any, flights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, status = following
    assert stage.call("/executor/stop").success
    status.wait(state="holding", reason="operator_stop")
    whole = flight_of(stage, status, flights).read_bytes()
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(whole[: len(whole) // 2])
    assert cli.main(["replay", str(cut)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "cut off" in captured.err
    assert captured.err.count("\n") == 1


def test_other_software_that_decides_otherwise_is_found_out(
    stage: Any, robot: Any, following: Any, flights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file whose settings were changed stands for an executor whose code was."""
    from mcap.reader import make_reader
    from mcap.writer import Writer

    _, status = following
    # Arms at rest are the same to every executor.
    stage.wait_for(lambda: np.ptp(robot.arms(), axis=0).max() > 0.02, "arms that move")
    assert stage.call("/executor/stop").success
    status.wait(state="holding", reason="operator_stop")
    source = flight_of(stage, status, flights)
    changed = tmp_path / "changed.mcap"
    with source.open("rb") as stream, changed.open("wb") as sink:
        reader, writer = make_reader(stream), Writer(sink)
        writer.start()
        (metadata,) = reader.iter_metadata()
        writer.add_metadata(metadata.name, metadata.metadata)
        channels: dict[str, int] = {}
        for _, channel, message in reader.iter_messages(log_time_order=False):
            if channel.topic not in channels:
                schema = writer.register_schema(channel.topic, "jsonschema", b"{}")
                channels[channel.topic] = writer.register_channel(channel.topic, "json", schema)
            data = message.data
            if channel.topic == "/flight/memory":
                memory = json.loads(data)
                memory["settings"]["limits"]["acceleration"] = [
                    a / 20 for a in memory["settings"]["limits"]["acceleration"]
                ]
                data = json.dumps(memory).encode()
            writer.add_message(
                channels[channel.topic], message.log_time, data, message.publish_time, message.sequence
            )
        writer.finish()
    assert cli.main(["replay", str(changed)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("other decisions from period ")
    assert "command of " in last
