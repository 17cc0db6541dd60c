from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.build import WeightsError
from kuavo_smolvla_ros.policy.checkpoint import (
    CheckpointError,
    atomic_file,
    atomic_folder,
    packed,
    read_json,
    read_statistics,
    require_robot,
)
from kuavo_smolvla_ros.policy.dimensions import Statistics, StatisticsError
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.network import LM_HEAD
from kuavo_smolvla_ros.policy.runtime import PolicyRunner

FILES = {
    "config.json",
    "model.safetensors",
    "statistics.json",
    "checkpoint.json",
    "policy_preprocessor.json",
    "policy_postprocessor.json",
}
ROBOT = "0123abcd"


def images(policy):
    random = np.random.default_rng(0)
    return {name: random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in policy.config.cameras}


@pytest.fixture
def saved(make_policy, tmp_path):
    policy = make_policy(robot_fingerprint=ROBOT, unfreeze_vision_layers=[-1], train_expert_only=False)
    policy.statistics = Statistics.from_dataset(
        {
            key: {"mean": np.linspace(-1, 1, 16), "std": np.linspace(0.5, 2, 16)}
            for key in policy.config.widths
        },
        policy.config.widths,
    )
    policy.save_pretrained(tmp_path / "saved")
    return policy, tmp_path / "saved"


class TestRoundTrip:
    def test_same_parameters_and_same_chunk(self, saved, make_batch):
        policy, folder = saved
        again = KuavoSmolVLAPolicy.from_pretrained(folder)
        for (name, before), (_, after) in zip(
            policy.named_parameters(), again.named_parameters(), strict=True
        ):
            assert after.dtype == torch.float32
            assert name.endswith(LM_HEAD) or torch.equal(before, after), name
        batch = make_batch(policy)
        assert torch.equal(
            again.predict_action_chunk(batch, seed=1), policy.predict_action_chunk(batch, seed=1)
        )
        assert not again.training

    def test_saving_again_writes_the_same_bytes(self, saved, tmp_path):
        _, folder = saved
        KuavoSmolVLAPolicy.from_pretrained(folder).save_pretrained(tmp_path / "again")
        for file in folder.iterdir():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name

    def test_files(self, saved):
        policy, folder = saved
        names = {file.name for file in folder.iterdir()}
        assert names >= FILES
        assert not [name for name in names if name.startswith(".")]
        identity = read_json(folder / "checkpoint.json")
        assert identity["robot_fingerprint"] == ROBOT
        assert identity["statistics_sha256"] == policy.statistics.sha256
        assert identity["freezing"] == policy.freezing.to_dict()

    def test_nothing_of_this_machine_is_written(self, saved, tmp_path):
        _, first = saved
        config = KuavoSmolVLAPolicy.from_pretrained(first).config
        config.init_from, config.pretrained_path = str(first), first
        KuavoSmolVLAPolicy.from_pretrained(first, config=config).save_pretrained(folder := tmp_path / "again")
        for file in folder.glob("*.json"):
            assert os.path.expanduser("~") not in file.read_text(), file.name
            assert str(tmp_path) not in file.read_text(), file.name

    def test_loads_without_the_backbone(self, saved, tmp_path):
        """Sizes and tokenizer travel with the checkpoint: another process without any backbone can run it."""
        _, folder = saved
        program = (
            "import sys, numpy as np\n"
            "import kuavo_smolvla_ros.policy.backbone as backbone\n"
            "def gone(*a, **k): raise RuntimeError('the backbone was asked for')\n"
            "backbone.resolve_backbone = gone\n"
            "from kuavo_smolvla_ros.policy.runtime import PolicyRunner\n"
            "runner = PolicyRunner.load(sys.argv[1])\n"
            "image = np.zeros((48, 64, 3), dtype=np.uint8)\n"
            "images = {name: image for name in runner.policy.config.cameras}\n"
            "print(runner.chunk(images, np.zeros(16), 'go', seed=0).shape)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program, folder], capture_output=True, text=True, check=False
        )
        assert result.stdout.strip() == "(50, 16)", result.stderr

    def test_wider_actions_continue_from_narrower(self, saved):
        policy, folder = saved
        from kuavo_smolvla_ros.policy.plain_smolvla import read_config

        config = read_config(folder).config
        config.set_features(16, 20, {"head_cam_h": (48, 64), "wrist_cam_l": (48, 64)})
        stats = {
            "observation.state": {"mean": np.full(16, 9.0), "std": np.full(16, 9.0)},
            "action": {"mean": np.full(20, 9.0), "std": np.full(20, 9.0)},
        }
        wider = KuavoSmolVLAPolicy.from_pretrained(folder, config=config, dataset_stats=stats)
        assert wider.statistics["action"].mean[:16] == policy.statistics["action"].mean
        assert wider.statistics["action"].mean[16:] == (9.0,) * 4
        assert wider.statistics["observation.state"] == policy.statistics["observation.state"]

    def test_init_from_takes_weights_and_statistics(self, saved, make_config):
        policy, folder = saved
        stats = {key: {"mean": np.zeros(16), "std": np.ones(16)} for key in policy.config.widths}
        new = KuavoSmolVLAPolicy(make_config(init_from=str(folder)), dataset_stats=stats)
        assert torch.equal(new.model.state_proj.weight, policy.model.state_proj.weight)
        assert new.statistics == policy.statistics

    def test_overrides_replace_fields(self, saved):
        _, folder = saved
        again = KuavoSmolVLAPolicy.from_pretrained(folder, overrides={"num_steps": 4, "n_action_steps": 1})
        assert (again.config.num_steps, again.config.n_action_steps) == (4, 1)


class TestHead:
    def test_is_not_saved(self, saved):
        _, folder = saved
        assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
        assert not KuavoSmolVLAPolicy.from_pretrained(folder).has_lm_head

    def test_is_saved_if_asked(self, make_policy, tmp_path):
        policy = make_policy(save_lm_head=True)
        policy.save_pretrained(tmp_path)
        again = KuavoSmolVLAPolicy.from_pretrained(tmp_path)
        assert torch.equal(
            again.model.vlm_with_expert.vlm.lm_head.weight, policy.model.vlm_with_expert.vlm.lm_head.weight
        )

    def test_cannot_be_saved_where_it_was_never_loaded(self, saved, tmp_path):
        _, folder = saved
        again = KuavoSmolVLAPolicy.from_pretrained(folder, overrides={"save_lm_head": True})
        with pytest.raises(UserError, match="without lm_head"):
            again.save_pretrained(tmp_path / "again")


class TestRefusals:
    def test_without_statistics_nothing_is_saved(self, make_config, tmp_path):
        with pytest.raises(UserError, match="no normalisation statistics"):
            KuavoSmolVLAPolicy(make_config()).save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()

    def test_statistics_too_narrow_are_not_saved(self, make_policy, tmp_path):
        policy = make_policy()
        policy.statistics = Statistics.identity({"observation.state": 16, "action": 12})
        with pytest.raises(StatisticsError, match="action is 16 wide but statistics exist for 12"):
            policy.save_pretrained(tmp_path)

    @pytest.mark.parametrize("part", ["mean", "std"])
    def test_changed_statistics_are_noticed(self, saved, part):
        _, folder = saved
        content = read_json(folder / "statistics.json")
        content["features"]["action"][part][3] += 0.5
        (folder / "statistics.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"hash that statistics\.json states"):
            KuavoSmolVLAPolicy.from_pretrained(folder)

    def test_statistics_of_another_checkpoint_are_noticed(self, saved, make_policy, tmp_path):
        _, folder = saved
        make_policy().save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "statistics.json", folder)
        with pytest.raises(CheckpointError, match=r"hash that checkpoint\.json states"):
            read_statistics(folder)

    def test_a_preprocessor_of_another_checkpoint_is_noticed(self, saved, make_policy, tmp_path):
        _, folder = saved
        make_policy().save_pretrained(tmp_path / "other")
        for file in (tmp_path / "other").glob("policy_preprocessor*"):
            shutil.copy(file, folder)
        with pytest.raises(CheckpointError, match="does not normalise with the checkpoint's statistics"):
            PolicyRunner.load(folder)

    @pytest.mark.parametrize(
        "file", ["config.json", "model.safetensors", "statistics.json", "checkpoint.json"]
    )
    def test_a_missing_file_is_named(self, saved, file):
        _, folder = saved
        (folder / file).unlink()
        with pytest.raises(UserError, match=f"holds no {file}"):
            KuavoSmolVLAPolicy.from_pretrained(folder)

    def test_weights_of_another_backbone_are_refused(self, saved):
        _, folder = saved
        config = read_json(folder / "config.json")
        config["architecture"]["text"]["layers"] = 2
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="not known"):
            KuavoSmolVLAPolicy.from_pretrained(folder)

    def test_another_policys_checkpoint_is_refused(self, saved):
        _, folder = saved
        (folder / "config.json").write_text(json.dumps({"type": "act"}))
        with pytest.raises(CheckpointError, match="type 'act'"):
            KuavoSmolVLAPolicy.from_pretrained(folder)

    def test_a_checkpoint_that_cannot_be_fetched_is_one_sentence(self):
        with pytest.raises(CheckpointError, match="HF_HOME, or set HF_ENDPOINT"):
            KuavoSmolVLAPolicy.from_pretrained("nobody/nothing")

    def test_another_robot_is_refused(self, saved):
        _, folder = saved
        with pytest.raises(CheckpointError, match=rf"{ROBOT}, this robot's is ffff"):
            PolicyRunner.load(folder, robot_fingerprint="ffff")
        PolicyRunner.load(folder, robot_fingerprint=ROBOT)
        with pytest.raises(CheckpointError, match="does not say for which robot"):
            require_robot(None, ROBOT)


class TestRunner:
    def test_speaks_robot_units(self, saved, make_raw):
        """The same answer as by hand: pipelines, normalised chunk, back to units."""
        policy, folder = saved
        runner = PolicyRunner.load(folder)
        state = np.linspace(-1, 1, 16, dtype=np.float32)
        actions = runner.chunk(images(policy), state, "pick up the parcel", seed=3)
        batch = runner.preprocessor(
            {
                "observation.state": torch.from_numpy(state),
                "task": "pick up the parcel",
                **{f"observation.images.{n}": torch.from_numpy(i) for n, i in images(policy).items()},
            }
        )
        mean, std = policy.statistics["action"].tensors(16, torch.device("cpu"))
        expected = policy.predict_action_chunk(batch, seed=3)[0] * std + mean
        assert np.allclose(actions, expected.numpy(), atol=1e-6)
        assert actions.shape == (50, 16)
        assert actions.dtype == np.float32

    def test_the_prefix_is_in_robot_units_too(self, saved):
        policy, folder = saved
        runner = PolicyRunner.load(folder)
        before = runner.chunk(images(policy), np.zeros(16), "go", seed=1)
        free = runner.chunk(images(policy), np.zeros(16), "go", seed=2)
        after = runner.chunk(images(policy), np.zeros(16), "go", seed=2, prefix=before[8:], delay=3)
        assert np.abs(after[:3] - before[8:11]).max() < 0.1 * np.abs(free[:3] - before[8:11]).max()

    @pytest.mark.parametrize(
        ("state", "complaint"), [(np.zeros(15), r"shape \(15,\)"), (np.full(16, np.nan), "not finite")]
    )
    def test_a_wrong_state_is_refused(self, saved, state, complaint):
        policy, folder = saved
        with pytest.raises(UserError, match=complaint):
            PolicyRunner.load(folder).chunk(images(policy), state, "go")

    def test_an_instruction_that_is_too_long_is_refused(self, saved):
        policy, folder = saved
        with pytest.raises(UserError, match="tokenizer_max_length"):
            PolicyRunner.load(folder).chunk(images(policy), np.zeros(16), "put the parcel there " * 40)


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_packing_loses_nothing(self, dtype):
        tensor = torch.randn(100).to(dtype).float()
        stored = packed(tensor)
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), tensor)

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        file = tmp_path / "a"
        file.write_bytes(b"old")

        def fail():
            with atomic_file(file) as fresh:
                fresh.write_bytes(b"new")
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            fail()
        assert file.read_bytes() == b"old"
        assert [f.name for f in tmp_path.iterdir()] == ["a"]
        with atomic_file(file) as fresh:
            fresh.write_bytes(b"new")
        assert file.read_bytes() == b"new"
        assert [f.name for f in tmp_path.iterdir()] == ["a"]

    def test_a_loaded_policy_does_not_depend_on_its_file(self, saved):
        """Tensors read from a file are views of it until they are copied."""
        _, folder = saved
        policy = KuavoSmolVLAPolicy.from_pretrained(folder)
        before = policy.model.state_proj.weight.clone()
        file = folder / "model.safetensors"
        file.write_bytes(bytes(file.stat().st_size))
        assert torch.equal(policy.model.state_proj.weight, before)

    @pytest.mark.parametrize("exists", [False, True])
    def test_a_folder_appears_whole_or_not_at_all(self, tmp_path, exists):
        target = tmp_path / "best"
        if exists:
            target.mkdir()
            (target / "old").touch()

        def fail():
            with atomic_folder(target) as fresh:
                (fresh / "new").touch()
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert target.exists() == exists
        with atomic_folder(target) as fresh:
            (fresh / "new").touch()
        assert [f.name for f in target.iterdir()] == ["new"]
        assert [f.name for f in tmp_path.iterdir()] == ["best"]
