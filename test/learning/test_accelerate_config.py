"""The launch configurations that are shipped: accelerate reads them, and they leave the network whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file

from kuavo_smolvla_ros.paths import config_dir

FILES = sorted((config_dir() / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_launch_configuration_loads_and_leaves_precision_and_division_to_the_stage(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    assert str(config.distributed_type.value) in ("NO", "MULTI_GPU")
    assert config.num_processes >= config.num_machines


def test_there_is_one_for_each_size_of_machine() -> None:
    assert [file.stem for file in FILES] == ["gpu", "gpus", "nodes"]
