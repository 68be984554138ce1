"""Pushing, against a stand-in for a hub on this machine: what is sent, where, and what a refusal says."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from longclip import cli
from longclip.export.push import push
from longclip.types import UserError

TOKEN = "hf_test"


class Hub(BaseHTTPRequestHandler):
    """The calls of a commit: make the repository, ask what goes where, send large files, commit."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "who are you"}, 401)
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self.server.asked = json.loads(body)
            owner, name = self.server.asked["organization"], self.server.asked["name"]
            return self._answer({"url": f"{self.server.url}/{owner}/{name}"})
        if path.endswith("/preupload/main"):
            return self._answer({"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        if path.endswith("/objects/batch"):
            return self._answer({"objects": [self._where(one) for one in json.loads(body)["objects"]]})
        if path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            return self._answer({"commitUrl": f"{self.server.url}/me/mine/commit/0", "commitOid": "0" * 40})
        return self._answer({})  # validate-yaml

    def do_PUT(self) -> None:
        data = self._chunks() if "Content-Length" not in self.headers else None
        oid = self.path.rsplit("/", 1)[1]
        self.server.large[oid] = data or self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _where(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}", "header": {}}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, values: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # plain HTTP
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.large, server.asked = (
        f"http://127.0.0.1:{server.server_port}",
        {},
        {},
        None,
    )
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sent = {"config.json": "{}", "model.safetensors": "weights", "README.md": "# x", "merges.txt": "a b"}
    for name, text in {**sent, "secrets.env": "TOKEN=1", "config.yaml": "a: 1"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_an_export_is_sent_and_nothing_else(hub: Any, folder: Path) -> None:
    url = push(folder, "me/mine", endpoint=hub.url, token=TOKEN)
    assert url == f"{hub.url}/me/mine"
    assert hub.files == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "README.md": b"# x",
        "merges.txt": b"a b",
    }


@pytest.mark.parametrize("public", [False, True])
def test_a_new_repository_is_private_unless_asked(hub: Any, folder: Path, public: bool) -> None:
    push(folder, "me/mine", public, hub.url, TOKEN)
    assert (hub.asked["organization"], hub.asked["name"]) == ("me", "mine")
    assert hub.asked["visibility"] == ("public" if public else "private")


def test_a_refusal_is_one_sentence(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert cli.main(["push", str(folder), "me/mine", "--endpoint", hub.url]) == 2
    error = capsys.readouterr().err
    assert f"error: {hub.url} did not take me/mine" in error
    assert "HF_TOKEN" in error
    assert hub.files == {}


def test_only_exports_are_sent(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="is no export"):
        push(tmp_path, "me/mine", endpoint=hub.url, token=TOKEN)


@pytest.mark.parametrize("name", ["mine", "me/my/mine", "me/mi ne"])
def test_names_are_owner_and_name(hub: Any, folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="no name of a repository"):
        push(folder, name, endpoint=hub.url, token=TOKEN)
    assert hub.asked is None
