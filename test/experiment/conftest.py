from __future__ import annotations

from pathlib import Path

import pytest

from kuavo_smolvla_ros.experiment.gather import Gathering, gather
from kuavo_smolvla_ros.experiment.ways import TASK_FILES


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of each of the quicker tasks, one of the others."""
    root = tmp_path_factory.mktemp("experiment") / "demonstrations"
    for number, name in enumerate(TASK_FILES, 1):
        gather(Gathering(number, 2 if number in (1, 3) else 1), root / name)
    return root
