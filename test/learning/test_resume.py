"""Killed at any step and started again, a run goes on to the same numbers; and on any number of devices."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kuavo_smolvla_ros.learning.outputs import read_rows

PROGRAM = Path(__file__).parents[2] / "training" / "rehearse_curriculum.py"
OPTIONS = ("--stages", "1", "--epochs", "1", "--save-steps", "3", "--log-steps", "1")
STEPS = 12
Start = Callable[..., Any]


def argv(output: Path, *options: str) -> list[str]:
    return [str(PROGRAM), "--output", str(output), *OPTIONS, *options]


def finish(process: Any, printed: Path) -> str:
    """What a program printed, once it has ended well."""
    process.join(250)
    text = printed.read_text()
    assert process.exitcode == 0, text[-3000:]
    return text


def losses(folder: Path) -> list[tuple[int, Any]]:
    """Every number that training produced, without the times it took."""
    return [
        (row["step"], row["loss"] if row["kind"] == "train" else row["tasks"])
        for row in read_rows(folder)
        if row["kind"] in ("train", "validation")
    ]


def wait_for_step(folder: Path, step: int, process: Any, printed: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        rows = read_rows(folder, "train")
        if rows and rows[-1]["step"] >= step:
            return
        assert process.is_alive(), printed.read_text()[-3000:]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def whole(start_program: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The first stage without any interruption, by its options; made once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*options: str) -> Path:
        if options not in made:
            output = tmp_path_factory.mktemp("whole")
            finish(start_program(argv(output, *options), output / "out"), output / "out")
            made[options] = output / "task1"
        return made[options]

    return make


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGKILL, ()), (signal.SIGTERM, ()), (signal.SIGKILL, ("--lora", "4"))],
    ids=["SIGKILL", "SIGTERM", "SIGKILL with an adapter"],
)
def test_stopped_at_any_step_it_goes_on_to_the_same_losses_and_weights(
    tmp_path: Path,
    start_program: Start,
    whole: Callable[..., Path],
    number: signal.Signals,
    options: tuple[str, ...],
) -> None:
    uninterrupted, folder, printed = whole(*options), tmp_path / "task1", tmp_path / "out"
    step = random.Random(os.urandom(8)).randint(1, STEPS - 2)
    process = start_program(argv(tmp_path, *options), printed)
    wait_for_step(folder, step, process, printed)
    os.kill(process.pid, number)
    process.join(120)
    stopped = read_rows(folder, "train")[-1]["step"]
    assert stopped < STEPS, "it finished before the signal came: nothing was tested"
    if number == signal.SIGTERM:
        assert process.exitcode == 0, printed.read_text()
        assert f"stopped by SIGTERM after step {stopped}, saved" in printed.read_text()
        progress = json.loads((folder / "last" / "training_state" / "progress.json").read_text())
        assert progress["step"] == stopped  # nothing is lost
    else:
        assert process.exitcode == -signal.SIGKILL

    again = finish(start_program(argv(tmp_path, *options), tmp_path / "again"), tmp_path / "again")

    if number == signal.SIGTERM:
        assert f"goes on after step {stopped}" in again
    assert losses(folder) == losses(uninterrupted), f"stopped at {stopped} (asked at {step})"
    states = ["optimizer", "adapter"] if options else ["optimizer"]
    files = ["last/model", "best/model", *(f"last/training_state/{name}" for name in states)]
    for name in files:
        ours, theirs = (load_file(place / f"{name}.safetensors") for place in (folder, uninterrupted))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name


def test_a_finished_run_is_not_repeated(
    tmp_path: Path, start_program: Start, whole: Callable[..., Path]
) -> None:
    uninterrupted = whole()
    before = (uninterrupted / "log.jsonl").read_bytes()
    printed = finish(start_program(argv(uninterrupted.parent), tmp_path / "out"), tmp_path / "out")
    assert "finished already" in printed
    assert (uninterrupted / "log.jsonl").read_bytes() == before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_processes(start_program: Start, output: Path, *options: str) -> None:
    for rank, process in enumerate(begin_two(start_program, output, *options)):
        finish(process, output / f"out{rank}")


def begin_two(start_program: Start, output: Path, *options: str, program: Path | None = None) -> list[Any]:
    """The program twice, as a launcher starts it: each process with its rank, and all with one address."""
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        start_program(
            argv(output, *options) if program is None else [str(program)],
            output / f"out{rank}",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **common,
        )
        for rank in range(2)
    ]


def require_same(folder: Path, uninterrupted: Path, names: tuple[str, ...]) -> None:
    one, two = (read_rows(place, "train") for place in (uninterrupted, folder))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for name in names:
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-5, rel=0)
    one, two = (read_rows(place, "validation") for place in (uninterrupted, folder))
    for a, b in zip(one, two, strict=True):
        assert b["tasks"]["1"]["loss"] == pytest.approx(a["tasks"]["1"]["loss"], abs=1e-5, rel=0)
        assert b["tasks"]["1"]["error_by_joint"] == pytest.approx(a["tasks"]["1"]["error_by_joint"], abs=1e-5)


def test_two_processes_do_what_one_does(
    tmp_path: Path, start_program: Start, whole: Callable[..., Path]
) -> None:
    """The same batch in two halves: gradients are averaged over gloo, losses agree within 1e-5."""
    two_processes(start_program, tmp_path, "--batch-size", "16")
    assert read_rows(tmp_path / "task1", "stage")[0]["batch"]["devices"] == 2
    require_same(tmp_path / "task1", whole(), ("loss",))


def test_a_divided_network_does_what_a_whole_one_does(
    tmp_path: Path, start_program: Start, whole: Callable[..., Path]
) -> None:
    """FSDP in two processes; stopped half-way, it goes on, and its checkpoint is that of any other run."""
    folder, printed = tmp_path / "task1", tmp_path / "out0"
    sharded = ("--batch-size", "16", "--shard")
    ranks = begin_two(start_program, tmp_path, *sharded)
    wait_for_step(folder, 4, ranks[0], printed)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert read_rows(folder, "train")[-1]["step"] < STEPS
    two_processes(start_program, tmp_path, *sharded)
    uninterrupted = whole()
    require_same(folder, uninterrupted, ("loss", "grad_norm"))
    ours, theirs = (load_file(place / "last/model.safetensors") for place in (folder, uninterrupted))
    assert ours.keys() == theirs.keys()
    state = [
        set(load_file(place / "last/training_state/optimizer.safetensors"))
        for place in (folder, uninterrupted)
    ]
    assert state[0] == state[1]


AVERAGED = """
import torch
from torch import nn
from kuavo_smolvla_ros.learning.averaging import ResultWeights
from kuavo_smolvla_ros.learning.sharding import full, shard, whole

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
policy[0].requires_grad_(False)
before = policy[1].weight.detach().clone()
twin = shard(policy, torch.device("cpu"))
trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
assert trained.keys() == {"1.weight", "1.bias"}
result = ResultWeights(trained, 0.5, 0.25)
result.start_from({name: torch.full(p.shape, 8.0) for name, p in trained.items()})
with torch.no_grad():
    for p in trained.values():
        p.add_(4.0)
result.update()  # the average is half-way
with result.in_place(), whole(policy, twin):
    torch.testing.assert_close(policy[1].weight, 0.75 * (before + 2.0) + 0.25 * 8.0)
    assert torch.equal(policy[0].weight, twin[0].weight)
assert policy[1].weight.numel() == 0  # given back
torch.testing.assert_close(full(trained["1.weight"].detach()), before + 4.0)
result.restore({name: torch.zeros(p.shape) for name, p in trained.items()})
assert full(result.average["1.weight"]).abs().sum() == 0
torch.distributed.destroy_process_group()
"""


def test_averages_and_starts_are_divided_as_what_trains(tmp_path: Path, start_program: Start) -> None:
    program = tmp_path / "averaged.py"
    program.write_text(AVERAGED)
    for rank, process in enumerate(begin_two(start_program, tmp_path, program=program)):
        finish(process, tmp_path / f"out{rank}")


def test_accumulating_does_what_one_pass_does(
    tmp_path: Path, start_program: Start, whole: Callable[..., Path]
) -> None:
    options = ("--batch-size", "8", "--workers", "1")
    finish(start_program(argv(tmp_path, *options), tmp_path / "out"), tmp_path / "out")
    one, four = (read_rows(place, "train") for place in (whole(), tmp_path / "task1"))
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in one], abs=1e-5, rel=0)
