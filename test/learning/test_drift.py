"""Statistics through the curriculum, drift of later tasks, and what a checkpoint hands on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.learning.drift import (
    REACH_LIMIT,
    SHIFT_LIMIT,
    drift,
    require_unchanged,
    stage_statistics,
)
from kuavo_smolvla_ros.learning.predecessor import inherited_statistics
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.learning.stage import StageError
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError, write_identity, write_json, write_statistics
from kuavo_smolvla_ros.policy.dimensions import FeatureStatistics, Statistics, StatisticsError

MakeSource = Callable[..., TaskSource]


class TestFrozen:
    def test_the_first_task_sets_them_with_a_floor(self, make_source: MakeSource) -> None:
        statistics = stage_statistics([make_source(1, mean=0.5, std=0.001)], std_floor=0.01)
        assert statistics["action"].mean == (0.5,) * 16
        assert statistics["action"].std == (pytest.approx(0.01),) * 16

    def test_later_tasks_change_nothing(self, make_source: MakeSource) -> None:
        first = stage_statistics([make_source(1)])
        second = stage_statistics([make_source(1), make_source(2, mean=3.0, std=9.0)], first)
        assert second == first
        assert second.sha256 == first.sha256

    def test_task_4_adds_its_own_dimensions_only(self, make_source: MakeSource) -> None:
        first = stage_statistics([make_source(1)])
        last = stage_statistics([make_source(1), make_source(4, action_dim=20, mean=2.0, std=3.0)], first)
        assert last["action"].mean == (0.0,) * 16 + (2.0,) * 4
        assert last["action"].std == (1.0,) * 16 + (3.0,) * 4
        assert last["observation.state"] == first["observation.state"]
        require_unchanged(first, last)

    def test_without_inheritance_the_order_of_the_tasks_decides(self, make_source: MakeSource) -> None:
        tasks = [make_source(1), make_source(2, mean=5.0), make_source(4, action_dim=20, mean=2.0)]
        in_steps = None
        for i in range(1, 4):
            in_steps = stage_statistics(tasks[:i], in_steps)
        assert stage_statistics(tasks) == in_steps

    @given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from([16, 18, 20])), min_size=1, max_size=5))
    def test_no_order_of_tasks_ever_changes_a_known_number(
        self, make_source: MakeSource, tasks: list[tuple[float, int]]
    ) -> None:
        known = None
        for number, (mean, width) in enumerate(tasks, 1):
            fresh = stage_statistics([make_source(number, mean=mean, action_dim=width)], known)
            if known is not None:
                require_unchanged(known, fresh)
            known = fresh
        assert known is not None
        assert known["action"].width == max(width for _, width in tasks)

    def test_missing_statistics_are_an_error(self, make_source: MakeSource) -> None:
        source = make_source(1)
        del source.stats["action"]  # type: ignore[attr-defined]
        with pytest.raises(StatisticsError, match="no normalisation statistics for action"):
            stage_statistics([source])

    def test_a_change_is_found(self) -> None:
        before = Statistics({"action": FeatureStatistics((0.0, 1.0), (1.0, 1.0))})
        changed = Statistics({"action": FeatureStatistics((0.0, 1.1), (1.0, 1.0))})
        with pytest.raises(StatisticsError, match="statistics of action are not those of the stage before"):
            require_unchanged(before, changed)

    @pytest.mark.parametrize("after", [{}, {"action": FeatureStatistics((0.0,), (1.0,))}])
    def test_a_loss_is_found(self, after: dict) -> None:
        before = Statistics({"action": FeatureStatistics((0.0, 1.0), (1.0, 1.0))})
        with pytest.raises(StatisticsError, match="action know fewer dimensions"):
            require_unchanged(before, Statistics(after))

    def test_more_is_no_change(self) -> None:
        before = Statistics({"action": FeatureStatistics((0.0,), (1.0,))})
        after = Statistics({"action": FeatureStatistics((0.0, 7.0), (1.0, 2.0))})
        require_unchanged(before, after)
        require_unchanged(Statistics(), before)


class TestDrift:
    def test_in_frozen_deviations(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1, mean=1.0, std=2.0)])
        report = drift(make_source(2, mean=4.0, std=1.0), frozen)
        one = report.dimensions[0]
        assert (one.feature, one.name) == ("observation.state", "joint_0")
        assert (one.shift, one.spread) == (pytest.approx(1.5), pytest.approx(0.5))
        assert (one.lowest, one.highest) == (pytest.approx(0.0), pytest.approx(3.0))
        assert report.statistics_sha256 == frozen.sha256
        assert len(report.dimensions) == 32

    def test_a_task_does_not_drift_from_itself(self, make_source: MakeSource) -> None:
        report = drift(make_source(1, mean=4.0, std=0.5), None)
        assert all(d.first_seen and abs(d.shift) < 1e-6 for d in report.dimensions)
        assert report.advice == ()

    def test_new_dimensions_are_marked_and_not_judged(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1)])
        report = drift(make_source(4, action_dim=20), frozen)
        assert [d.name for d in report.dimensions if d.first_seen] == [f"joint_{i}" for i in range(16, 20)]
        assert report.table().count("first seen") == 4
        assert report.advice == ()

    def test_a_far_mean_is_advised_on(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1)])
        source = make_source(2)
        source.stats["action"]["mean"][3] = SHIFT_LIMIT + 0.5
        (advice,) = drift(source, frozen).advice
        assert "task2 works elsewhere" in advice
        assert "action joint_3 (2.5)" in advice

    def test_outliers_are_advised_on(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1)])
        source = make_source(2)
        source.stats["action"]["min"][5] = -REACH_LIMIT - 4
        (advice,) = drift(source, frozen).advice
        assert "more than 6 deviations out in action joint_5 (10)" in advice
        assert "unit" in advice

    def test_a_narrow_task_is_advised_on_and_long_lists_are_cut(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1)])
        (advice,) = drift(make_source(2, std=0.05), frozen).advice
        assert advice.startswith("task2 uses less than 0.1 of the frozen deviation in ")
        assert "and 28 more" in advice

    def test_on_the_edge_is_no_drift(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1)])
        assert drift(make_source(2, mean=SHIFT_LIMIT, std=1.0), frozen).advice == ()

    def test_as_json(self, make_source: MakeSource) -> None:
        frozen = stage_statistics([make_source(1)])
        content = json.loads(json.dumps(drift(make_source(2, mean=3.0), frozen).to_json()))
        assert content["task"] == "task2"
        assert content["dimensions"][0]["shift"] == pytest.approx(3.0)
        assert len(content["advice"]) == 1

    def test_statistics_without_extremes(self, make_source: MakeSource) -> None:
        source = make_source(2)
        del source.stats["action"]["min"]
        with pytest.raises(StatisticsError, match="statistics of action in task2 lack min"):
            drift(source, None)


class TestPredecessor:
    @pytest.fixture
    def save(self, tmp_path: Path, make_source: MakeSource) -> Callable[..., Path]:
        """A checkpoint's small files, as a stage leaves them."""

        def save(source: TaskSource) -> Path:
            statistics = stage_statistics([source])
            config = {
                "type": "kuavo_smolvla",
                "state_names": list(source.facts.state_names),
                "action_names": list(source.facts.action_names),
                "cameras": list(source.facts.cameras),
            }
            write_json(tmp_path / "config.json", config)
            write_statistics(tmp_path, statistics)
            fingerprint = source.facts.fingerprint
            write_identity(tmp_path, robot_fingerprint=fingerprint, statistics=statistics, freezing={})
            return tmp_path

        return save

    def test_hands_on_its_statistics(self, save: Callable[..., Path], make_source: MakeSource) -> None:
        source = make_source(1, mean=0.3, fingerprint="aaaa")
        assert inherited_statistics(save(source), source.facts, "aaaa") == stage_statistics([source])

    def test_plain_smolvla_hands_on_none(self, tmp_path: Path, make_source: MakeSource) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert inherited_statistics(tmp_path, make_source(1).facts, None) is None

    def test_weights_that_no_data_have_met_hand_on_none(
        self, save: Callable[..., Path], make_source: MakeSource
    ) -> None:
        source = make_source(1)
        folder = save(source)
        (folder / "statistics.json").unlink()
        assert inherited_statistics(folder, source.facts, None) is None

    def test_the_given_robot_counts_where_the_data_name_none(
        self, save: Callable[..., Path], make_source: MakeSource
    ) -> None:
        folder = save(make_source(1, fingerprint="aaaa"))
        facts = make_source(1, fingerprint=None).facts
        assert inherited_statistics(folder, facts, None) is not None
        with pytest.raises(StageError, match="with fingerprint aaaa, the data was recorded on cccc"):
            inherited_statistics(folder, facts, "cccc")

    def test_a_wider_robot_goes_on(self, save: Callable[..., Path], make_source: MakeSource) -> None:
        folder = save(make_source(1, fingerprint="arms"))
        facts = make_source(4, action_dim=20, fingerprint="mobile").facts
        statistics = inherited_statistics(folder, facts, "mobile")
        assert statistics is not None
        assert statistics["action"].width == 16

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"fingerprint": "bbbb"}, "trained for the robot with fingerprint aaaa, the data .* bbbb"),
            (
                {"cameras": {"head_cam_h": (4, 6)}},
                "trained with the cameras head_cam_h, wrist_cam_l, the data",
            ),
            ({"action_dim": 15}, r"action\[15\] = joint_15, the data has nothing there"),
            (
                {"state_names": ("elbow", *(f"joint_{i}" for i in range(1, 16)))},
                r"observation\.state\[0\] = joint_0, the data has elbow",
            ),
        ],
    )
    def test_another_robot_is_refused(
        self, save: Callable[..., Path], make_source: MakeSource, facts: dict, message: str
    ) -> None:
        folder = save(make_source(1, fingerprint="aaaa"))
        given = make_source(2, **{"fingerprint": "aaaa", **facts}).facts
        with pytest.raises(StageError, match=message) as raised:
            inherited_statistics(folder, given, given.fingerprint)
        assert "\n" not in str(raised.value)

    def test_tampered_statistics_are_refused(
        self, save: Callable[..., Path], make_source: MakeSource
    ) -> None:
        source = make_source(1)
        folder = save(source)
        file = folder / "statistics.json"
        file.write_text(file.read_text().replace("0.0", "0.5", 1))
        with pytest.raises(CheckpointError, match="do not have the hash"):
            inherited_statistics(folder, source.facts, None)


def test_real_numbers_survive_a_checkpoint_exactly(tmp_path: Path, make_source: MakeSource) -> None:
    from kuavo_smolvla_ros.policy.checkpoint import read_statistics

    rng = np.random.default_rng(0)
    source = make_source(1)
    for key in ("observation.state", "action"):
        source.stats[key]["mean"][:] = rng.normal(size=16)
        source.stats[key]["std"][:] = rng.uniform(0.1, 2, 16)
    statistics = stage_statistics([source])
    write_statistics(tmp_path, statistics)
    write_identity(tmp_path, robot_fingerprint=None, statistics=statistics, freezing={})
    again = read_statistics(tmp_path)
    require_unchanged(statistics, again)
    assert stage_statistics([source], again) == statistics
