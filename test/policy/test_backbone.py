"""Backbones by name: built in, from a folder, from the hub (which no test may reach)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, AutoProcessor

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy import backbone_hub
from kuavo_smolvla_ros.policy.architecture import read_architecture
from kuavo_smolvla_ros.policy.backbone import BUILT_IN, BackboneError, resolve_backbone
from kuavo_smolvla_ros.policy.backbone_builtin import built_in_files

HUB_NAME = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
WAYS_OUT = ("HF_ENDPOINT", "local folder", "tiny, smolvlm2-500m")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder like that of a model which the user brought along."""
    return Path(shutil.copytree(resolve_backbone("tiny").path, tmp_path / "models" / "mine"))


# Built in


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_backbones_have_no_weights_and_lie_in_the_cache(name: str, cache: Path) -> None:
    backbone = resolve_backbone(name)
    assert backbone.name == name
    assert backbone.path.parent == cache / "kuavo_smolvla_ros" / "backbones"
    assert backbone.path.name.startswith(f"{name}-")
    assert not backbone.pretrained
    assert backbone.stand_in_tokenizer
    assert resolve_backbone(name) == backbone


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_bytes_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_backbone(name).path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    second = resolve_backbone(name).path
    assert first != second
    assert first.name == second.name
    assert contents(first) == contents(second)
    assert contents(first) == {file: text.encode() for file, text in built_in_files(name).items()}
    assert not any(str(tmp_path) in text for text in built_in_files(name).values())


def test_the_built_in_backbones_do_not_share_a_folder() -> None:
    assert len({resolve_backbone(name).path for name in BUILT_IN}) == len(BUILT_IN)


def test_full_size_is_that_of_the_published_model() -> None:
    sizes = read_architecture(
        resolve_backbone("smolvlm2-500m").path,
        num_vlm_layers=16,
        expert_width_multiplier=0.75,
        self_attn_every_n_layers=2,
    )
    assert (sizes.vision.layers, sizes.vision.width, sizes.vision.heads, sizes.vision.mlp_width) == (
        12,
        768,
        12,
        3072,
    )
    assert (sizes.vision.image_size, sizes.vision.patch_size, sizes.image_tokens(512, 512)) == (512, 16, 64)
    assert (sizes.text.layers, sizes.text.width, sizes.text.heads, sizes.text.kv_heads) == (16, 960, 15, 5)
    assert (sizes.text.vocabulary, sizes.expert_width, sizes.expert_mlp_width) == (49280, 720, 2048)


def test_tiny_suits_freezing_both_kinds_of_expert_layer_and_an_even_expert() -> None:
    sizes = read_architecture(
        resolve_backbone("tiny").path,
        num_vlm_layers=16,
        expert_width_multiplier=0.75,
        self_attn_every_n_layers=2,
    )
    assert sizes.vision.layers == 4
    assert sizes.text.layers % 2 == 0  # an even number, so that self- and cross-attention interleave
    assert sizes.expert_width % 2 == 0
    assert sizes.image_tokens(64, 64) == 4


@pytest.mark.parametrize("name", BUILT_IN)
def test_transformers_reads_the_folder(name: str) -> None:
    folder = resolve_backbone(name).path
    config = AutoConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert config.model_type == "smolvlm"
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    assert processor.image_seq_len == side**2
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.vocab_size == len(processor.tokenizer)


def test_a_damaged_folder_is_mended() -> None:
    folder = resolve_backbone("tiny").path
    before = contents(folder)
    (folder / "config.json").write_text("{")
    (folder / "tokenizer.json").unlink()
    resolve_backbone("tiny")
    assert contents(folder) == before


def test_a_whole_folder_is_not_written_again() -> None:
    folder = resolve_backbone("tiny").path
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    resolve_backbone("tiny")
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_several_at_once_see_whole_files_only() -> None:
    faults: list[BaseException] = []
    start = threading.Barrier(8)

    def resolve() -> None:
        start.wait()
        try:
            folder = resolve_backbone("tiny").path
            assert set(contents(folder)) >= set(built_in_files("tiny"))
            json.loads((folder / "tokenizer.json").read_text())
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=resolve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert set(contents(resolve_backbone("tiny").path)) == set(built_in_files("tiny"))


def test_files_can_be_read_by_others() -> None:
    for file in resolve_backbone("tiny").path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_relative_cache_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_backbone("tiny").path.is_relative_to(tmp_path / "home" / ".cache" / "kuavo_smolvla_ros")


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match=r"cannot be written to .*set XDG_CACHE_HOME"):
        resolve_backbone("tiny")


# A folder


def test_a_folder_by_absolute_relative_and_home_path(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    for name in (str(copy), "mine", "./mine", "~/mine"):
        backbone = resolve_backbone(name)
        assert (backbone.name, backbone.path) == (name, copy)


def test_weights_and_tokenizer_of_a_folder_are_told(copy: Path) -> None:
    assert not resolve_backbone(str(copy)).pretrained
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert resolve_backbone(str(copy)).pretrained
    assert resolve_backbone(str(copy)).stand_in_tokenizer
    described = json.loads((copy / "tokenizer_config.json").read_text())
    del described["kuavo_smolvla_stand_in"]
    (copy / "tokenizer_config.json").write_text(json.dumps(described))
    assert not resolve_backbone(str(copy)).stand_in_tokenizer


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent.parent)
    assert resolve_backbone("models/mine").path == copy


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere"])
def test_a_folder_that_does_not_exist_names_the_ways_out(name: str) -> None:
    _assert_ways_out(name, f"the backbone folder {name} does not exist")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_folder_that_lacks_a_file_says_which(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(BackboneError, match=f"holds no {file}"):
        resolve_backbone(str(copy))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"type": "smolvla"}', "a policy's checkpoint, not a vision-language model's"),
        ("{}", "is no model's"),
    ],
)
def test_a_folder_with_something_else_in_it_says_what(copy: Path, content: str, message: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        resolve_backbone(str(copy))


def test_weights_as_pickle_are_refused(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"pickle only \(pytorch_model.bin\)"):
        resolve_backbone(str(copy))
    (copy / "model.safetensors").write_bytes(b"")
    assert resolve_backbone(str(copy)).pretrained


# The hub


def _assert_ways_out(name: str, beginning: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_backbone(name)
    message = str(caught.value)
    assert isinstance(caught.value, BackboneError)
    assert message.startswith(beginning)
    assert "\n" not in message
    for way in WAYS_OUT:
        assert way in message


def test_the_hub_switched_off_names_the_ways_out() -> None:
    assert constants.HF_HUB_OFFLINE  # set for every test
    _assert_ways_out(HUB_NAME, f"the backbone {HUB_NAME} is not on this machine, and the hub is switched off")


@pytest.mark.parametrize(
    ("name", "hint"), [("tinny", "did you mean tiny"), ("smolvlm2-500M", "did you mean smol")]
)
def test_a_misspelt_name_is_corrected(name: str, hint: str) -> None:
    _assert_ways_out(name, f"the backbone {name!r} ({hint}")


@pytest.mark.parametrize("name", ["", "a b/c", "a/b/c", "owner/"])
def test_what_is_no_name_at_all(name: str) -> None:
    _assert_ways_out(name, f"the backbone {name!r} is neither built in")


def _response(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    response.headers["X-Request-Id"] = "0"
    return response


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("no"), "cannot be reached"),
        (requests.ConnectionError("no"), "cannot be reached"),
        (HfHubHTTPError("no", response=_response(503)), "cannot be reached"),
        (RepositoryNotFoundError("no", response=_response(404)), "does not exist at"),
    ],
)
def test_whatever_the_client_raises_is_one_sentence(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(backbone_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _assert_ways_out(HUB_NAME, f"the backbone {HUB_NAME} ")
    with pytest.raises(BackboneError, match=reason):
        resolve_backbone(HUB_NAME)


def _in_a_process(endpoint: str, home: Path, weights: bool) -> str:
    """Resolve where the client reads its environment afresh; prints the folder's files, or the error."""
    script = (
        "from kuavo_smolvla_ros.policy.backbone import BackboneError, resolve_backbone\n"
        f"try: folder = resolve_backbone({HUB_NAME!r}, weights={weights}).path\n"
        "except BackboneError as error: print(error)\n"
        "else: print(sorted(file.name for file in folder.iterdir()))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_endpoint_that_refuses_is_named(tmp_path: Path) -> None:
    """The real client against a port on which nobody listens."""
    message = _in_a_process("http://127.0.0.1:9", tmp_path, weights=True)
    assert "is not on this machine, and http://127.0.0.1:9 cannot be reached" in message


@pytest.fixture
def mirror() -> Iterator[str]:
    """A hub in miniature on this machine: one model, the tiny one with weights and with what nobody wants."""
    files = {name: text.encode() for name, text in built_in_files("tiny").items()}
    files |= {"model.safetensors": b"weights", "onnx/model.json": b"other", "README.md": b"text"}
    commit = "1" * 40

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.startswith(f"/api/models/{HUB_NAME}"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": HUB_NAME, "sha": commit, "siblings": siblings}).encode()
            else:
                body = files[self.path.removeprefix(f"/{HUB_NAME}/resolve/{commit}/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_mirror_is_asked_for_what_is_needed_only(mirror: str, tmp_path: Path) -> None:
    described = sorted(built_in_files("tiny"))
    assert _in_a_process(mirror, tmp_path, weights=False) == str(described)
    assert _in_a_process(mirror, tmp_path, weights=True) == str(sorted([*described, "model.safetensors"]))
    # From now on the hub is not needed.
    assert _in_a_process("http://127.0.0.1:9", tmp_path, weights=True).endswith("'tokenizer_config.json']")


def hub_cache(home: Path, source: Path) -> Path:
    """A snapshot as the client leaves it in its cache."""
    repository = home / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(source, repository / "snapshots" / commit))


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return hub_cache(tmp_path / "hf", resolve_backbone("tiny").path)


def test_a_model_fetched_earlier_is_used_without_the_hub(snapshot: Path) -> None:
    (snapshot / "model.safetensors").write_bytes(b"")
    backbone = resolve_backbone(HUB_NAME)
    assert (backbone.name, backbone.path, backbone.pretrained) == (HUB_NAME, snapshot, True)


def test_a_copy_without_weights_serves_for_the_description_only(snapshot: Path) -> None:
    assert not resolve_backbone(HUB_NAME, weights=False).pretrained
    _assert_ways_out(HUB_NAME, f"the copy of {HUB_NAME} in {snapshot} lacks *.safetensors")


def test_an_incomplete_copy_says_what_is_missing(snapshot: Path) -> None:
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"lacks config\.json, tokenizer\.json"):
        resolve_backbone(HUB_NAME, weights=False)
