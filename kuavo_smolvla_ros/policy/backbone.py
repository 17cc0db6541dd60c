"""From a backbone's name to a folder on this machine.

A name is a built-in backbone, a folder, or a hub id. The name is what a checkpoint stores; where the folder
lies is this machine's affair.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from kuavo_smolvla_ros.policy.backbone_builtin import BUILT_IN, WAYS_OUT, BackboneError, write_built_in
from kuavo_smolvla_ros.policy.backbone_tokenizer import STAND_IN

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

__all__ = ["BUILT_IN", "Backbone", "BackboneError", "resolve_backbone"]


@dataclass(frozen=True)
class Backbone:
    """A model folder in Hugging Face layout. `pretrained`: it holds weights as safetensors.

    `stand_in_tokenizer`: the tokenizer is our own small one, whose ids mean nothing to published weights.
    """

    name: str
    path: Path
    pretrained: bool
    stand_in_tokenizer: bool


def resolve_backbone(name: str, *, weights: bool = True) -> Backbone:
    """Find, write or download a backbone; without `weights`, description and tokenizer only."""
    if name in BUILT_IN:
        return _describe(name, write_built_in(name))
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _describe(name, path.resolve())
    if path.is_absolute() or name.startswith((".", "~")):
        raise BackboneError(f"the backbone folder {name} does not exist. {WAYS_OUT}")
    if not HUB_ID.fullmatch(name):
        near = get_close_matches(name, BUILT_IN, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BackboneError(
            f"the backbone {name!r}{hint} is neither built in, nor a folder, nor a hub id (owner/name). "
            f"{WAYS_OUT}"
        )
    from kuavo_smolvla_ros.policy.backbone_hub import download

    return _describe(name, download(name, weights))


def _describe(name: str, folder: Path) -> Backbone:
    config = _read(name, folder, "config.json")
    if "model_type" not in config:
        kind = "a policy's checkpoint" if "type" in config else "no model's"
        raise BackboneError(
            f"the backbone {name}: {folder / 'config.json'} is {kind}, not a vision-language model's"
        )
    if not (folder / "tokenizer.json").is_file():
        raise BackboneError(f"the backbone {name}: {folder} holds no tokenizer.json")
    return Backbone(
        name=name,
        path=folder,
        pretrained=_has_weights(name, folder),
        stand_in_tokenizer=bool(_read(name, folder, "tokenizer_config.json").get(STAND_IN, False)),
    )


def _has_weights(name: str, folder: Path) -> bool:
    if any(folder.glob("*.safetensors")):
        return True
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        raise BackboneError(
            f"the backbone {name}: {folder} holds its weights as pickle only ({pickled[0]}), "
            "which can run code when read; convert them to safetensors"
        )
    return False


def _read(name: str, folder: Path, file_name: str) -> dict[str, object]:
    file = folder / file_name
    if not file.is_file():
        raise BackboneError(
            f"the backbone {name}: {folder} holds no {file_name}, so it is not a model's folder"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"the backbone {name}: {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"the backbone {name}: {file} holds no JSON object")
    return content
