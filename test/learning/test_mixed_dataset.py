"""Samples of several tasks in one batch, from memory and from LeRobot data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kuavo_smolvla_ros.learning.lerobot_source import open_task
from kuavo_smolvla_ros.learning.mixed_dataset import (
    FRAME,
    TASK_NUMBER,
    MixedDataset,
    Standing,
    collate,
    validation_draws,
)
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.sources import (
    DataError,
    Joined,
    TaskSource,
    join,
    pooled_stats,
)
from kuavo_smolvla_ros.learning.stage import BatchLayout, Stage, TaskData

MakeSource = Callable[..., TaskSource]
MakeStage = Callable[..., Stage]
MakeTask = Callable[..., TaskData]


@pytest.fixture
def manager(make_stage: MakeStage, make_source: MakeSource, make_task: MakeTask) -> ReplayDatasetManager:
    """Two tasks, of which the second is 20 wide and has paraphrases."""
    second = make_task(2, paraphrases=("the second thing", "number two"), paraphrase_share=0.5)
    stage = make_stage("0.25", "0.75", tasks=(make_task(1), second))
    return ReplayDatasetManager(stage, {"task1": make_source(1), "task2": make_source(2, action_dim=20)})


class TestSamples:
    def test_each_is_its_own_task_s_frame(self, manager: ReplayDatasetManager) -> None:
        dataset = MixedDataset.of_manager(manager)
        for draw in manager.plan.batch(0):
            sample = dataset[draw]
            assert sample["observation.state"][:2].tolist() == [draw.task + 1, draw.frame]
            assert (sample[TASK_NUMBER], sample[FRAME]) == (draw.task + 1, draw.frame)

    def test_the_sentence_is_the_task_s_not_the_data_set_s(self, manager: ReplayDatasetManager) -> None:
        dataset = MixedDataset.of_manager(manager)
        sentences = [dataset[Draw(task, 0, i)]["task"] for task, i in ((0, 0), (1, 0), (1, 1), (1, 2))]
        assert sentences == ["do task 1", "do task 2", "the second thing", "number two"]

    def test_columns_that_only_one_data_set_has_are_left_out(self, manager: ReplayDatasetManager) -> None:
        dataset = MixedDataset.of_manager(manager)
        assert dataset[Draw(0, 0, 0)].keys() == dataset[Draw(1, 0, 0)].keys()

    def test_length_is_all_frames(self, manager: ReplayDatasetManager) -> None:
        assert len(MixedDataset.of_manager(manager)) == 400

    def test_a_missing_camera_is_named(self, make_source: MakeSource, make_task: MakeTask) -> None:
        cameras = {"head_cam_h": (4, 6), "wrist_cam_r": (4, 6)}
        dataset = MixedDataset([make_task(1)], [make_source(1, cameras=cameras)])
        with pytest.raises(DataError, match=r"frame 3 of task1 has no observation\.images\.wrist_cam_r"):
            dataset[Draw(0, 3, 0)]

    def test_a_width_that_is_not_the_stated_one(self, make_source: MakeSource, make_task: MakeTask) -> None:
        names = tuple(f"joint_{i}" for i in range(14))
        dataset = MixedDataset([make_task(1)], [make_source(1, action_names=names)])
        with pytest.raises(DataError, match="action of frame 0 of task1 is 16 wide, its data set says 14"):
            dataset[Draw(0, 0, 0)]

    def test_tasks_and_data_must_match(self, make_source: MakeSource, make_task: MakeTask) -> None:
        with pytest.raises(DataError, match="tasks task1 do not match the data of task2"):
            MixedDataset([make_task(1)], [make_source(2)])


class TestBatches:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_s_batches_have_the_mix_the_widths_and_the_masks(
        self, manager: ReplayDatasetManager, workers: int
    ) -> None:
        layout = BatchLayout(8, 2, 1)
        loader = DataLoader(
            MixedDataset.of_manager(manager),
            batch_sampler=manager.sampler(layout, 0),
            collate_fn=collate,
            num_workers=workers,
        )
        batches = list(loader)
        assert len(batches) == 2 * manager.total_steps
        for batch in batches:
            assert sorted(batch[TASK_NUMBER].tolist()) == [1] * 2 + [2] * 6
            assert batch["action"].shape == (8, 4, 20)
            narrow = batch[TASK_NUMBER] == 1
            assert (batch["action_dim_is_pad"].sum(1) == torch.where(narrow, 4, 0)).all()
            assert not batch["action"][narrow][..., 16:].any()
            assert not batch["observation.state_dim_is_pad"].any()
            assert batch["action_is_pad"].dtype == torch.bool
        spoken = {(n, s) for b in batches for n, s in zip(b[TASK_NUMBER].tolist(), b["task"], strict=True)}
        expected = {(1, "do task 1"), (2, "do task 2"), (2, "the second thing"), (2, "number two")}
        assert spoken == expected

    def test_the_same_from_any_step_on(self, manager: ReplayDatasetManager) -> None:
        def frames(first_step: int) -> list[list[int]]:
            sampler = manager.sampler(BatchLayout(16, 1, 1), 0, first_step)
            loader = DataLoader(MixedDataset.of_manager(manager), batch_sampler=sampler, collate_fn=collate)
            return [batch[FRAME].tolist() for batch in loader]

        assert frames(0)[7:] == frames(7)

    def test_validation_uses_the_instruction_only(self, manager: ReplayDatasetManager) -> None:
        draws = validation_draws(manager, manager.stage.task)
        assert {(draw.task, draw.sentence) for draw in draws} == {(1, 0)}
        assert len(draws) == manager.stage.validation.max_frames_per_task

    def test_the_policy_s_processor_takes_such_a_batch(self, manager: ReplayDatasetManager) -> None:
        from kuavo_smolvla_ros.learning.drift import stage_statistics
        from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

        config = manager.stage.policy_config(backbone="tiny", device="cpu", chunk_size=4, n_action_steps=2)
        config.set_features(16, 20, dict(manager.facts.cameras))
        before, _ = make_kuavo_smolvla_pre_post_processors(
            config, statistics=stage_statistics(manager.sources)
        )
        dataset = MixedDataset.of_manager(manager)
        batch = before(collate([dataset[draw] for draw in manager.plan.batch(0)]))
        assert batch["action"].shape == (16, 4, 20)
        assert batch["action_dim_is_pad"].shape == (16, 20)


BASE = ("base_x", "base_y", "base_yaw", "base_move")
UNITS = dict(zip(BASE, ("m", "m", "rad", "flag"), strict=True))


class TestTheBaseOfARobotThatStands:
    @pytest.fixture
    def walking(
        self, make_stage: MakeStage, make_source: MakeSource, make_task: MakeTask
    ) -> ReplayDatasetManager:
        """A robot that stands, and one that also walks."""
        stage = make_stage("0.25", "0.75", tasks=(make_task(1), make_task(2)))
        names = tuple(f"joint_{i}" for i in range(16)) + BASE
        wide = make_source(2, action_dim=20, action_names=names, units=UNITS)
        return ReplayDatasetManager(stage, {"task1": make_source(1), "task2": wide})

    def test_a_robot_without_a_base_says_that_it_stands(self, walking: ReplayDatasetManager) -> None:
        dataset = MixedDataset.of_manager(walking)
        batch = collate([dataset[draw] for draw in walking.plan.batch(0)])
        narrow = batch[TASK_NUMBER] == 1
        assert narrow.any()
        assert not narrow.all()
        assert not batch["action"][narrow][..., 16:].any()
        assert batch["action"][~narrow].eq(2).all()
        assert not batch["action_dim_is_pad"].any(), "what nothing teaches would wander, and the arms with it"

    def test_without_one_that_walks_nothing_is_added(
        self, make_source: MakeSource, make_task: MakeTask
    ) -> None:
        dataset = MixedDataset([make_task(1)], [make_source(1)])
        batch = collate([dataset[Draw(0, 0, 0)]])
        assert batch["action"].shape[-1] == 16
        assert not batch["action_dim_is_pad"].any()

    def test_a_batch_of_standing_robots_alone_has_it_too(self, walking: ReplayDatasetManager) -> None:
        """As in validation, where the network must see what it sees in training."""
        dataset = MixedDataset.of_manager(walking)
        batch = collate([dataset[Draw(0, frame, 0)] for frame in range(3)])
        assert batch["action"].shape[-1] == 20
        assert not batch["action_dim_is_pad"].any()

    def test_what_is_behind_a_base_stays_padding(
        self, make_stage: MakeStage, make_source: MakeSource, make_task: MakeTask
    ) -> None:
        names = tuple(f"joint_{i}" for i in range(16)) + BASE + ("neck",)
        wide = make_source(2, action_dim=21, action_names=names, units=UNITS)
        tasks = (make_task(1), make_task(2))
        manager = ReplayDatasetManager(
            make_stage("0.25", "0.75", tasks=tasks), {"task1": make_source(1), "task2": wide}
        )
        batch = collate([MixedDataset.of_manager(manager)[Draw(0, 0, 0)]])
        assert batch["action_dim_is_pad"][0].tolist() == [False] * 20 + [True]
        (sentence,) = Standing(manager.sources).advice()
        assert sentence.startswith("nothing in task1 teaches neck, as other tasks of the stage do")

    def test_a_base_leaves_nothing_unknown(self, walking: ReplayDatasetManager) -> None:
        assert Standing(walking.sources).advice() == []

    def test_it_is_normalised_as_any_other_and_counts(self, walking: ReplayDatasetManager) -> None:
        from kuavo_smolvla_ros.learning.drift import stage_statistics
        from kuavo_smolvla_ros.policy.loss import flow_loss, valid_entries
        from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

        config = walking.stage.policy_config(backbone="tiny", device="cpu", chunk_size=4, n_action_steps=2)
        config.set_features(16, 20, dict(walking.facts.cameras))
        statistics = stage_statistics(walking.sources)
        mean = tuple(0.25 * (place == 19) for place in range(20))
        statistics["action"] = replace(statistics["action"], mean=mean, std=(1.0,) * 19 + (0.5,))
        before, _ = make_kuavo_smolvla_pre_post_processors(config, statistics=statistics)
        dataset = MixedDataset.of_manager(walking)
        batch = before(collate([dataset[Draw(0, frame, 0)] for frame in range(2)]))
        assert batch["action"][..., 19].eq(-0.5).all()  # (0 - 0.25) / 0.5
        assert not batch["action"][..., 16:19].any()
        valid = valid_entries(batch["action_is_pad"], batch["action_dim_is_pad"])
        error = torch.zeros_like(batch["action"])
        error[..., 19] = 1.0
        assert flow_loss(error, torch.zeros_like(error), valid).item() == pytest.approx(1 / 20)


class TestJoining:
    def test_frames_and_episodes_go_on(self, make_source: MakeSource) -> None:
        both = join("task1", [make_source(1, lengths=(3, 4)), make_source(2, lengths=(2, 5))])
        assert both.episodes.tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] * 5
        assert [both.frames[i]["observation.state"][:2].tolist() for i in (0, 6, 7, 13)] == [
            [1, 0],
            [1, 6],
            [2, 0],
            [2, 6],
        ]

    def test_joined_finds_every_frame(self) -> None:
        joined = Joined([range(3), range(10, 11), range(20, 25)])  # type: ignore[list-item]
        assert [joined[i] for i in range(len(joined))] == [0, 1, 2, 10, 20, 21, 22, 23, 24]  # type: ignore[comparison-overlap]

    def test_pooled_statistics_are_those_of_all_frames(self) -> None:
        rng = np.random.default_rng(0)
        parts = [rng.normal(3, 2, (50, 2)), rng.normal(-1, 0.5, (200, 2))]

        def stats(x: np.ndarray) -> dict:
            one = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0)}
            return {"observation.state": one, "action": one}

        pooled, whole = pooled_stats([(stats(x), len(x)) for x in parts]), stats(np.concatenate(parts))
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(pooled["action"][name], whole["action"][name])

    def test_parts_of_one_task_must_agree(self, make_source: MakeSource) -> None:
        with pytest.raises(DataError, match="data set 2 of task1 has 30 frames per second and its first 10"):
            join("task1", [make_source(1), make_source(1, fps=30.0)])
        with pytest.raises(DataError, match="data set 2 of task1 is 20 wide in the action and its first 16"):
            join("task1", [make_source(1), make_source(1, action_dim=20)])

    def test_one_part_is_itself(self, make_source: MakeSource) -> None:
        source = make_source(1)
        assert join("task1", [source]) is source


class TestSource:
    def test_empty(self, make_source: MakeSource) -> None:
        with pytest.raises(DataError, match="the data set of task1 is empty"):
            make_source(1, lengths=())

    def test_frames_without_episode(self, make_source: MakeSource) -> None:
        with pytest.raises(DataError, match="200 frames but episode numbers for 199"):
            replace(make_source(1), episodes=np.zeros(199, np.int64))

    def test_torn_episodes(self, make_source: MakeSource) -> None:
        with pytest.raises(DataError, match="do not stand together"):
            replace(make_source(1, lengths=(2, 2)), episodes=np.array([0, 1, 0, 1]))


@pytest.fixture(scope="module")
def lerobot_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeRobot data set of three episodes of 6, 7 and 8 frames, 16 wide."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = tmp_path_factory.mktemp("lerobot") / "task1"
    names = [f"joint_{i}" for i in range(16)]
    vector = {"dtype": "float32", "shape": (16,), "names": names}
    image = {"dtype": "image", "shape": (8, 12, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector, "action": vector, "observation.images.head_cam_h": image}
    dataset = LeRobotDataset.create("task1", 10, features, root=folder, use_videos=False)
    for episode in range(3):
        for step in range(6 + episode):
            number = np.full(16, 100 * episode + step, np.float32)
            picture = np.full((8, 12, 3), episode, np.uint8)
            dataset.add_frame(
                {
                    "observation.state": number,
                    "action": number + 0.5,
                    "observation.images.head_cam_h": picture,
                    "task": "recorded under another sentence",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return folder


class TestLeRobot:
    def test_facts_and_frames(self, lerobot_folder: Path, make_task: MakeTask) -> None:
        source = open_task(make_task(1, datasets=(str(lerobot_folder),)), chunk_size=4)
        assert source.episodes.tolist() == [0] * 6 + [1] * 7 + [2] * 8
        assert (source.facts.fps, source.facts.cameras) == (10.0, {"head_cam_h": (8, 12)})
        assert source.facts.action_names == tuple(f"joint_{i}" for i in range(16))
        assert source.facts.fingerprint is None
        sample = source.frames[11]  # episode 1, step 5 of 7
        assert sample["action"][:, 0].tolist() == [105.5, 106.5, 106.5, 106.5]
        assert sample["action_is_pad"].tolist() == [False, False, True, True]

    def test_through_a_stage(self, lerobot_folder: Path, make_task: MakeTask, make_stage: MakeStage) -> None:
        task = make_task(1, datasets=(str(lerobot_folder),))
        stage = make_stage("1", tasks=(task,))
        manager = ReplayDatasetManager(stage, {"task1": open_task(task, 4)})
        dataset = MixedDataset.of_manager(manager)
        loader = DataLoader(
            dataset, batch_sampler=manager.sampler(BatchLayout(8, 2, 1), 0), collate_fn=collate
        )
        batches = list(loader)
        assert len(batches) == 2 * manager.total_steps
        held = set(manager.splits[0].held_out_episodes)
        for batch in batches:
            assert batch["observation.images.head_cam_h"].shape == (8, 3, 8, 12)
            assert set(batch["task"]) == {"do task 1"}
            assert not held & set((batch["observation.state"][:, 0] // 100).int().tolist())

    def test_two_data_sets_of_one_task(
        self, lerobot_folder: Path, make_task: MakeTask, tmp_path: Path
    ) -> None:
        import shutil

        copy = shutil.copytree(lerobot_folder, tmp_path / "more")
        source = open_task(make_task(1, datasets=(str(lerobot_folder), str(copy))), 4)
        assert len(source.frames) == 42
        assert source.episodes[-1] == 5
        assert source.frames[21 + 11]["observation.state"][0] == 105
        np.testing.assert_allclose(source.stats["action"]["max"], 207.5)

    def test_the_robot_a_data_set_names(
        self, lerobot_folder: Path, make_task: MakeTask, tmp_path: Path
    ) -> None:
        import shutil

        folder = shutil.copytree(lerobot_folder, tmp_path / "named")
        joints = [[f"joint_{i}", "rad"] for i in range(16)]
        identity = {"fingerprint": "0123456789abcdef", "identity": {"state": joints, "action": joints}}
        (folder / "meta" / "kuavo.json").write_text(json.dumps(identity))
        facts = open_task(make_task(1, datasets=(str(folder),)), 4).facts
        assert facts.fingerprint == "0123456789abcdef"
        assert facts.units["joint_3"] == "rad"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("datasets/not/there", "the data set of task1 is not at datasets/not/there"),
            ("datasets/task1", "the data set of task1 is not at datasets/task1"),
            ("/nowhere", "the data set of task1 is not at /nowhere"),
            ("nowhere", "the data set of task1 is not at nowhere"),
            ("./nowhere", "the data set of task1 is not at ./nowhere"),
        ],
    )
    def test_a_missing_data_set(self, make_task: MakeTask, name: str, message: str) -> None:
        with pytest.raises(DataError, match=message) as raised:
            open_task(make_task(1, datasets=(name,)), 4)
        assert "data.root" in str(raised.value)

    def test_a_folder_that_is_no_data_set(self, make_task: MakeTask, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"is no LeRobot data set \(meta/info.json is missing\)"):
            open_task(make_task(1, datasets=(str(tmp_path),)), 4)

    def test_a_hub_id_that_cannot_be_reached(self, make_task: MakeTask) -> None:
        with pytest.raises(DataError, match="the data set nobody/nothing of task1") as raised:
            open_task(make_task(1, datasets=("nobody/nothing",)), 4)
        assert "\n" not in str(raised.value)
