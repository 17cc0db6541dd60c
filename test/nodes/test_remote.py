"""Leading other nodes from a program: what they answer, refuse, and what happens when they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from std_msgs.msg import String

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.remote import Remote, RemoteError


@pytest.fixture
def remote(stage: Any) -> Any:
    with Remote(int(stage.env["ROS_DOMAIN_ID"])) as made:
        yield made


def test_services_answer_and_parameters_are_set_or_refused(
    stage: Any, remote: Remote, tmp_path: Path
) -> None:
    stage.start("recorder_node", folder=str(tmp_path), task="")
    done, answer = remote.trigger("/recorder/start")
    assert not done
    assert "set the parameter 'task' of /recorder first" in answer
    remote.set("/recorder", task="wave", instruction="Wave")
    done, answer = remote.trigger("/recorder/start")
    assert not done
    assert "is published by nobody" in answer
    with pytest.raises(RemoteError, match=r"/recorder refuses robot='kuavo'"):
        remote.set("/recorder", robot="kuavo")
    with pytest.raises(RemoteError, match=r"/recorder refuses min_free_gb=-1\.0"):
        remote.set("/recorder", min_free_gb=-1.0)


def test_what_is_said_is_heard(remote: Remote, stage: Any) -> None:
    heard: list[str] = []
    with Remote(int(stage.env["ROS_DOMAIN_ID"])) as other:
        other.hear(String, "/words", lambda message: heard.append(message.data))
        remote.say("/words", String(data="one"))
        remote.say("/words", String(data="two"))
        remote.wait(lambda: heard == ["one", "two"], "both words")


def test_who_does_not_come_is_named(remote: Remote) -> None:
    with pytest.raises(RemoteError, match=r"a miracle: not within 0\.1 s"):
        remote.wait(lambda: False, "a miracle", 0.1)


def test_waiting_ends_with_who_is_waited_for(stage: Any) -> None:
    def alive() -> None:
        raise UserError("the simulator ended with status 1")

    with (
        Remote(int(stage.env["ROS_DOMAIN_ID"]), alive) as made,
        pytest.raises(UserError, match="the simulator ended with status 1"),
    ):
        made.wait(lambda: False, "the simulator", 60.0)


def test_the_command_calls_services_and_says_sentences(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in stage.env.items():
        monkeypatch.setenv(name, value)
    stage.start("recorder_node", folder=str(tmp_path), task="")
    assert main(["call", "/recorder/discard"]) == 1
    assert "nothing is being recorded" in capsys.readouterr().out
    heard: list[str] = []
    with Remote(int(stage.env["ROS_DOMAIN_ID"])) as other:
        other.hear(String, "/policy/instruction", lambda message: heard.append(message.data))
        assert main(["call", "/policy/instruction", "Wave: now"]) == 0
        other.wait(lambda: heard == ["Wave: now"], "the sentence")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["recorder/start"], "is no full name"), (["/policy/instruction", " "], "empty")],
)
def test_a_call_that_cannot_be_meant(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["call", *arguments]) == 2
    assert complaint in capsys.readouterr().err
