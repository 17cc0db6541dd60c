from __future__ import annotations

import ast
from pathlib import Path

import kuavo_smolvla_ros.policy

ROOM = Path(kuavo_smolvla_ros.policy.__file__).parent


def test_lerobot_enters_through_one_module():
    """Its internals move between releases; one file follows them."""
    users = set()
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(name.split(".")[0] == "lerobot" for name in names):
                users.add(file.name)
    assert users == {"lerobot_adapter.py"}
