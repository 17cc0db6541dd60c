"""Quality: figures against signals that are known, thresholds, the page and the exit status."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.data import charts
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.dataset_reader import DatasetReader, EpisodeView
from kuavo_smolvla_ros.data.episodes import extract
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.quality import action_state_lag, duplicates, judge, signature
from kuavo_smolvla_ros.data.quality_settings import QualitySettings
from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.report import make_report
from kuavo_smolvla_ros.data.report_page import render
from kuavo_smolvla_ros.data.synthetic import read_number
from kuavo_smolvla_ros.data.synthetic_bags import START_NS, Event, events, sines, write
from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.robot.spec import load_spec

SPEC = load_spec("kuavo_sim")
RULES = QualitySettings.load()
NS = 1_000_000_000
FPS = 10.0


def view(state: np.ndarray, action: np.ndarray | None = None, **more: Any) -> EpisodeView:
    action = state if action is None else action
    return EpisodeView(0, "Do it", state.astype(np.float32), action.astype(np.float32), "bag", **more)


def swinging(steps: int = 80, ahead_s: float = 0.0, names: tuple[str, ...] = SPEC.state_names) -> np.ndarray:
    signal = sines(SPEC)
    return np.stack([signal(names, step / FPS + ahead_s) for step in range(steps)])


def codes(episode: EpisodeView, **rules: Any) -> set[Code]:
    judged = judge(episode, SPEC, FPS, replace(RULES, **rules))
    return {f.code for f in judged.findings}


# Figures.


def test_a_good_episode_has_nothing_against_it() -> None:
    judged = judge(view(swinging(), swinging(ahead_s=0.1)), SPEC, FPS, RULES)
    assert judged.verdict == "good"
    assert judged.findings == []
    assert json.loads(json.dumps(judged.to_dict()))["verdict"] == "good"


@given(st.floats(-0.4, 1.2))
def test_the_lag_of_the_state_is_found_between_steps(lag_s: float) -> None:
    found, agreement = action_state_lag(SPEC, swinging(120), swinging(120, ahead_s=lag_s), FPS)
    assert found is not None
    assert agreement is not None
    assert agreement > 0.9
    assert found == pytest.approx(lag_s, abs=0.03)


def test_lag_is_not_claimed_where_it_cannot_be_seen() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(80, 16))
    assert action_state_lag(SPEC, swinging(80), noise, FPS)[0] is None
    assert action_state_lag(SPEC, np.zeros((80, 16)), np.zeros((80, 16)), FPS) == (None, None)
    assert action_state_lag(SPEC, swinging(10), swinging(10), FPS) == (None, None)


def test_late_and_leading_states_are_findings() -> None:
    assert Code.LAG in codes(view(swinging(), swinging(ahead_s=0.8)))
    assert Code.LAG in codes(view(swinging(), swinging(ahead_s=-0.2)))
    assert Code.LAG not in codes(view(swinging(), swinging(ahead_s=0.8)), lag_s=None)


def test_a_jump_is_fast_and_jerky_and_named() -> None:
    action = swinging()
    action[40:, 2] += 0.6
    judged = judge(view(swinging(), action), SPEC, FPS, replace(RULES, fast_share=0.0, jerky_share=0.0))
    found = {f.code: f for f in judged.findings}
    assert "zarm_l3_joint" in found[Code.FAST].sentence
    assert found[Code.FAST].at_s == pytest.approx(3.9)
    assert Code.JERKY in found
    assert judged.figures["speed"]["joint"] == "zarm_l3_joint"
    assert judged.figures["speed"]["of_limit"] > 2
    assert judged.verdict == "suspect"


def test_limits_are_held_against_state_and_action() -> None:
    beyond = swinging()
    beyond[10:20, 3] = 0.2  # the elbow ends at 0 rad
    assert Code.OUT_OF_LIMITS in codes(view(beyond, swinging()))
    assert Code.OUT_OF_LIMITS in codes(view(swinging(), beyond))
    at_limit = swinging()
    at_limit[:60, 3] = 0.0
    assert Code.AT_LIMIT in codes(view(at_limit))
    assert Code.OUT_OF_LIMITS not in codes(view(at_limit))
    assert Code.AT_LIMIT in codes(view(at_limit, task="task1_moving_grasp"))  # begins with the elbow bent
    assert Code.AT_LIMIT not in codes(view(at_limit, task="task4_sorting"))  # begins with it straight


def test_grippers_and_bases_may_jump_for_their_controllers_take_their_time() -> None:
    mobile = load_spec("kuavo_mobile")
    action = np.stack([sines(mobile)(mobile.action_names, step / FPS) for step in range(80)])
    strict = replace(RULES, fast_share=0.0, jerky_share=0.0)
    calm = judge(view(swinging(), action), mobile, FPS, strict)
    for name in ("left_gripper", "base_x", "base_yaw"):
        action[40:, mobile.action_names.index(name)] = 1.0
    judged = judge(view(swinging(), action), mobile, FPS, strict)
    assert judged.figures["speed"] == calm.figures["speed"]
    assert {f.code for f in judged.findings} == {f.code for f in calm.findings}
    action[40:, 0] += 1.0
    assert Code.FAST in {f.code for f in judge(view(swinging(), action), mobile, FPS, strict).findings}


def test_static_episodes_and_unused_grippers() -> None:
    still = np.tile(swinging(1), (50, 1))
    assert Code.STATIC in codes(view(still))
    assert judge(view(still), SPEC, FPS, RULES).verdict == "bad"
    action = swinging()
    for name in ("left_gripper", "right_gripper"):
        action[:, SPEC.action_names.index(name)] = 0.0
    assert Code.GRIPPER_UNUSED in codes(view(swinging(), action))
    action[40:60, SPEC.action_names.index("left_gripper")] = 1.0
    judged = judge(view(swinging(), action), SPEC, FPS, RULES)
    assert judged.figures["gripper_closings"] == {"left_gripper": 1, "right_gripper": 0}
    assert Code.GRIPPER_UNUSED not in {f.code for f in judged.findings}


def test_frozen_and_dark_cameras() -> None:
    figures = Finding(
        Code.STREAM, Severity.INFO, "x", "bag", "/cam", data={"repeated_pictures": 60, "count": 100}
    )
    assert Code.FROZEN_PICTURES in codes(view(swinging(), findings=(figures,)))
    assert Code.FROZEN_PICTURES not in codes(view(swinging(), findings=(figures,)), frozen_share=0.7)
    assert Code.DARK_PICTURES in codes(view(swinging(), brightness={"head_cam_h": 3.0}))


@given(st.integers(2, 30), st.integers(0, 10**6))
def test_duplicates_are_all_pairs_that_are_near(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = rng.uniform(0, 1, (count, 6)).astype(np.float32)
    made[count // 2] = made[0] + np.float32(0.001)
    lengths = rng.integers(50, 53, count)
    lengths[count // 2] = lengths[0]
    found = duplicates(made, lengths, 0.005)
    expected = [
        (i, j)
        for i in range(count)
        for j in range(i + 1, count)
        if np.abs(made[i] - made[j]).max() <= np.float32(0.005) and abs(lengths[i] - lengths[j]) <= 1
    ]
    assert found == expected
    assert (0, count // 2) in found


def test_signatures_do_not_depend_on_length() -> None:
    assert signature(swinging(24)).shape == signature(swinging(500)).shape == signature(swinging(3)).shape


# Thresholds.


def test_thresholds_of_ones_own_name_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lag_s: null\nfail: {bad_share: 0.5}\n")
    rules = QualitySettings.load(path)
    assert rules == replace(RULES, lag_s=None, bad_share=0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed: 3", "'speed' is unknown"),
        ("lag_s: soon", "must be a number"),
        ("lag_s: -1", "0 or more"),
        ("fail: {bad_share: null}", "must be a number"),
        ("[1, 2]", "holds no thresholds"),
        ("{a: [", "is no YAML"),
    ],
)
def test_wrong_thresholds_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        QualitySettings.load(path)


def test_missing_threshold_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        QualitySettings.load(tmp_path / "none.yaml")


# A dataset with known faults.


@pytest.fixture(scope="module")
def dataset(small_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good recordings of two tasks, one of which is there twice, one with a gap, one without a topic."""
    spec = load_spec(small_spec)
    folder = tmp_path_factory.mktemp("bags")

    def record(name: str, task: str, number: int, change: Any = None) -> None:
        begin = START_NS + number * 1000 * NS
        happened = events(spec, 4.0, start_ns=begin, action_delay_s=0.1, signal=course(number))
        note = RecordingMetadata.of(spec, task, f"Please <{task}> & go").to_custom_data()
        happened = [e for e in happened if change is None or change(e, (e.stamp_ns - begin) / NS)]
        write(folder / name, spec, happened, custom_data=note)

    def course(number: int) -> Any:
        swing = sines(spec)
        return lambda names, time_s: swing(names, time_s + 7.0 * number)

    def gap(event: Event, time_s: float) -> bool:
        return event.stream != "left_image" or not 2.2 < time_s < 2.9

    def no_gripper(event: Event, _: float) -> bool:
        return event.stream != "gripper_state"

    record("a", "task1_moving_grasp", 0)
    record("b", "task2_weighing", 1)
    record("c", "task2_weighing", 1, lambda e, t: not (e.stream == "arm_command" and t > 3.99))
    record("d", "task1_moving_grasp", 2, gap)
    record("e", "task1_moving_grasp", 3, no_gripper)
    root = tmp_path_factory.mktemp("out") / "weighing"
    settings = ConversionSettings(small_spec, extract={"trim_idle": False})
    convert(find_recordings([folder]), root, settings, extract)
    return root


def test_the_reader_gives_what_was_recorded(dataset: Path, small_spec: str) -> None:
    reader = DatasetReader.open(dataset)
    spec = load_spec(small_spec)
    assert [e.source for e in reader.episodes()] == ["a", "b", "c", "d#1"]
    episode = reader.episode(1)
    assert (episode.task, len(episode)) == ("task2_weighing", 40)
    np.testing.assert_allclose(episode.state[3], sines(spec)(spec.state_names, 0.3 + 7.0), atol=2e-6)
    key = reader.cameras[0]
    assert [read_number(p) for p in reader.pictures(1, key, [0, 1, 20, 39])] == [0, 3, 60, 117]
    assert [read_number(p) for p in reader.pictures(3, key)] == list(range(0, len(reader.episode(3)) * 3, 3))
    assert [read_number(p) for p in reader.pictures(2, key, [30, 5])] == [90, 15]  # backwards as well
    with pytest.raises(UserError, match=r"episodes 0\.\.3, not 4"):
        reader.episode(4)


def test_the_report_finds_each_fault(dataset: Path) -> None:
    report = make_report(dataset)
    assert report.verdicts == {"good": 2, "bad": 1, "suspect": 1}
    verdicts = {e.source: e.verdict for e in report.episodes}
    assert verdicts == {"a": "good", "b": "good", "c": "bad", "d#1": "suspect"}
    (duplicate,) = [f for f in report.all_findings if f.code is Code.DUPLICATE]
    assert (duplicate.bag, duplicate.sentence) == ("c", "repeats episode 1 (b)")
    assert {left.source for left in report.left_out} == {"d#2", "e"}
    (missing,) = [f for f in report.all_findings if f.code is Code.MISSING_TOPIC]
    assert (missing.bag, missing.topic) == ("e", "/gripper/state")
    assert report.tasks["task2_weighing"]["episodes"] == 2
    assert report.tasks["task1_moving_grasp"]["instructions"] == ["Please <task1_moving_grasp> & go"]
    topics = {topic.topic: topic for topic in report.topics}
    head = topics["/cam_h/color/image_raw/compressed"]
    assert head.messages == 4 * 120
    assert sum(head.histograms["latency"]) == head.messages
    assert head.rates_hz == pytest.approx([30.0] * 4, abs=0.1)
    assert topics["/cam_l/color/image_raw/compressed"].gap_max_ms == pytest.approx(733, abs=34)
    assert [e.figures["lag_s"] for e in report.episodes if e.source == "a"] == [pytest.approx(0.1, abs=0.02)]
    assert any("1 of 4 episodes are bad" in failure for failure in report.failures)
    assert any("2 of 6 parts of recordings were left out" in failure for failure in report.failures)


def test_the_joints_statistics_are_the_values(dataset: Path) -> None:
    report = make_report(dataset, pictures=0)
    everything = np.concatenate([e.state for e in DatasetReader.open(dataset).episodes()])
    for column, joint in enumerate(report.joints["state"]):
        assert joint.mean == pytest.approx(everything[:, column].mean(), abs=1e-5)
        assert joint.deviation == pytest.approx(everything[:, column].std(), abs=1e-5)
        assert (joint.low, joint.high) == pytest.approx(
            (everything[:, column].min(), everything[:, column].max())
        )
    assert report.shown == {}


def test_against_an_earlier_dataset(dataset: Path) -> None:
    same = make_report(dataset, pictures=0, against=dataset)
    assert {joint.shift for joint in same.joints["action"]} == {0.0}
    assert not [f for f in same.findings if f.code is Code.SHIFTED]
    joint = same.joints["state"][0]
    joint.earlier_mean, joint.earlier_deviation = joint.mean - 3 * joint.deviation, joint.deviation
    assert joint.shift == pytest.approx(3.0, rel=1e-6)


def test_a_dataset_that_differs_from_the_earlier_one_is_named(
    dataset: Path, small_spec: str, tmp_path: Path
) -> None:
    spec = load_spec(small_spec)
    label = {"task": "task1_moving_grasp", "instruction": "Do it", "trim_idle": False}

    def raised(names: tuple[str, ...], time_s: float) -> np.ndarray:
        signal = sines(spec)(names, time_s)
        return signal + np.array([1.2 if name == "zarm_l1_joint" else 0.0 for name in names])

    write(tmp_path / "bags" / "x", spec, events(spec, 3.0, signal=raised))
    settings = ConversionSettings(small_spec, extract=label)
    convert(find_recordings([tmp_path / "bags"]), tmp_path / "new", settings, extract)
    report = make_report(tmp_path / "new", pictures=0, against=dataset)
    shifted = [f.sentence for f in report.findings if f.code is Code.SHIFTED]
    assert any(text.startswith("state zarm_l1_joint: mean ") for text in shifted)
    assert any("deviations apart" in text for text in shifted)
    page = render(report)
    assert "dashed: in the earlier dataset" in page


class _Tags(HTMLParser):
    """Checks that every tag is closed, and gathers addresses."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img"
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(dataset: Path) -> None:
    report = make_report(dataset)
    page = render(report)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.pictures == 4 * 3 * 2  # episodes, cameras, first and last
    assert all(address.startswith("data:image/jpeg;base64,") for address in tags.addresses)
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert "Please &lt;task2_weighing&gt; &amp; go" in page
    assert "repeats episode 1 (b)" in page
    assert "does not pass" in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


def test_fewer_pictures_show_the_worst_first(dataset: Path) -> None:
    assert list(make_report(dataset, pictures=1).shown) == [2]
    assert list(make_report(dataset, pictures=2).shown) == [2, 3]


def test_the_command_writes_page_and_json_and_says_by_its_status(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(dataset), "--out", str(tmp_path / "r")]) == 1
    out = capsys.readouterr().out
    assert "4 episodes (2 good, 1 suspect, 1 bad), left out 2" in out
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["passes"] is False
    assert [e["verdict"] for e in document["episodes"]] == ["good", "good", "bad", "suspect"]
    assert (tmp_path / "r" / "report.html").read_text().startswith("<!DOCTYPE html>")
    lenient = tmp_path / "lenient.yaml"
    lenient.write_text("fail: {bad_share: 0.3, left_out_share: 0.5}\n")
    assert main(["report", str(dataset), "--out", str(tmp_path / "r"), "--thresholds", str(lenient)]) == 0
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "there is no LeRobot dataset" in capsys.readouterr().err
    assert main(["report", str(dataset), "--thresholds", str(tmp_path / "none.yaml")]) == 2


def test_reporting_twice_gives_the_same_files(dataset: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        main(["report", str(dataset), "--out", str(tmp_path / name)])
    for file in ("report.html", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# Charts.


def test_charts_say_what_they_cannot_show() -> None:
    assert "no data" in charts.histogram([0, 0], ["a", "b"])
    assert "no data" in charts.distribution([], "s")
    assert charts.distribution([2.0, 2.0], "s").startswith("<svg")


def test_bars_beyond_the_limit_are_marked() -> None:
    chart = charts.histogram([10, 5, 1], ["a", "b", "c"], limit_after=2)
    assert chart.count('class="bar"') == 2
    assert chart.count('class="bar over"') == 1
    assert "c: 1 (6.25%)" in chart
