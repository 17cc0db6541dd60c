"""Results on a model hub, if one is named: looked at before the first step, uploaded after a stage's last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kuavo_smolvla_ros.errors import UserError


class HubError(UserError):
    """The hub cannot be used as asked."""


def require_hub(name: str) -> None:
    """Fail unless the hub answers and knows who asks: days before there is anything to upload."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        HfApi().whoami()
    except HFValidationError as fault:
        raise HubError(f"run.push_to_hub is {name!r}, which is no hub id (owner/name): {fault}") from None
    except Exception as fault:
        raise HubError(
            f"run.push_to_hub={name} cannot be used from here ({_short(fault)}): log in (hf auth login, or "
            "HF_TOKEN), set HF_ENDPOINT to a reachable hub, or set run.push_to_hub=null and upload `best` "
            "later with hf upload"
        ) from fault


def push(folder: Path, name: str, stage: str, say: Callable[[str], None]) -> None:
    """Upload a stage's result and tag it with the stage's name.

    A fault here is only reported: the result is on the disk, and the next stage does not need the hub.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository.repo_id, commit_message=stage)
        api.create_tag(repository.repo_id, tag=stage, exist_ok=True)
    except Exception as fault:
        say(f"note: {folder} was not uploaded to {name} ({_short(fault)}); hf upload {name} {folder}")
    else:
        say(f"{stage}: uploaded to {name}")


def _short(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:160]}"
