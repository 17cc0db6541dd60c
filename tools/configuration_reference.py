"""Write docs/configuration.md from the code: what can be set, its default, what it means.

python tools/configuration_reference.py           write it
python tools/configuration_reference.py --check   exit 1 where the page and the code differ
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import sys
import tokenize
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
NODES = ("policy_node", "executor_node", "sim_node", "recorder_node")
HEAD = """# Configuration reference

Written by `python tools/configuration_reference.py` from the code; a test compares the two.

Files that explain themselves, value by value, in comments:

| what | where |
| --- | --- |
| the robot: streams, joints, limits, units, ages | [config/robot](../config/robot) |
| training, all stages | [smolvla_sequential_base.yaml](../config/policy/smolvla_sequential_base.yaml) |
| training, each task | [config/policy/tasks](../config/policy/tasks) |
| several GPUs and machines | [config/accelerate](../config/accelerate) |
| recordings to data sets | [config/data/convert.yaml](../config/data/convert.yaml) |
| when a data set is good enough | [config/data/quality.yaml](../config/data/quality.yaml) |
"""


def shown(value: Any) -> str:
    """A default as one writes it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "" if value in ("", None) else f"`{value}`"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def node_parameters(parameters: Mapping[str, Any]) -> str:
    rows = []
    for name, parameter in parameters.items():
        allowed = ", ".join(f"`{choice}`" for choice in parameter.choices)
        if parameter.low is not None:
            allowed = f"{parameter.low:g} .. {parameter.high:g}"
        when = "at the start" if parameter.fixed else "at any time"
        rows.append((f"`{name}`", shown(parameter.default), allowed, when, parameter.meaning))
    return table(("parameter", "default", "allowed", "set", "meaning"), rows)


def launch_arguments(bringup: Any) -> str:
    rows = [
        (f"`{a.name}`", shown(a.default), ", ".join(f"`{c}`" for c in a.choices), a.meaning)
        for a in bringup.arguments
    ]
    return table(("argument", "default", "choices", "meaning"), rows)


def fields_with_comments(kind: type) -> Iterable[tuple[str, str, str, str]]:
    """Name, type, default and comment of a dataclass's own fields, in the order of the source."""
    source = inspect.getsource(kind)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    heading = ""
    for field in (node for node in body.body if isinstance(node, ast.AnnAssign)):
        above: list[str] = []
        line = field.lineno - 1
        while lines[line - 1].strip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        if above and not lines[line - 1].strip():
            heading, above = above[0].split(". ")[0].rstrip("."), above[1:]
        comment = " ".join([*above, *([comments[field.lineno]] if field.lineno in comments else [])])
        default = ast.unparse(field.value) if field.value is not None else ""
        if default.startswith("field("):
            default = (
                default.removeprefix("field(default_factory=").removeprefix("lambda: ").removesuffix(")")
            )
        assert isinstance(field.target, ast.Name)
        yield heading, field.target.id, f"`{default}`" if len(default) < 40 else "see the source", comment


def policy_fields(kind: type) -> str:
    parts: list[str] = []
    rows: list[tuple[str, ...]] = []
    before = None
    for heading, name, default, comment in [*fields_with_comments(kind), (None, "", "", "")]:
        if heading != before:
            if rows:
                parts.append(f"**{before or 'More'}**\n\n" + table(("field", "default", "meaning"), rows))
            rows, before = [], heading
        rows.append((f"`{name}`", default, comment))
    return "\n\n".join(parts)


def page() -> str:
    from kuavo_smolvla_ros.nodes.bringup import BRINGUPS
    from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

    parts = [HEAD]
    for name, bringup in BRINGUPS.items():
        command = f"`ros2 launch kuavo_smolvla_ros {name}.launch.py` or `kuavo-smolvla bringup {name}`"
        parts.append(f"## Start: {name}\n\n{command}\n\n{launch_arguments(bringup)}\n")
    for module in NODES:
        parameters = import_module(f"kuavo_smolvla_ros.nodes.{module}").PARAMETERS
        parts.append(f"## Node: {module}\n\n{node_parameters(parameters)}\n")
    parts.append(
        "## Policy\n\nFields of `KuavoSmolVLAConfig`: `policy.NAME=...` in training, `--policy.NAME=...` in "
        "`lerobot-train`, and `config.json` of a checkpoint.\n\n" + policy_fields(KuavoSmolVLAConfig) + "\n"
    )
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where they differ")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    print(f"{PAGE} is not what the code says; run: python tools/configuration_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
