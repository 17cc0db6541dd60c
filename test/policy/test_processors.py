from __future__ import annotations

import numpy as np
import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline

from kuavo_smolvla_ros.policy.dimensions import DIMENSION_PADDING, Statistics, StatisticsError
from kuavo_smolvla_ros.policy.images import PIXELS, CameraError
from kuavo_smolvla_ros.policy.language import TOKEN_MASK, TOKENS, InstructionError
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import (
    make_kuavo_smolvla_pre_post_processors,
)
from kuavo_smolvla_ros.policy.steps import NormaliseVectors, PrepareImages, TokenizeInstruction


def stats_of(state_dim=16, action_dim=16, mean=0.5, std=2.0):
    return {
        key: {"mean": np.full(width, mean), "std": np.full(width, std)}
        for key, width in (("observation.state", state_dim), ("action", action_dim))
    }


def test_lerobots_factory_gives_ours(make_config):
    """A configuration derived from lerobot's SmolVLAConfig would get lerobot's, without a word."""
    before, after = make_pre_post_processors(make_config(), dataset_stats=stats_of())
    kinds = {type(step) for step in before.steps}
    assert {TokenizeInstruction, PrepareImages, NormaliseVectors} <= kinds
    assert type(after.steps[0]).__module__.startswith("kuavo_smolvla_ros.")


def test_batch_in_and_actions_out(make_config, make_raw):
    before, after = make_kuavo_smolvla_pre_post_processors(make_config(), stats_of())
    raw = make_raw()
    batch = before(dict(raw))
    assert batch[PIXELS].shape == (3, 2, 3, 64, 64)
    assert batch[TOKENS].shape == batch[TOKEN_MASK].shape == (3, 48)
    assert torch.allclose(batch["action"], (raw["action"] - 0.5) / 2.0)
    assert torch.allclose(batch["observation.state"], (raw["observation.state"] - 0.5) / 2.0)
    assert torch.equal(batch["action_is_pad"], raw["action_is_pad"])
    assert not any(key.startswith("observation.images.") for key in batch)
    assert torch.allclose(after(batch["action"]), raw["action"], atol=1e-5)


def test_one_observation_gets_its_batch_axis(make_config):
    before, _ = make_kuavo_smolvla_pre_post_processors(make_config(), stats_of())
    raw = {
        "observation.state": torch.zeros(16),
        "task": "go",
        "observation.images.head_cam_h": torch.zeros(48, 64, 3, dtype=torch.uint8),
        "observation.images.wrist_cam_l": torch.zeros(48, 64, 3, dtype=torch.uint8),
    }
    batch = before(raw)
    assert batch["observation.state"].shape == (1, 16)
    assert batch[PIXELS].shape == (1, 2, 3, 64, 64)
    assert batch[TOKENS].shape == (1, 48)


def test_padded_dimensions_stay_zero_after_normalisation(make_config, make_raw):
    before, _ = make_kuavo_smolvla_pre_post_processors(make_config(action_dim=20), stats_of(action_dim=20))
    raw = make_raw(action_dim=20)
    raw[DIMENSION_PADDING["action"]] = (torch.arange(20) >= 16).expand(3, -1)
    batch = before(raw)
    assert batch["action"][:, :, 16:].eq(0).all()
    assert batch["action"][:, :, :16].abs().min() > 0
    assert torch.equal(batch[DIMENSION_PADDING["action"]], raw[DIMENSION_PADDING["action"]])


def test_statistics_are_needed(make_config):
    with pytest.raises(StatisticsError, match="pass dataset_stats"):
        make_kuavo_smolvla_pre_post_processors(make_config())


@pytest.mark.parametrize("missing", ["observation.state", "action"])
def test_every_feature_needs_them(make_config, missing):
    stats = stats_of()
    del stats[missing]
    with pytest.raises(StatisticsError, match=f"for {missing}"):
        make_kuavo_smolvla_pre_post_processors(make_config(), stats)


def test_a_value_wider_than_its_statistics_is_refused(make_config, make_raw):
    before, _ = make_kuavo_smolvla_pre_post_processors(make_config(), stats_of())
    with pytest.raises(StatisticsError, match="action is 20 wide but statistics exist for 16"):
        before(make_raw(action_dim=20))


def test_the_instructions_are_checked_before_any_batch(make_config):
    with pytest.raises(InstructionError, match="tokenizer_max_length to at least"):
        make_kuavo_smolvla_pre_post_processors(make_config(tokenizer_max_length=8), stats_of())
    make_kuavo_smolvla_pre_post_processors(
        make_config(tokenizer_max_length=8, instructions=["go"]), stats_of()
    )


def test_a_batch_with_an_instruction_that_is_too_long_is_refused(make_config, make_raw):
    before, _ = make_kuavo_smolvla_pre_post_processors(make_config(), stats_of())
    raw = make_raw()
    raw["task"][1] = "put the parcel there " * 40
    with pytest.raises(InstructionError, match="put the parcel there"):
        before(raw)


def test_cameras_are_bound_by_name(make_config, make_raw):
    before, _ = make_kuavo_smolvla_pre_post_processors(make_config(), stats_of())
    raw = make_raw()
    shuffled = dict(sorted(raw.items(), reverse=True))
    assert torch.equal(before(shuffled)[PIXELS], before(dict(raw))[PIXELS])
    raw["observation.images.front"] = raw.pop("observation.images.head_cam_h")
    with pytest.raises(CameraError, match="missing: head_cam_h; not known to the policy: front"):
        before(raw)


class TestStored:
    @pytest.fixture
    def folder(self, make_config, tmp_path):
        for pipeline in make_kuavo_smolvla_pre_post_processors(make_config(), stats_of()):
            pipeline.save_pretrained(tmp_path)
        return tmp_path

    def load(self, folder, **overrides):
        return PolicyProcessorPipeline.from_pretrained(
            folder, "policy_preprocessor.json", overrides=overrides
        )

    def test_gives_the_same_batch(self, folder, make_config, make_raw):
        before, _ = make_kuavo_smolvla_pre_post_processors(make_config(), stats_of())
        expected, got = before(make_raw()), self.load(folder)(make_raw())
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert torch.equal(value, got[key]) if isinstance(value, torch.Tensor) else value == got[key], key

    def test_statistics_of_another_data_set_do_not_replace_the_stored(self, folder, caplog):
        """lerobot-train passes the data set's statistics whenever it continues from a checkpoint."""
        overrides = {"stats": stats_of(mean=9.0), "features": {}, "norm_map": {}}
        step = self.load(folder, normalizer_processor=overrides).steps[-1]
        assert step.statistics["action"].mean == (0.5,) * 16
        assert "keeping the checkpoint's normalisation statistics of action" in caplog.text

    def test_they_serve_for_dimensions_not_seen_before(self, folder, caplog):
        overrides = {"stats": stats_of(action_dim=20, mean=0.5), "features": {}, "norm_map": {}}
        step = self.load(folder, normalizer_processor=overrides).steps[-1]
        assert step.statistics["action"].width == 20
        assert not caplog.text

    def test_the_statistics_travel(self, folder):
        assert self.load(folder).steps[-1].statistics == Statistics.from_dataset(
            stats_of(), {"observation.state": 16, "action": 16}
        )

    def test_lerobot_reads_the_files(self, folder, make_config):
        before, after = make_pre_post_processors(make_config(), str(folder))
        assert len(before.steps) == 6
        assert len(after.steps) == 2
