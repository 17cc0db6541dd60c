"""Backbones from the hub, through its own client, which obeys HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from kuavo_smolvla_ros.policy.backbone_builtin import WAYS_OUT, BackboneError

DESCRIPTION = ("*.json", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json")


def download(name: str, weights: bool) -> Path:
    """The newest snapshot of a model, or the one already on this machine where the hub cannot be asked."""
    try:
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=[*DESCRIPTION, *(WEIGHTS if weights else ())],
                ignore_patterns=["*/*"],  # other formats of the same weights lie in subfolders
            )
        )
    except (OSError, HFValidationError) as error:  # the client's and requests' errors are OSErrors
        raise BackboneError(f"the backbone {name} {_reason(error)}. {WAYS_OUT}") from error
    missing = [file for file in REQUIRED if not (folder / file).is_file()]
    if weights and not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise BackboneError(f"the copy of {name} in {folder} lacks {', '.join(missing)}. {WAYS_OUT}")
    return folder


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        return f"does not exist at {constants.ENDPOINT}, or needs a login (hf auth login)"
    if isinstance(error, HFValidationError):
        return "is not a valid hub id"
    if constants.HF_HUB_OFFLINE:
        return "is not on this machine, and the hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
    return f"is not on this machine, and {constants.ENDPOINT} cannot be reached"
