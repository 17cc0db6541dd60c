"""Uploading a result: against a hub of a few lines on this machine, and without any."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import reset_sessions

from kuavo_smolvla_ros.learning.hub import HubError, push, require_hub

NAME = "lab/kuavo"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs."""

    files: dict[str, bytes]
    tags: list[str]

    def log_message(self, format: str, *values: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer({"name": "lab", "type": "user", "id": NAME, "sha": "1", "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{self.server.address}/{NAME}"})  # type: ignore[attr-defined]
        elif "validate-yaml" in self.path:
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                {"commitUrl": f"{self.server.address}/{NAME}/commit/1", "commitOid": "1", "success": True}
            )
        elif "/tag/" in self.path:
            self.tags.append(json.loads(body)["tag"])
            self._answer({})
        else:
            self.send_error(404)

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):  # in chunks
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class One(Hub):
        files, tags = {}, []

    server = ThreadingHTTPServer(("127.0.0.1", 0), One)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    point(monkeypatch, server.address)  # type: ignore[attr-defined]
    yield One
    server.shutdown()
    thread.join()
    server.server_close()


def point(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Where HF_ENDPOINT would, had it been set before the library was read."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    reset_sessions()  # one that was made offline stays so


@pytest.fixture(autouse=True)
def _no_session_is_left_behind() -> Iterator[None]:
    yield
    reset_sessions()


def result(folder: Path) -> Path:
    (folder / "best").mkdir()
    (folder / "best" / "README.md").write_text("# task1\n")
    (folder / "best" / "model.safetensors").write_bytes(bytes(1000))
    return folder / "best"


def test_a_result_is_uploaded_and_tagged(hub: type[Hub], tmp_path: Path) -> None:
    said: list[str] = []
    require_hub(NAME)
    push(result(tmp_path), NAME, "task1", said.append)
    assert said == [f"task1: uploaded to {NAME}"]
    assert hub.files == {"README.md": b"# task1\n", "model.safetensors": bytes(1000)}
    assert hub.tags == ["task1"]


def test_without_a_hub_the_first_sentence_comes_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        HubError, match=r"push_to_hub=lab/kuavo cannot be used from here .* log in .* hf upload"
    ):
        require_hub(NAME)


def test_a_hub_that_is_gone_at_the_end_costs_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point(monkeypatch, "http://127.0.0.1:9")
    said: list[str] = []
    push(result(tmp_path), NAME, "task1", said.append)
    assert said[0].startswith("note: ")
    assert f"hf upload {NAME} {tmp_path / 'best'}" in said[0]


def test_what_is_no_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(HubError, match="which is no hub id"):
        require_hub("a/b/c")
