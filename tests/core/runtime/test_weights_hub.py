"""Weights on the Hub, against a local server that implements the used part of its protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.runtime import weights
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.main import cli

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """Server with the repository `me/model` and injected faults; `requests` records all requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.token = ""  # required in every request if set
        self.failures = 0  # number of GET requests to answer with 503
        self.broken = 0  # number of response bodies to interrupt
        self.wrong_hash = False  # announce a wrong sha256
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.committed: dict[str, bytes] = {}
        self.created: dict[str, object] = {}  # body of the request that creates a repository
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def gets(self) -> list[str]:
        """Return the Range headers of all GET requests for files."""
        return [ranges for method, path, ranges in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._allowed():
            return
        if self.path.endswith("/repos/create"):
            self.hub.created = json.loads(data)
            self._json({"url": f"{self.hub.url}/me/model", "name": "me/model"})
        elif self.path.endswith("/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(data)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.hub.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{self.hub.url}/me/model/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self._answer(404)

    def _allowed(self) -> bool:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(401)
            return False
        return True

    def _file(self, *, body: bool) -> None:
        if not self._allowed():
            return
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        code = None
        if repo != "me/model":
            code = "RepoNotFound"
        elif revision not in ("main", "v1", COMMIT):
            code = "RevisionNotFound"
        elif name not in self.hub.files:
            code = "EntryNotFound"
        if code:
            self._answer(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        if body and self.hub.failures:
            self.hub.failures -= 1
            self._answer(503)
            return
        data = self.hub.files[name]
        sha = hashlib.sha256(data + b"!" * self.hub.wrong_hash).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha}"', "X-Linked-Etag": f'"{sha}"'}
        headers |= {"X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.hub.broken:
            self.hub.broken -= 1
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(part)

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Local Hub with an empty cache and no token."""
    from huggingface_hub import constants

    server = Hub()
    server.files["model.safetensors"] = os.urandom(1000)
    use_endpoint(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # granularity of a resumed body
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Do what HF_ENDPOINT does when huggingface_hub is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)


def tiny(path: Path) -> Path:
    state = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    save_weights(path, state, PRESETS["tiny"], {"steps": 7}, licence="CC0-1.0")
    return path


def test_download_is_cached_pinned_and_verified(hub: Hub, tmp_path: Path) -> None:
    hub.files["sub/a.safetensors"] = tiny(tmp_path / "a.safetensors").read_bytes()
    first = run("weights", "download", "hf:me/model@v1:sub/a.safetensors", "--json")
    assert first.exit_code == 0, first.output
    summary = json.loads(first.stdout)
    assert summary["revision"] == COMMIT
    assert summary["sha256"] == hashlib.sha256(hub.files["sub/a.safetensors"]).hexdigest()
    assert run("weights", "download", "hf:me/model@v1:sub/a.safetensors").exit_code == 0
    assert len(hub.gets()) == 1
    info = run("weights", "info", f"hf:me/model@{COMMIT}:sub/a.safetensors")
    for line in (f"revision: {COMMIT}", "licence: CC0-1.0", "parameters: 17", "  steps: 7", "  image_size: 64"):
        assert line in info.stdout
    assert run("weights", "download", "--force", "hf:me/model:sub/a.safetensors").exit_code == 0
    assert len(hub.gets()) == 2


def test_fetch_resumes_body_and_names_server_errors(hub: Hub) -> None:
    hub.broken = 1
    assert weights.resolve_weights("hf:me/model").read_bytes() == hub.files["model.safetensors"]
    assert hub.gets()[-1] == "bytes=500-"  # where the body was interrupted
    hub.files["b.bin"] = b"b"
    hub.failures = 1
    with pytest.raises(WeightsError, match=r"Hub answered 503.*`export3d weights download hf:me/model:b.bin`"):
        weights.resolve_weights("hf:me/model:b.bin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:me/other", "no such repository"),
        ("hf:me/model@v9", "no revision 'v9'"),
        ("hf:me/model:x.st", "no file 'x.st'"),
        ("hf:me/model:../../x", ""),
    ],
)
def test_download_of_missing_file_names_it(hub: Hub, name: str, message: str) -> None:
    result = run("weights", "download", name)
    assert result.exit_code == 4
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_private_repository_needs_token_and_hides_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secretsecret"
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrong")
    refused = run("-v", "weights", "download", "hf:me/model")
    assert refused.exit_code == 4
    assert "401" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert "wrongwrong" not in refused.output
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert weights.resolve_weights("hf:me/model").is_file()


def test_fetch_with_wrong_hash_raises_and_deletes(hub: Hub) -> None:
    hub.wrong_hash = True
    with pytest.raises(WeightsError, match="damaged"):
        weights.resolve_weights("hf:me/model")
    hub.wrong_hash = False
    assert weights.resolve_weights("hf:me/model").read_bytes() == hub.files["model.safetensors"]


def test_fetch_without_network_names_download_command(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weights.resolve_weights("hf:me/model").is_file()
    use_endpoint(monkeypatch, "http://user:password@127.0.0.1:9")
    assert weights.resolve_weights("hf:me/model").is_file()  # from the cache
    with pytest.raises(WeightsError, match=r"//127.0.0.1:9 cannot be reached.*run `export3d weights download .*`"):
        weights.resolve_weights("hf:me/model:x.st")
    command = [sys.executable, "-m", "export3d_cli", "weights", "download", "hf:me/model@v1:x.st"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 4
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert "run `export3d weights download hf:me/model@v1:x.st`" in done.stderr


def test_push_uploads_weights_with_model_card(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny(tmp_path / "mine.safetensors")
    card = run("weights", "push", file, "hf:me/model:mine.safetensors", "--dry-run")
    assert card.exit_code == 0
    assert yaml.safe_load(card.stdout.split("---")[1])["license"] == "cc0-1.0"
    assert not hub.requests
    hub.token = "hf_secretsecret"
    refused = run("weights", "push", file, "hf:me/model")
    assert refused.exit_code == 4
    assert "HF_TOKEN" in refused.stderr
    monkeypatch.setenv("HF_TOKEN", hub.token)
    done = run("weights", "push", file, "hf:me/model:mine.safetensors", "--private")
    assert done.exit_code == 0, (done.output, hub.requests)
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert COMMIT in done.stdout
    assert hub.committed["mine.safetensors"] == file.read_bytes()
    assert hub.committed["README.md"].decode() == card.stdout
    (tmp_path / "text").write_text("nothing")
    assert run("weights", "push", tmp_path / "text", "hf:me/model").exit_code == 4
