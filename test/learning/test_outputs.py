"""The log is the one source; everything else is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.outputs import LOG_FILE, RunLog, make_board, read_rows, scalars


def train_row(step: int, **content: Any) -> dict[str, Any]:
    return {
        "loss": 0.5,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "samples_per_s": 9.0,
        "data_s": 0.1,
        "preprocess_s": 0.1,
        "update_s": 0.8,
        "lr_by_group": {"main": 1e-4, "vision": 1e-5},
        "loss_by_task": {"1": 0.4, "2": 0.6},
        "realised_shares": {"1": 0.25, "2": 0.75},
        **content,
    }


def validation_row(**tasks: float) -> dict[str, Any]:
    return {
        "tasks": {
            number.removeprefix("t"): {"loss": loss, "open_loop_error": 0.1, "gripper_accuracy": None}
            for number, loss in tasks.items()
        }
    }


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write("train", 1, loss=0.5)
    assert read_rows(tmp_path) == [{"kind": "train", "step": 1, "loss": 0.5}]
    log.close()


def test_what_was_written_beyond_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in range(6):
        log.write("train", step)
    log.close()
    again = RunLog(tmp_path, 3)
    again.write("train", 4, again=True)
    again.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_rows(tmp_path)[-1]["again"]


def test_a_run_from_the_start_begins_an_empty_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write("validation", 0)
    log.close()
    RunLog(tmp_path, 0).close()
    assert read_rows(tmp_path) == []


@given(cut=st.integers(0, 200))
def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("log")
    lines = [json.dumps({"kind": "train", "step": step, "text": "ü" * step}) for step in range(4)]
    whole = ("\n".join(lines) + "\n").encode()
    kept = whole[: min(cut, len(whole))]
    (folder / LOG_FILE).write_bytes(kept)
    try:
        text = kept.decode()
    except UnicodeDecodeError:
        text = kept[: kept.rindex(b"\xc3")].decode()
    complete = text.count("\n") + (1 if text.rsplit("\n", 1)[-1] in lines else 0)
    assert [row["step"] for row in read_rows(folder)] == list(range(complete))


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"kind": "train", "step": 1}\nbroken\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"log.jsonl, line 2: not JSON"):
        read_rows(tmp_path)


def test_what_is_not_a_number_never_reaches_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    with pytest.raises(ValueError, match="Out of range float"):
        log.write("train", 1, loss=float("nan"))
    log.close()


def test_scalars_have_the_names_of_the_guide() -> None:
    train = dict(scalars({"kind": "train", "step": 1, **train_row(1)}))
    assert train["train/loss"] == 0.5
    assert train["train/lr"] == 1e-4
    assert train["train/lr_vision"] == 1e-5
    assert train["replay/task2_share"] == 0.75
    validation = dict(scalars({"kind": "validation", "step": 1, **validation_row(t1=0.2, t4=0.9)}))
    assert validation["validation/task1_loss"] == 0.2
    assert validation["validation/task4_loss"] == 0.9
    assert not any("gripper" in name for name in validation)  # there was none
    assert list(scalars({"kind": "stage", "step": 0})) == []


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_board_of_a_continued_run_shows_each_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.watch(make_board(tmp_path))
    for step in (1, 2, 3):
        log.write("train", step, **train_row(step, loss=float(step)))
    log.close()
    log = RunLog(tmp_path, 2)
    log.watch(make_board(tmp_path))
    log.write("train", 3, **train_row(3, loss=30.0))
    log.write("validation", 3, **validation_row(t1=0.25))
    log.close()
    shown = board(tmp_path)
    assert shown["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert shown["validation/task1_loss"] == [(3, 0.25)]
