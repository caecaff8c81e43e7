"""A small hub on this machine: what huggingface_hub asks for, of folders that tests make."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from jlora.hub import list_data_set


@dataclass
class Repository:
    """The files of a repository at one commit, and who may have them."""

    files: dict[str, bytes]
    configs: Any = None
    gated: bool = False
    branches: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        parts = [self.configs, *sorted(self.files.items())]
        return hashlib.sha1(repr(parts).encode()).hexdigest()


@dataclass
class Hub:
    """The repositories by "models/owner/name" or "datasets/owner/name"."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """The paths of all requests."""
    downloads: list[str] = field(default_factory=list)
    """The files that were sent, but for README.md."""
    address: str = ""
    seen: dict[str, Repository] = field(default_factory=dict)
    """What was asked for, by commit: a hub has those from before a change, too."""

    def add(self, name: str, folder: Path, **options: Any) -> Repository:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository(files, **options)
        return self.repositories[name]


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, *, head: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            status, headers, body = answer(hub, path, head)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not head:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Sets the address, which huggingface_hub takes from HF_ENDPOINT when imported."""
    constants = "huggingface_hub.constants"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextlib.contextmanager
def asked_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that this process asks, whose caches begin empty in a folder."""
    monkeypatch.setenv("JLORA_CACHE", str(folder / "jlora"))
    list_data_set.cache_clear()
    with hub_server() as server:
        answer_at(monkeypatch, server.address)
        cache = str(folder / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        yield server


def answer(hub: Hub, path: str, head: bool) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; errors are in the header X-Error-Code, as the hub's."""
    is_api = path.startswith("/api/")
    parts = path.removeprefix("/api").strip("/").split("/")
    if parts[0] not in ("models", "datasets"):
        parts = ["models", *parts]
    name, rest = "/".join(parts[:3]), parts[3:]
    repository = hub.repositories.get(name)
    if repository is None:
        return 401, {"X-Error-Code": "RepoNotFound"}, b""
    copy = replace(repository, files=dict(repository.files))
    hub.seen[repository.commit] = copy
    wanted = rest[1] if len(rest) > 1 else "main"
    if rest[1:3] == ["refs", "convert"]:
        wanted, rest = "/".join(rest[1:4]), [rest[0], "", *rest[4:]]
    if wanted in hub.seen:
        repository = hub.seen[wanted]
    elif wanted not in repository.branches:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    commit = repository.commit
    if not is_api:  # owner/name/resolve/revision/path
        return resolve(hub, repository, "/".join(rest[2:]), head)
    if rest[:1] == ["tree"]:
        entries = [tree_entry(*item) for item in repository.files.items()]
        return 200, {}, json.dumps(entries).encode()
    info = {
        "id": "/".join(parts[1:3]),
        "sha": commit,
        "siblings": [{"rfilename": file} for file in repository.files],
        "cardData": {"configs": repository.configs} if repository.configs else None,
        "private": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
    }
    return 200, {}, json.dumps(info).encode()


def resolve(
    hub: Hub, repository: Repository, file: str, head: bool
) -> tuple[int, dict[str, str], bytes]:
    if repository.gated:
        return 401, {"X-Error-Code": "GatedRepo"}, b""
    if file not in repository.files:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    if not head and file != "README.md":
        hub.downloads.append(file)
    body = repository.files[file]
    etag = tree_entry(file, body)["oid"]
    return 200, {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"'}, body


def tree_entry(file: str, body: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return {"type": "file", "path": file, "size": len(body), "oid": oid}
