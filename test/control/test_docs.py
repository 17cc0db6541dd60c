"""The page on control names every reason, and its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kuavo_smolvla_ros.control.reasons import RefusalReason, State, StopReason, Transition
from kuavo_smolvla_ros.control.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "control.md").read_text()


@pytest.mark.parametrize("word", [w.value for e in (StopReason, RefusalReason, Transition) for w in e])
def test_every_reason_is_on_the_page(word: str) -> None:
    assert f"`{word}`" in PAGE


def test_states_are_on_the_page_in_order() -> None:
    assert " -> ".join(state.value for state in State) in PAGE


def test_every_stop_reason_has_a_row_in_order_of_urgency() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.M)
    stops = [row for row in rows if row in {r.value for r in StopReason}]
    assert stops == [r.value for r in StopReason]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("joint_state_max_age_s", "older than {ms:.0f} ms"),
        ("joint_state_max_silence_s", "silent for {value:g} s"),
        ("policy_max_silence_s", "policy process for {value:g} s"),
        ("control_gap_s", "did not run for {value:g} s"),
        ("max_following_error", "an arm is {value:g} rad from its command"),
        ("refuse_above", "more than {value:g} rad from the measured pose"),
        ("ramp_above", "more than {value:g} rad away is ramped"),
        ("chunk_max_age_s", "over {value:g} s old"),
        ("max_ahead_s", "{ms:.0f} ms ahead"),
        ("max_excess", "more than {value:g} outside its limits"),
        ("start_outside", "More than {value:g} rad outside"),
        ("hold_error", "more than {value:g} rad from the held command"),
        ("settle_s", "for {value:g} s, something blocks"),
        ("max_step_s", "longer than {ms:.0f} ms"),
    ],
)
def test_numbers_on_the_page_are_those_of_the_code(settings: Settings, name: str, words: str) -> None:
    value = getattr(settings, name)
    assert words.format(value=value, ms=1000 * value) in PAGE.replace("\n", " ")


def test_every_test_that_a_promise_names_exists() -> None:
    page = (ROOT / "docs" / "promises.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    code = "\n".join(path.read_text() for path in (ROOT / "test").rglob("test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"def (test_\w+)", code))
