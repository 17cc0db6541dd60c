"""Backbones that need no network: model folders in Hugging Face layout, written from code into the cache.

They hold sizes and a tokenizer and no weights. The same version writes the same bytes everywhere, and the
folder's name carries their hash, so that two versions never share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.backbone_tokenizer import (
    IMAGE,
    PADDING_ID,
    base_vocabulary,
    image_specials,
    special_ids,
    tokenizer_files,
)

TINY, FULL = "tiny", "smolvlm2-500m"
BUILT_IN = (TINY, FULL)

WAYS_OUT = (
    "Give this machine a way to the hub (network, or HF_ENDPOINT for a mirror), "
    "name a local folder that holds the model, "
    f"or use a built-in backbone without pretrained weights ({', '.join(BUILT_IN)})"
)

# The published tokenizer's ids.
FULL_FIRST_SPECIAL, FULL_END_OF_UTTERANCE, FULL_VOCABULARY = 49152, 49279, 49280


class BackboneError(UserError):
    """The backbone cannot be had; the message names the ways out."""


def built_in_files(name: str) -> dict[str, str]:
    """File names and contents of a built-in backbone's folder."""
    return {TINY: _tiny, FULL: _full}[name]()


def write_built_in(name: str) -> Path:
    """The folder of a built-in backbone; written, or mended, where it is not as it should be."""
    files = built_in_files(name)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / "backbones" / f"{name}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, content in files.items():
            _write(folder / file_name, content.encode())
    except OSError as error:
        raise BackboneError(
            f"the built-in backbone {name} cannot be written to {folder}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder you may write to"
        ) from error
    return folder


def cache_dir() -> Path:
    """This package's part of the user's cache folder."""
    # The convention ignores a relative XDG_CACHE_HOME.
    wanted = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(wanted) if Path(wanted).is_absolute() else Path.home() / ".cache"
    return base / "kuavo_smolvla_ros"


def _write(file: Path, content: bytes) -> None:
    """Put the content in place in one move: another process sees all of it or none.

    It grows beside the folder, not in it: who lists the folder meanwhile would find files that vanish.
    """
    if file.is_file() and file.read_bytes() == content:
        return
    descriptor, temporary = tempfile.mkstemp(dir=file.parent.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _tiny() -> dict[str, str]:
    """A network with every part of the real one that builds and learns on a laptop within seconds.

    Four vision layers, so that freezing some of them means something; four text layers, so that both kinds of
    expert layer occur twice; pictures of 64 x 64 become 4 tokens.
    """
    first = base_vocabulary()
    end = first + len(image_specials())
    return _folder(
        name=TINY,
        vision=_vision(width=64, layers=4, heads=4, hidden=128, image=64, patch=8),
        text=_text(width=64, layers=4, heads=4, kv_heads=2, hidden=128, dtype="float32", vocabulary=end + 1),
        first_special=first,
        end_of_utterance=end,
    )


def _full() -> dict[str, str]:
    """The published sizes of SmolVLM2-500M, for benchmarks and rehearsals without a network."""
    return _folder(
        name=FULL,
        vision=_vision(width=768, layers=12, heads=12, hidden=3072, image=512, patch=16),
        text=_text(960, 32, 15, 5, 2560, "bfloat16", FULL_VOCABULARY),
        first_special=FULL_FIRST_SPECIAL,
        end_of_utterance=FULL_END_OF_UTTERANCE,
    )


def _vision(width: int, layers: int, heads: int, hidden: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "smolvlm_vision",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "image_size": image,
        "max_image_size": {"longest_edge": image},
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
    }


def _text(
    width: int, layers: int, heads: int, kv_heads: int, hidden: int, dtype: str, vocabulary: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pad_token_id": PADDING_ID,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _folder(
    name: str, vision: Mapping[str, Any], text: Mapping[str, Any], first_special: int, end_of_utterance: int
) -> dict[str, str]:
    scale = 4  # 4 x 4 patches become one token
    image = vision["image_size"]
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "torch_dtype": "float32",
        "scale_factor": scale,
        "image_token_id": special_ids(first_special, end_of_utterance)[IMAGE],
        "pad_token_id": PADDING_ID,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vision_config": dict(vision),
        "text_config": dict(text),
    }
    # A tile is one native picture; a bigger picture is cut into tiles, which the policy never asks for.
    pictures = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": 4 * image},
        "do_image_splitting": True,
        "max_image_size": {"longest_edge": image},
        "resample": 1,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }
    tokens = (image // vision["patch_size"] // scale) ** 2
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": tokens}
    described = {
        "config.json": config,
        "preprocessor_config.json": pictures,
        "processor_config.json": processor,
    }
    files = {file: json.dumps(content, indent=2) + "\n" for file, content in described.items()}
    return {**files, **tokenizer_files(first_special, end_of_utterance)}
