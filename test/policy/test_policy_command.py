"""`kuavo-smolvla policy`, called as a user calls it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kuavo_smolvla_ros.cli import main

NINE = "[-1,-2,-3,-4,-5,-6,-7,-8,-9]"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["policy", *arguments])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def numbers(table: str, part: str) -> list[int]:
    """Parameters, trainable, frozen."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"{part} ")]
    return [int(number) for number in re.sub(",", "", line).split()[1:4]]


def gib(text: str, name: str) -> float:
    match = re.search(rf"^  {re.escape(name)} +([\d.]+) GiB", text, re.MULTILINE)
    assert match is not None
    return float(match[1])


def test_full_size_with_nine_layers(call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = call("--backbone", "smolvlm2-500m", "--unfreeze", NINE, "--batch-size", "1")
    assert (status, err) == (0, "")
    assert "frozen   3/12: 0-2" in out
    assert "unfrozen 9/12: 3-11" in out
    assert numbers(out, "total") == [450_046_176, 370_878_816, 79_167_360]
    assert numbers(out, "vision_layers") == [85_054_464, 63_790_848, 21_263_616]
    assert numbers(out, "lm_head") == [47_308_800, 0, 47_308_800]
    assert numbers(out, "action_expert")[1:] == [98_245_840, 0]
    assert gib(out, "weights") == pytest.approx(450_046_176 * 4 / 2**30, abs=0.01)
    assert gib(out, "gradients") == pytest.approx(370_878_816 * 4 / 2**30, abs=0.01)
    assert gib(out, "AdamW moments") == pytest.approx(370_878_816 * 8 / 2**30, abs=0.01)
    peak = max(gib(out, "peak, backward"), gib(out, "peak, optimizer"))
    assert f"needs about {peak:.1f} GiB" in out


def test_expert_only_trains_what_plain_smolvla_trains(call: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = call("--preset", "expert_only", "--batch-size", "1")
    assert numbers(out, "total") == [450_046_176, 99_880_992, 350_165_184]


@pytest.mark.parametrize(
    ("options", "unfrozen", "by"),
    [
        ((), "3/4: 1-3", "preset balanced"),
        (("--preset", "very_conservative"), "1/4: 3", "preset very_conservative"),
        (("--preset", "expert_only"), "0/4: none", "preset expert_only"),
        (("--episodes", "700"), "2/4: 2-3", "preset conservative"),
        (("--unfreeze", "[-1]"), "1/4: 3", "unfreeze_vision_layers"),
        (("--freeze", "[0, 1]"), "2/4: 2-3", "freeze_vision_layers"),
        (("--ratio", "0.25"), "3/4: 1-3", "freeze_vision_ratio"),
    ],
)
def test_every_way_to_choose(
    call: Callable[..., tuple[int, str, str]], options: tuple[str, ...], unfrozen: str, by: str
) -> None:
    status, out, _ = call("--backbone", "tiny", *options)
    assert status == 0
    assert f"unfrozen {unfrozen}" in out
    assert f"vision encoder of 4 layers, by {by}" in out


def test_batch_cameras_and_precision_change_the_memory(call: Callable[..., tuple[int, str, str]]) -> None:
    def kept(*options: str) -> float:
        _, out, _ = call("--backbone", "tiny", "--batch-size", "400", *options)
        return gib(out, "kept activations")

    usual = kept()
    assert kept("--cameras", "1") < usual < kept("--float32")


def test_warnings_are_printed(call: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = call("--backbone", "tiny", "--unfreeze", "[0]")
    assert "warning: frozen above the trained layer 0: 1-3" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--unfreeze", "[4]"), "unfreeze_vision_layers holds 4, but the vision encoder has 4 layers"),
        (("--unfreeze", "[-1, 3]"), "-1 and 3, which are the same layer"),
        (("--unfreeze", "-1"), "--unfreeze is '-1'; it is a list of layer numbers"),
        (("--unfreeze", "[a]"), "--unfreeze is '[a]'"),
        (("--freeze", '{"a": 1}'), "--freeze is"),
        (("--freeze", "[0.5]"), "holds 0.5"),
        (("--ratio", "1.5"), "freeze_vision_ratio is 1.5"),
        (("--ratio", "nan"), "freeze_vision_ratio is nan"),
        (("--episodes", "0"), "0 episodes"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--cameras", "-1"), "--cameras is -1"),
        (("--preset", "bold"), "invalid choice: 'bold'"),
        (("--ratio", "0.5", "--preset", "balanced"), "not allowed with argument"),
        (("--unfreeze", "[0]", "--freeze", "[1]"), "not allowed with argument"),
        (("--checkpoint", "somewhere"), "not allowed with argument"),
    ],
)
def test_wrong_use_is_status_2_and_one_sentence(
    call: Callable[..., tuple[int, str, str]], options: tuple[str, ...], message: str
) -> None:
    status, out, err = call("--backbone", "tiny", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone", "./nowhere"), "the backbone folder ./nowhere does not exist"),
        (("--backbone", "owner/model"), "HF_ENDPOINT"),
        (("--checkpoint", "nowhere"), "nowhere holds no config.json"),
    ],
)
def test_a_model_that_is_not_there_is_status_1(
    call: Callable[..., tuple[int, str, str]], options: tuple[str, ...], message: str
) -> None:
    status, out, err = call(*options)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_help_shows_an_example(call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = call("--help")
    assert status == 0
    assert f"kuavo-smolvla policy --backbone smolvlm2-500m --unfreeze '{NINE}'" in out


# Checkpoints


@pytest.fixture
def checkpoint(make_policy: Callable[..., Any], tmp_path: Path) -> Path:
    policy = make_policy(unfreeze_vision_layers=[-1], train_expert_only=False)
    policy.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_tells_its_own_freezing_and_what_is_in_its_file(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path
) -> None:
    status, out, err = call("--checkpoint", str(checkpoint))
    assert (status, err) == (0, "")
    assert "backbone tiny" in out
    assert "unfrozen 1/4: 3" in out
    assert "lm_head" not in out  # not saved
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    assert numbers(out, "total")[0] == sum(tensor.numel() for tensor in weights.values())


def test_another_freezing_of_a_checkpoint(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path
) -> None:
    _, out, _ = call("--checkpoint", str(checkpoint), "--ratio", "0.5")
    assert "unfrozen 2/4: 2-3" in out


def test_parts_that_were_added_are_counted(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path
) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), "model.delta_expert.weight": torch.zeros(3, 5)}, file)
    identity = json.loads((checkpoint / "checkpoint.json").read_text())
    identity["freezing"]["extra_parts"] = {"delta_expert": True}
    (checkpoint / "checkpoint.json").write_text(json.dumps(identity))
    status, out, _ = call("--checkpoint", str(checkpoint))
    assert status == 0
    assert numbers(out, "delta_expert") == [15, 15, 0]
    assert "not estimated" in out


def test_a_checkpoint_whose_plan_was_tampered_with_is_status_1(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path
) -> None:
    identity = json.loads((checkpoint / "checkpoint.json").read_text())
    identity["freezing"]["frozen_layers"] = [0]
    (checkpoint / "checkpoint.json").write_text(json.dumps(identity))
    status, _, err = call("--checkpoint", str(checkpoint))
    assert status == 1
    assert "lists [0] as frozen" in err


def test_a_checkpoint_without_weights_is_status_1(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path
) -> None:
    (checkpoint / "model.safetensors").unlink()
    status, _, err = call("--checkpoint", str(checkpoint))
    assert status == 1
    assert "holds no model.safetensors" in err
