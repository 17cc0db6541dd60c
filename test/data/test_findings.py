"""Findings are sentences with a place, and survive the way through JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.data.findings import Code, Finding, Severity, worst

findings = st.builds(
    Finding,
    code=st.sampled_from(Code),
    severity=st.sampled_from(Severity),
    sentence=st.text(min_size=1, max_size=40),
    bag=st.text(max_size=10),
    topic=st.none() | st.just("/cam_h/color/image_raw/compressed"),
    time_ns=st.none() | st.integers(0, 2**62),
    at_s=st.none() | st.integers(0, 10**6).map(lambda ms: ms / 1000),
    count=st.integers(1, 1000),
    data=st.none() | st.just({"rate_hz": 30.0, "age": [1, 2, 3]}),
)


@given(findings)
def test_a_finding_comes_back_from_json_as_it_was(finding: Finding) -> None:
    assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding


@given(findings)
def test_a_finding_says_recording_topic_and_time(finding: Finding) -> None:
    text = str(finding)
    assert finding.sentence in text
    assert finding.bag in text
    assert finding.topic is None or finding.topic in text
    assert finding.at_s is None or f"at {finding.at_s:.2f} s" in text
    assert finding.count == 1 or f"({finding.count} times)" in text


def test_the_worst_severity_counts() -> None:
    def of(*severities: Severity) -> list[Finding]:
        return [Finding(Code.GAP, severity, "x") for severity in severities]

    assert worst([]) is None
    assert worst(of(Severity.INFO)) is Severity.INFO
    assert worst(of(Severity.INFO, Severity.ERROR, Severity.WARNING)) is Severity.ERROR


def test_codes_are_names_for_files() -> None:
    assert len({code.value for code in Code}) == len(Code)
    assert all(code.value.replace("_", "").isalpha() and code.value.islower() for code in Code)


def test_an_unknown_code_is_no_finding() -> None:
    entry = Finding(Code.GAP, Severity.INFO, "x").to_dict() | {"code": "strange"}
    with pytest.raises(ValueError, match="strange"):
        Finding.from_dict(entry)
