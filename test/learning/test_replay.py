"""What a stage trains on: splits, buffers, and the checks across tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.learning.chance import key_of
from kuavo_smolvla_ros.learning.replay import (
    Buffer,
    ReplayDatasetManager,
    ReplayError,
    buffer_sizes,
    split,
    spread_order,
)
from kuavo_smolvla_ros.learning.sources import DataError, TaskSource
from kuavo_smolvla_ros.learning.stage import BatchLayout, Stage, TaskData

MakeSource = Callable[..., TaskSource]
MakeStage = Callable[..., Stage]
MakeTask = Callable[..., TaskData]
lengths = st.lists(st.integers(1, 60), min_size=2, max_size=30)


def numbered(of_lengths: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(of_lengths)), of_lengths)


class TestSplit:
    @given(lengths, st.floats(0.01, 0.5), st.integers(0, 100))
    def test_episodes_are_whole_and_on_one_side(self, of_lengths: list[int], share: float, seed: int) -> None:
        episodes = numbered(of_lengths)
        parts = split(episodes, share, seed, "t")
        assert sorted([*parts.training, *parts.held_out]) == list(range(len(episodes)))
        held = set(episodes[parts.held_out])
        assert held == set(parts.held_out_episodes)
        assert not held & set(episodes[parts.training])
        assert len(held) == max(int(np.ceil(share * len(of_lengths) - 1e-9)), 1)

    def test_a_tenth_of_two_hundred_is_twenty(self) -> None:
        assert len(split(numbered([3] * 200), 0.1, 0, "t").held_out_episodes) == 20

    def test_episodes_are_chosen_by_chance_not_by_age(self) -> None:
        held = split(numbered([1] * 200), 0.1, 0, "t").held_out_episodes
        assert held != tuple(range(20))
        assert held != tuple(range(180, 200))
        assert 60 < np.mean(held) < 140

    def test_the_same_every_time_and_other_for_other_seeds_and_tasks(self) -> None:
        episodes = numbered([2] * 50)
        first = split(episodes, 0.2, 0, "a").held_out_episodes
        assert split(episodes, 0.2, 0, "a").held_out_episodes == first
        assert split(episodes, 0.2, 1, "a").held_out_episodes != first
        assert split(episodes, 0.2, 0, "b").held_out_episodes != first

    @pytest.mark.parametrize(("episodes", "share"), [(1, 0.1), (2, 0.9), (10, 0.95)])
    def test_an_empty_split_is_an_error(self, episodes: int, share: float) -> None:
        with pytest.raises(DataError, match=f"t has {episodes} episode.* nothing would be left to train on"):
            split(numbered([5] * episodes), share, 0, "t")


class TestSpread:
    @given(lengths)
    def test_an_order_of_all_frames(self, of_lengths: list[int]) -> None:
        episodes = numbered(of_lengths)
        frames = np.arange(len(episodes)) * 3 + 1
        assert sorted(spread_order(frames, episodes, 7)) == frames.tolist()

    @given(lengths, st.data())
    def test_every_beginning_is_spread_over_episodes_by_length(
        self, of_lengths: list[int], data: st.DataObject
    ) -> None:
        episodes = numbered(of_lengths)
        size = data.draw(st.integers(1, len(episodes)))
        chosen = spread_order(np.arange(len(episodes)), episodes, 7)[:size]
        counts = np.bincount(episodes[chosen], minlength=len(of_lengths))
        due = np.array(of_lengths) * size / len(episodes)
        assert np.abs(counts - due).max() <= 2

    @pytest.mark.parametrize("size", [50, 100, 200, 1000])
    def test_every_beginning_is_spread_over_phases(self, size: int) -> None:
        episodes = numbered([100] * 50)
        chosen = spread_order(np.arange(5000), episodes, 7)[:size]
        histogram = np.histogram(chosen % 100, bins=10, range=(0, 100))[0]
        assert histogram.min() >= 0.5 * size / 10
        assert histogram.max() <= 1.6 * size / 10

    def test_within_an_episode_the_largest_gap_is_near_the_smallest_possible(self) -> None:
        episodes = numbered([128] * 4)
        order = spread_order(np.arange(512), episodes, 3)
        for size in (32, 64, 128):
            own = np.sort(order[:size][episodes[order[:size]] == 2])
            gaps = np.diff(np.concatenate([own, own[:1] + 128]))  # around the end
            assert gaps.max() <= 2.01 * 512 / size

    def test_the_first_frames_are_not_the_first_of_the_data(self) -> None:
        # What the reference implementation of the literature keeps: the first few demonstrations.
        chosen = spread_order(np.arange(2000), numbered([100] * 20), 1)[:200]
        assert set(chosen // 100) == set(range(20))

    def test_depends_on_the_key(self) -> None:
        episodes = numbered([10] * 20)
        first, second = (spread_order(np.arange(200), episodes, key) for key in (1, 2))
        assert first.tolist() != second.tolist()

    def test_gaps_in_the_numbers_do_not_matter(self) -> None:
        # Held-out episodes are missing among the training frames.
        episodes = np.repeat([3, 17, 40], 10)
        frames = np.concatenate([np.arange(10) + 30, np.arange(10) + 170, np.arange(10) + 400])
        assert set(spread_order(frames, episodes, 1)[:3] // 10) == {3, 17, 40}

    def test_the_order_is_pinned(self) -> None:
        # Changes here would replace the buffers of every curriculum in progress.
        order = spread_order(np.arange(12), numbered([4, 4, 4]), key_of("buffer", 0, "task1"))
        assert order.tolist() == [10, 4, 2, 8, 6, 0, 11, 5, 3, 9, 7, 1]


class TestSizes:
    @pytest.mark.parametrize(
        ("available", "limit", "sizes"),
        [
            ([100, 100], None, (100, 100)),
            ([100, 100], 60, (30, 30)),
            ([10, 100, 100], 90, (10, 40, 40)),
            ([100, 10, 100], 90, (40, 10, 40)),
            ([5, 5], 100, (5, 5)),
            ([100, 100, 100], 2, (0, 1, 1)),
            ([], 10, ()),
        ],
    )
    def test_equal_parts_and_what_small_tasks_leave(
        self, available: list[int], limit: int | None, sizes: tuple[int, ...]
    ) -> None:
        assert buffer_sizes(available, limit) == sizes

    @given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 3000))
    def test_the_limit_is_used_up_and_kept(self, available: list[int], limit: int) -> None:
        sizes = buffer_sizes(available, limit)
        assert sum(sizes) == min(sum(available), limit)
        assert all(size <= there for size, there in zip(sizes, available, strict=True))

    @given(st.lists(st.integers(1, 1000), min_size=2, max_size=6), st.integers(1, 3000))
    def test_a_further_task_never_enlarges_a_buffer(self, available: list[int], limit: int) -> None:
        fewer = buffer_sizes(available[:-1], limit)
        more = buffer_sizes(available, limit)[:-1]
        # Between equally large parts one frame may change places, as nobody can own half a frame.
        assert all(b <= a + 1 for a, b in zip(fewer, more, strict=True))


class TestManager:
    def test_earlier_tasks_are_replayed_and_the_own_task_is_not_cut(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        stage = make_stage("0.1", "0.2", "0.7", buffer_frames=40)
        manager = ReplayDatasetManager(stage, {f"task{i}": make_source(i) for i in (1, 2, 3)})
        assert [len(frames) for frames in manager.training_frames] == [20, 20, 180]
        assert manager.own_samples == 180
        assert manager.steps_per_epoch == 17  # 180 / (16 * 0.7)
        assert manager.total_steps == 34

    def test_buffers_shrink_from_stage_to_stage_into_parts_of_themselves(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        sources = {f"task{i}": make_source(i) for i in (1, 2, 3, 4)}
        stages = [
            make_stage("0.2", "0.8", buffer_frames=60),
            make_stage("0.1", "0.2", "0.7", buffer_frames=60),
            make_stage("0.1", "0.1", "0.2", "0.6", buffer_frames=60),
        ]
        kept = [set(ReplayDatasetManager(s, sources).buffers[0].frames.tolist()) for s in stages]
        assert [len(each) for each in kept] == [60, 30, 20]
        assert kept[0] > kept[1] > kept[2]

    def test_held_out_frames_are_never_drawn(self, make_stage: MakeStage, make_source: MakeSource) -> None:
        sources = {f"task{i}": make_source(i) for i in (1, 2)}
        manager = ReplayDatasetManager(make_stage("0.2", "0.8"), sources)
        held = [set(part.held_out.tolist()) for part in manager.splits]
        drawn = [draw for step in range(60) for draw in manager.plan.batch(step)]
        assert drawn
        assert not any(draw.frame in held[draw.task] for draw in drawn)

    def test_what_an_earlier_stage_held_out_is_held_out_later(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        sources = {f"task{i}": make_source(i) for i in (1, 2)}
        first = ReplayDatasetManager(make_stage("1"), sources)
        second = ReplayDatasetManager(make_stage("0.2", "0.8"), sources)
        assert first.splits[0].held_out_episodes == second.splits[0].held_out_episodes

    def test_the_sampler_ends_with_the_stage(self, make_stage: MakeStage, make_source: MakeSource) -> None:
        manager = ReplayDatasetManager(make_stage("1"), {"task1": make_source(1)})
        layout = BatchLayout(8, 2, 1)
        assert len(manager.sampler(layout, 0)) == 2 * manager.total_steps
        assert len(manager.sampler(layout, 0, first_step=manager.total_steps)) == 0

    def test_validation_frames_are_held_out_spread_and_fixed(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        source = make_source(1, lengths=(20,) * 40)
        manager = ReplayDatasetManager(make_stage("1"), {"task1": source})
        frames = manager.validation_frames(manager.stage.task)
        assert len(frames) == manager.stage.validation.max_frames_per_task
        assert set(frames.tolist()) <= set(manager.splits[0].held_out.tolist())
        assert len(set(source.episodes[frames])) == 4
        assert frames.tolist() == manager.validation_frames(manager.stage.task).tolist()

    def test_validation_frames_are_the_same_in_every_stage(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        sources = {f"task{i}": make_source(i) for i in (1, 2)}
        first, second = make_stage("1"), make_stage("0.2", "0.8", training={"seed": 99})
        early = ReplayDatasetManager(first, sources).validation_frames(first.task)
        late = ReplayDatasetManager(second, sources).validation_frames(second.earlier[0])
        assert early.tolist() == late.tolist()

    def test_the_widest_task_says_what_the_robot_is(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        sources = {"task1": make_source(1), "task2": make_source(2, action_dim=20, fingerprint="mobile")}
        facts = ReplayDatasetManager(make_stage("0.2", "0.8"), sources).facts
        assert facts.widths == {"observation.state": 16, "action": 20}
        assert facts.fingerprint == "mobile"

    def test_the_digest_names_the_data(self, make_stage: MakeStage, make_source: MakeSource) -> None:
        def digest(stage: Stage, **source: object) -> str:
            return ReplayDatasetManager(stage, {"task1": make_source(1, **source)}).digest

        stage = make_stage("1")
        assert digest(stage) == digest(stage)
        assert digest(stage) != digest(stage, lengths=(20,) * 9 + (21,))
        assert digest(stage) != digest(stage, fps=20.0)

    def test_data_that_is_not_given(self, make_stage: MakeStage, make_source: MakeSource) -> None:
        with pytest.raises(DataError, match="task2 needs the data of task1, which is not given"):
            ReplayDatasetManager(make_stage("0.2", "0.8"), {"task2": make_source(2)})

    def test_a_buffer_without_room_for_a_replayed_task(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        stage = make_stage("0.1", "0.2", "0.7", buffer_frames=1)
        sources = {f"task{i}": make_source(i) for i in (1, 2, 3)}
        with pytest.raises(DataError, match=r"task1 has a share of 0.1 but no frame to replay: raise"):
            ReplayDatasetManager(stage, sources)


class TestAgreement:
    """Each disagreement between tasks is one sentence that names both."""

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"fps": 30.0}, "task2 has 30 frames per second and task1 10"),
            (
                {"cameras": {"head_cam_h": (4, 6)}},
                "task2 has the cameras head_cam_h, task1 has head_cam_h, wrist_cam_l",
            ),
            ({"cameras": {}}, "task2 has the cameras none"),
            (
                {"cameras": {"head_cam_h": (8, 6), "wrist_cam_l": (4, 6)}},
                "head_cam_h is 6 x 8 pixels in task2 and 6 x 4 in task1",
            ),
            (
                {"action_names": ("joint_0", "elbow", *(f"joint_{i}" for i in range(2, 16)))},
                r"action\[1\] is elbow in task2 and joint_1 in task1",
            ),
            (
                {"state_names": tuple(reversed([f"joint_{i}" for i in range(16)]))},
                r"state\[0\] is joint_15 in task2 and joint_0 in task1",
            ),
            ({"units": {"joint_3": "deg"}}, "joint_3 is in deg in task2 and in rad in task1"),
            ({"fingerprint": "bbbb"}, "fingerprint bbbb, task1 on aaaa"),
        ],
    )
    def test_a_mismatch_is_named(
        self, make_stage: MakeStage, make_source: MakeSource, facts: dict, message: str
    ) -> None:
        known = {"fingerprint": "aaaa", "units": {"joint_3": "rad"}}
        sources = {"task1": make_source(1, **known), "task2": make_source(2, **{**known, **facts})}
        with pytest.raises(DataError, match=message) as raised:
            ReplayDatasetManager(make_stage("0.2", "0.8"), sources)
        assert "\n" not in str(raised.value)

    def test_more_dimensions_behind_the_same_ones_are_welcome(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        wide, narrow = {"fingerprint": "mobile", "action_dim": 20}, {"fingerprint": "arms"}
        for first, second in ((narrow, wide), (wide, narrow)):
            sources = {"task1": make_source(1, **first), "task2": make_source(2, **second)}
            assert len(ReplayDatasetManager(make_stage("0.2", "0.8"), sources).facts.action_names) == 20

    def test_data_sets_that_do_not_state_their_robot(
        self, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        sources = {"task1": make_source(1), "task2": make_source(2, fingerprint="aaaa")}
        assert ReplayDatasetManager(make_stage("0.2", "0.8"), sources).total_steps


class TestStoredBuffers:
    def manager(self, make_stage: MakeStage, make_source: MakeSource, *shares: str, **fields: object):
        sources = {f"task{i}": make_source(i) for i in range(1, len(shares) + 1)}
        return ReplayDatasetManager(make_stage(*shares, **fields), sources)

    def write(self, folder: Path, content: object) -> Path:
        file = folder / "replay.json"
        file.write_text(json.dumps(content))
        return file

    def test_round_trip(self, make_stage: MakeStage, make_source: MakeSource) -> None:
        buffer = self.manager(make_stage, make_source, "0.2", "0.8", buffer_frames=30).buffers[0]
        again = Buffer.from_json(json.loads(json.dumps(buffer.to_json())))
        assert again.frames.tolist() == buffer.frames.tolist()
        assert again.sha256 == buffer.sha256
        assert (again.task, again.available, again.source) == ("task1", 180, buffer.source)

    def test_its_own_and_a_larger_one_are_accepted(
        self, tmp_path: Path, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        before = self.manager(make_stage, make_source, "0.2", "0.8", buffer_frames=60)
        after = self.manager(make_stage, make_source, "0.1", "0.2", "0.7", buffer_frames=60)
        file = self.write(tmp_path, before.buffers_json())
        before.require_buffers(file)
        after.require_buffers(file)

    def test_a_buffer_cannot_grow_again(
        self, tmp_path: Path, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        before = self.manager(make_stage, make_source, "0.2", "0.8", buffer_frames=20)
        after = self.manager(make_stage, make_source, "0.1", "0.2", "0.7", buffer_frames=100)
        with pytest.raises(ReplayError, match="buffer of task1 would need 30 frames"):
            after.require_buffers(self.write(tmp_path, before.buffers_json()))

    def test_other_data_is_refused(
        self, tmp_path: Path, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        before = self.manager(make_stage, make_source, "0.2", "0.8")
        other = ReplayDatasetManager(
            make_stage("0.2", "0.8"), {"task1": make_source(1, lengths=(25,) * 8), "task2": make_source(2)}
        )
        with pytest.raises(ReplayError, match="the data of task1 is not what"):
            other.require_buffers(self.write(tmp_path, before.buffers_json()))

    def test_a_changed_file_is_refused(
        self, tmp_path: Path, make_stage: MakeStage, make_source: MakeSource
    ) -> None:
        manager = self.manager(make_stage, make_source, "0.2", "0.8")
        content = manager.buffers_json()
        content["buffers"][0]["frames"][0] += 1
        with pytest.raises(ReplayError, match="buffer of task1 was changed"):
            manager.require_buffers(self.write(tmp_path, content))
