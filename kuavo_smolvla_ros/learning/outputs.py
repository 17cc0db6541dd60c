"""The record of a run: one row per event in `log.jsonl`, from which every table, curve and report is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.checkpoint import atomic_file

LOG_FILE = "log.jsonl"
RESULTS_FILE = "training_results.json"
BOARD_FOLDER = "tensorboard"
Row = dict[str, Any]


def read_rows(stage_folder: Path, kind: str | None = None) -> list[Row]:
    """The rows of a run, or those of one kind; a line that a crash cut off is left out."""
    file = stage_folder / LOG_FILE
    if not file.is_file():
        return []
    rows = []
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as fault:
            if number == len(lines):
                break  # without its newline: being written when the process died
            raise UserError(
                f"{file}, line {number}: not JSON ({fault}); restore the file, or delete it"
            ) from fault
    return [row for row in rows if kind is None or row["kind"] == kind]


class RunLog:
    """Appends rows; a run that continues first drops what an earlier one wrote beyond its checkpoint."""

    def __init__(self, stage_folder: Path, step: int) -> None:
        stage_folder.mkdir(parents=True, exist_ok=True)
        file = stage_folder / LOG_FILE
        kept = [row for row in read_rows(stage_folder) if row["step"] <= step] if step else []
        with atomic_file(file) as fresh:
            fresh.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self._stream = file.open("a", encoding="utf-8")
        self._watchers: list[Callable[[Row], None]] = []

    def watch(self, watcher: Callable[[Row], None]) -> None:
        """Have every further row shown to `watcher` too."""
        self._watchers.append(watcher)

    def write(self, kind: str, step: int, **content: Any) -> Row:
        """One row; it is in the file when this returns."""
        row = {"kind": kind, "step": step, **content}
        self._stream.write(_line(row))
        self._stream.flush()
        for watcher in self._watchers:
            watcher(row)
        return row

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


class SilentLog(RunLog):
    """For all processes but the first: the same calls, no file."""

    def __init__(self) -> None:
        pass

    def watch(self, watcher: Callable[[Row], None]) -> None:
        pass

    def write(self, kind: str, step: int, **content: Any) -> Row:
        return {"kind": kind, "step": step, **content}

    def close(self) -> None:
        pass


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What TensorBoard (or any other board) shows of a row, by the names of the guide."""
    if row["kind"] == "train":
        for name in ("loss", "lr", "grad_norm", "samples_per_s", "data_s", "preprocess_s", "update_s"):
            yield f"train/{name}", row[name]
        for name, lr in row["lr_by_group"].items():
            yield f"train/lr_{name}", lr
        for name, value in row.get("numbers", {}).items():  # logs of earlier versions have none
            if name != "loss":
                yield f"train/{name}", value
        for task, loss in row["loss_by_task"].items():
            yield f"train/task{task}_loss", loss
        for task, share in row["realised_shares"].items():
            yield f"replay/task{task}_share", share
    elif row["kind"] == "validation":
        for task, values in row["tasks"].items():
            yield f"validation/task{task}_loss", values["loss"]
            yield f"validation/task{task}_open_loop_error", values["open_loop_error"]
            if values["gripper_accuracy"] is not None:
                yield f"validation/task{task}_gripper_accuracy", values["gripper_accuracy"]


def make_board(stage_folder: Path) -> Callable[[Row], None]:
    """A watcher that writes TensorBoard's files, beginning with all rows there are."""
    from torch.utils.tensorboard import SummaryWriter

    folder = stage_folder / BOARD_FOLDER
    # Written anew from the log: TensorBoard would otherwise show both ends of a run that was continued.
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder))

    def show(row: Row) -> None:
        for name, value in scalars(row):
            writer.add_scalar(name, value, row["step"])
        if row["kind"] != "train":
            writer.flush()

    for row in read_rows(stage_folder):
        show(row)
    return show


def make_wandb(stage_folder: Path, stage_hash: str) -> Callable[[Row], None]:
    """A watcher that sends the same scalars to Weights & Biases; a stage that goes on continues its run."""
    import wandb

    run = wandb.init(
        project="kuavo_smolvla_ros", dir=stage_folder, name=stage_folder.name, id=stage_hash, resume="allow"
    )

    def show(row: Row) -> None:
        values = dict(scalars(row))
        if values:
            run.log(values, step=row["step"])

    return show


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
