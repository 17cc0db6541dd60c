"""LoRA: only small matrices train, checkpoints are plain policies, and a stage goes on with its adapter."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.adapters import (
    adapted_layers,
    add_adapter,
    merged,
    restore_adapter,
    write_adapter,
)
from kuavo_smolvla_ros.learning.estimate import freezing_of, step_memory
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.outputs import read_rows
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.learning.stage import Adapter, Stage, StageError
from kuavo_smolvla_ros.learning.stage_run import run_stage
from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.runtime import PolicyRunner

STEPS = 6
LORA = Adapter(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"), lr=1e-2)


def lora(stage: Stage, steps: int = STEPS, adapter: Adapter | None = LORA, **training: Any) -> Stage:
    settings = dataclasses.replace(
        stage.training, max_steps=steps, **{"effective_batch_size": 16, **training}
    )
    return dataclasses.replace(stage, training=settings, adapter=adapter)


@pytest.fixture(scope="module")
def stages() -> tuple[Stage, ...]:
    return synthetic_curriculum(freq_epochs=100, noise_samples=1)


@pytest.fixture(scope="module")
def sources() -> dict[str, TaskSource]:
    return conflicting_tasks(["task1", "task2", "task3", "task4"], episodes=5, length=8)


def train(
    stage: Stage,
    sources: dict[str, TaskSource],
    root: Path,
    source: str | None = None,
    interruption: Interruption | None = None,
) -> Any:
    run = synthetic_run(root, batch_size=16, log_freq_steps=1, save_freq_steps=2)
    return run_stage(
        stage,
        sources,
        run,
        root,
        Accelerator(cpu=True),
        source=source,
        when_learnt={},
        interruption=interruption or Interruption(),
        say=lambda text: None,
    )


@pytest.fixture(scope="module")
def two_stages(
    stages: tuple[Stage, ...], sources: dict[str, TaskSource], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Task 1 in full, task 2 with an adapter on top, task 3 with one again."""
    root = tmp_path_factory.mktemp("lora")
    torch.set_num_threads(1)
    train(lora(stages[0], 2, None), sources, root)
    train(lora(stages[1]), sources, root, str(root / "task1/best"))
    train(lora(stages[2], 2), sources, root, str(root / "task2/best"))
    return root


def policy(**fields: Any) -> KuavoSmolVLAPolicy:
    config = synthetic_curriculum()[0].policy_config(device="cpu", **fields)
    config.set_features(6, 6, {"head_cam_h": (32, 32)})
    torch.manual_seed(0)
    return KuavoSmolVLAPolicy(config, statistics=Statistics.identity(config.widths))


def test_adapters_stand_where_the_plan_trains_and_nothing_else_moves() -> None:
    network = (made := policy()).model
    add_adapter(network, made.freezing, LORA)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith(("action_", "state_proj")) for name in trained)
    assert any("vision_model.encoder.layers.3.self_attn.q_proj.lora_A" in name for name in trained)
    assert not any("vision_model.encoder.layers.0." in name for name in trained)  # the plan freezes it
    assert any("lm_expert.layers.0.self_attn.v_proj.lora_B" in name for name in trained)
    groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in made.get_optim_params()}
    assert groups.keys() == {"main", "adapter", "vision_adapter"}
    plan, counts = freezing_of(made.config, LORA)
    assert sum(count.trained for count in counts) == sum(groups.values())
    whole = step_memory(made.config, plan, 2, bfloat16=False)
    small = step_memory(made.config, plan, 2, bfloat16=False, adapter=LORA)
    assert small.moments == 8 * sum(groups.values())
    assert small.moments < whole.moments / 2


def test_what_is_merged_is_a_plain_network_that_does_the_same() -> None:
    made = policy()
    names = list(made.model.state_dict())
    add_adapter(made.model, made.freezing, LORA)
    with torch.no_grad():
        for layer in adapted_layers(made.model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    layer = made.model.expert.layers[0].self_attn.q_proj
    inputs = torch.randn(3, layer.in_features)
    outside, kept = layer(inputs), {name: p.clone() for name, p in made.model.named_parameters()}
    with merged(made.model):
        assert list(made.model.state_dict()) == names
        inside = made.model.expert.layers[0].self_attn.q_proj(inputs)
    torch.testing.assert_close(inside, outside, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer.get_base_layer()(inputs), outside, atol=1e-3)
    after = dict(made.model.named_parameters())
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


def test_an_adapter_in_full_and_on_one_part_only() -> None:
    made = policy()
    add_adapter(made.model, made.freezing, dataclasses.replace(LORA, full=("action_expert", "action_heads")))
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert "vlm_with_expert.lm_expert.layers.0.self_attn.q_proj.weight" in trained
    assert not any(".lora_" in name for name in trained if "lm_expert" in name)
    assert not any(name.startswith("state_proj") for name in trained)


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"target_modules": ("q_proj", "qkv")}, "names qkv, but in what trains .* choose of .*down_proj"),
        ({"full": ("heads",)}, "adapter.full names heads, which is no part of the policy"),
    ],
)
def test_an_adapter_that_would_stand_nowhere_is_refused(adapter: dict[str, Any], sentence: str) -> None:
    made = policy()
    with pytest.raises(StageError, match=sentence):
        add_adapter(made.model, made.freezing, dataclasses.replace(LORA, **adapter))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"target_modules": ()}, "rank of at least 1 and target_modules"),
        ({"alpha": 0.0}, "alpha is above 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"lr": 0.0}, "adapter.lr is 0.0"),
        ({"kind": "dora"}, "there is only lora"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StageError, match=sentence):
        dataclasses.replace(LORA, **fields)


def test_a_result_is_an_ordinary_checkpoint_and_its_base_is_the_stage_before(two_stages: Path) -> None:
    before, after = (
        load_file(two_stages / f"{name}/model.safetensors") for name in ("task1/best", "task2/last")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed
    assert all(
        ".q_proj." in name or ".v_proj." in name or ".action_" in name or ".state_proj" in name
        for name in changed
    )
    assert not any("vision_model.encoder.layers.0." in name for name in changed)
    frame = conflicting_tasks(["task1"], episodes=1, length=2)["task1"].frames[0]
    image = (frame["observation.images.head_cam_h"].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
    runner = PolicyRunner.load(two_stages / "task2/best", device="cpu")
    chunk = runner.chunk({"head_cam_h": image}, frame["observation.state"].numpy(), "raise both arms", seed=0)
    assert chunk.shape == (8, 6)


def test_what_is_kept_for_going_on_is_the_base_to_the_last_bit(two_stages: Path) -> None:
    before = load_file(two_stages / "task1/best/model.safetensors")
    state = load_file(two_stages / "task2/last/training_state/adapter.safetensors")
    bases = {name: tensor for name, tensor in state.items() if ".base_layer." in name}
    assert bases
    for name, tensor in bases.items():
        assert torch.equal(tensor.float(), before["model." + name.replace(".base_layer", "")].float())
    moments = load_file(two_stages / "task2/last/training_state/optimizer.safetensors")
    assert {name.rsplit(".", 1)[0] for name in moments}.isdisjoint(f"model.{name}" for name in bases)


def test_the_next_stage_starts_from_the_merged_weights(two_stages: Path) -> None:
    before = load_file(two_stages / "task2/best/model.safetensors")
    state = load_file(two_stages / "task3/last/training_state/adapter.safetensors")
    assert all(
        torch.equal(tensor.float(), before["model." + name.replace(".base_layer", "")].float())
        for name, tensor in state.items()
        if ".base_layer." in name
    )


def test_rates_and_counts_are_logged(two_stages: Path) -> None:
    row = read_rows(two_stages / "task2", "train")[0]
    assert row["lr_by_group"].keys() == {"main", "adapter", "vision_adapter"}
    ratio = row["lr_by_group"]["adapter"] / row["lr_by_group"]["main"]
    assert ratio == pytest.approx(1e-2 / (3e-3 * 0.7))
    assert row["lr_by_group"]["vision_adapter"] == pytest.approx(row["lr_by_group"]["adapter"] / 10)
    begin = read_rows(two_stages / "task2", "stage")[0]["parameters"]
    assert 0 < begin["text_model"]["trained"] < begin["text_model"]["total"] / 5


def test_an_adapter_that_is_not_this_stages_is_refused(tmp_path: Path) -> None:
    made, other = policy(), policy()
    add_adapter(made.model, made.freezing, LORA)
    write_adapter(tmp_path, made.model)
    add_adapter(other.model, other.freezing, dataclasses.replace(LORA, rank=2))
    with pytest.raises(CheckpointError, match="does not hold this stage's adapter"):
        restore_adapter(tmp_path, other.model)
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the adapter cannot be read"):
        restore_adapter(tmp_path, made.model)


def test_a_result_drawn_back_has_that_much_less_of_what_was_learnt(
    stages: tuple[Stage, ...], sources: dict[str, TaskSource], two_stages: Path, tmp_path: Path
) -> None:
    stage = lora(stages[1], 2, interpolate_previous=0.25)
    train(stage, sources, tmp_path, str(two_stages / "task1/best"))
    start = load_file(two_stages / "task1/best/model.safetensors")
    last, best = (load_file(tmp_path / f"task2/{name}/model.safetensors") for name in ("last", "best"))
    for name in start:
        expected = start[name].float() + 0.75 * (last[name].float() - start[name].float())
        torch.testing.assert_close(best[name].float(), expected, atol=1e-6, rtol=1e-5)


def test_a_stage_whose_adapter_is_gone_does_not_go_on(
    stages: tuple[Stage, ...], sources: dict[str, TaskSource], two_stages: Path, tmp_path: Path
) -> None:
    stopped = Interruption()
    stopped.signal = signal.SIGTERM
    stage, source = lora(stages[1]), str(two_stages / "task1/best")
    assert train(stage, sources, tmp_path, source, stopped) is None
    (tmp_path / "task2/last/training_state/adapter.safetensors").unlink()
    with pytest.raises(UserError, match="the adapter cannot be read"):
        train(stage, sources, tmp_path, source)
