"""Figures from several machines come together where they are of the same conditions, and only there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.experiment.measured import (
    FIGURES,
    HELD_OUT,
    OTHERS,
    OTHERS_HELD_OUT,
    Conditions,
    Measured,
    kept,
    machine,
)
from kuavo_smolvla_ros.experiment.play import Manner
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.experiment.trials import TrialSettings
from kuavo_smolvla_ros.experiment.ways import WAYS, TrainingSettings

CONDITIONS = Conditions(200, SeeingSettings(), TrainingSettings(), TrialSettings())
TALLIES = st.fixed_dictionaries({"successes": st.integers(0, 50), "machine": st.sampled_from(["a", "b"])})
TASKS = st.integers(1, 4)
MEASURED = st.builds(
    Measured,
    st.dictionaries(st.tuples(st.sampled_from(WAYS), st.integers(0, 3), TASKS), TALLIES),
    st.dictionaries(st.tuples(st.sampled_from([HELD_OUT, OTHERS, OTHERS_HELD_OUT]), TASKS), TALLIES),
)


@given(measured=MEASURED)
@settings(deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, measured: Measured) -> None:
    folder = tmp_path_factory.mktemp("figures")
    measured.write(folder, CONDITIONS)
    assert kept(folder, CONDITIONS) == (measured, None)


@given(new=MEASURED, old=MEASURED)
def test_what_is_measured_anew_holds_and_the_rest_stays(new: Measured, old: Measured) -> None:
    both = new.over(old)
    assert both.cells.keys() == new.cells.keys() | old.cells.keys()
    assert all(both.cells[cell] == new.cells.get(cell, old.cells.get(cell)) for cell in both.cells)
    assert all(both.spoken[what] == new.spoken.get(what, old.spoken.get(what)) for what in both.spoken)


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert kept(tmp_path, CONDITIONS) == (Measured(), None)


@pytest.mark.parametrize(
    ("conditions", "named"),
    [
        (replace(CONDITIONS, demonstrations=100), "demonstrations"),
        (replace(CONDITIONS, seeing=SeeingSettings(steps=1)), "seeing.steps"),
        (
            replace(CONDITIONS, training=TrainingSettings(steps=(1, 2, 3, 4), lr=1.0)),
            "training.lr, training.steps",
        ),
        (replace(CONDITIONS, trials=TrialSettings(manner=Manner(latency_s=0.2))), "trials.manner.latency_s"),
    ],
)
def test_figures_of_other_conditions_are_left_out_and_the_condition_is_named(
    tmp_path: Path, conditions: Conditions, named: str
) -> None:
    Measured({("joint", 0, 1): {"successes": 1}}).write(tmp_path, conditions)
    found, why = kept(tmp_path, CONDITIONS)
    assert found == Measured()
    assert why is not None
    assert f"of other conditions ({named})" in why


def written(**changes: Any) -> str:
    return json.dumps({"conditions": CONDITIONS.plain(), "cells": {}, "spoken": {}} | changes)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        written(cells={"joint/1": {}}),
        written(spoken={"held_out": {}}),
        written(conditions=None),
    ],
)
def test_what_no_experiment_wrote_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / FIGURES).write_text(content)
    with pytest.raises(UserError, match=rf"{FIGURES} is not what an experiment wrote .*delete it"):
        kept(tmp_path, CONDITIONS)


def test_a_machine_is_named_with_its_cores() -> None:
    assert machine().endswith(" cores")
    assert len(machine().partition(",")[0]) > 2
