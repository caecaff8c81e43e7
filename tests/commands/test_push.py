"""Exports on a hub: a small one on this machine, which takes what huggingface_hub sends."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.adapters import changed_copy, files
from helpers.commands import call, succeed, train_flags
from helpers.hub_server import answer_at

TOKEN = "hf_of_the_tests"


@dataclass
class TakingHub:
    """Repositories by name, each with its files, and who asked for what."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: int = 0
    asked: list[str] = field(default_factory=list)
    refuses: bool = False


@pytest.fixture
def hub(monkeypatch) -> Iterator[TakingHub]:
    hub = TakingHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            if self.path.startswith("/api/models/meta/base"):
                card = {"license": "llama3.2"}
                return self._say(200, {"id": "meta/base", "cardData": card, "tags": []})
            return self._say(404, {"error": "no such model"})

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" or hub.refuses:
                return self._say(403, {"error": "you may not write there"})
            if self.path == "/api/validate-yaml":
                return self._say(200, {"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                hub.made.append(json.loads(body))
                owner, name = hub.made[-1]["organization"], hub.made[-1]["name"]
                hub.repositories.setdefault(f"{owner}/{name}", {})
                return self._say(200, {"url": f"{address}/{owner}/{name}"})
            name = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                wanted = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in wanted
                ]
                return self._say(200, {"files": modes})
            assert "/commit/main" in self.path
            hub.commits += 1
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    data = base64.b64decode(value["content"])
                    hub.repositories[name][value["path"]] = data
            made = {"success": True, "commitOid": "a" * 40}
            commit = f"{address}/{name}/commit/{made['commitOid']}"
            return self._say(200, {**made, "commitUrl": commit})

        def _say(self, status: int, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    answer_at(monkeypatch, address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.usefixtures("in_workdir", "run")
@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("convert.to_hf", "transformers"),
        ("convert.to_peft", "peft"),
        ("convert.to_gguf", "gguf"),
    ],
)
def test_an_export_is_uploaded_with_a_card_of_its_run(command, library, hub, tmp_path):
    out = tmp_path / "out"
    printed = succeed(command, "run", out, "--push", "me/mine")
    written = files(out)
    assert f"uploaded {len(written)} files and a model card to http://" in printed
    found = dict(hub.repositories["me/mine"])
    card = found.pop("README.md").decode()
    assert found == {str(name): data for name, data in written.items()}
    assert hub.commits == 1
    # As older and newer versions of huggingface_hub say it.
    assert "private" in (
        hub.made[0].get("visibility"),
        hub.made[0].get("private") and "private",
    )
    assert front_matter(card)["library_name"] == library
    assert "base_model" not in front_matter(card)  # it is a folder of this machine
    for text in (
        "| r | 8 |",
        "| data | train.jsonl |",
        "| optim.learning_rate | 0.02 |",
        "| steps | 40 |",
        "| held-out loss | ",
        "The base's licence holds for this model, too; it is not known here.",
    ):
        assert text in card
    assert str(tmp_path) not in card


def test_a_base_of_the_hub_is_named_with_its_licence(hub, tmp_path):
    adapter = changed_copy(
        tmp_path / "adapter", "basic", {"base_model_name_or_path": "meta/base"}
    )
    succeed("convert.to_peft", adapter, tmp_path / "out", "--push", "me/mine")
    card = hub.repositories["me/mine"]["README.md"].decode()
    head = front_matter(card)
    assert (head["base_model"], head["license"]) == ("meta/base", "llama3.2")
    assert head["base_model_relation"] == "adapter"
    assert "The base's licence is llama3.2; it holds for this model, too." in card


@pytest.mark.usefixtures("in_workdir", "run")
def test_a_refusal_is_one_message_and_the_export_stays(hub, tmp_path):
    hub.refuses = True
    done = call("convert.to_peft", "run", tmp_path / "out", "--push", "me/mine")
    assert done.status == 2
    assert "me/mine: cannot be uploaded to the hub: " in done.err
    assert "hf auth login" in done.err
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.usefixtures("in_workdir", "run")
@pytest.mark.parametrize("name", ["mine", "me/mine@main", "me/../mine", "a/b/c"])
def test_a_name_of_no_repository_is_refused_before_the_export(name, hub, tmp_path):
    done = call("convert.to_peft", "run", tmp_path / "out", "--push", name)
    assert (done.status, "expected owner/name" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert hub.asked == []


@pytest.mark.usefixtures("in_workdir", "run")
def test_without_push_nothing_is_asked(hub, tmp_path):
    succeed("convert.to_peft", "run", tmp_path / "out")
    assert hub.asked == []


@pytest.mark.usefixtures("in_workdir")
@pytest.mark.parametrize("asked", [("", "--step", 2), ("/checkpoints/2",), ("",)])
def test_a_card_tells_the_run_up_to_the_step_that_is_exported(
    asked, hub, tmp_path, two_steps
):
    end, *more = asked
    out = tmp_path / "out"
    succeed("convert.to_peft", f"{two_steps}{end}", out, *more, "--push", "me/mine")
    card = hub.repositories["me/mine"]["README.md"].decode()
    assert f"| steps | {2 if end or more else 4} |" in card


def test_an_adapter_named_from_inside_its_run_has_the_run_s_card(
    hub, tmp_path, two_steps, workdir, monkeypatch
):
    monkeypatch.chdir(workdir / two_steps)
    for name in ("adapter", "."):
        succeed("convert.to_peft", name, tmp_path / f"out{name}", "--push", "me/mine")
        card = hub.repositories["me/mine"]["README.md"].decode()
        assert "| steps | 4 |" in card


@pytest.fixture(scope="module")
def two_steps(workdir) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    flags = train_flags("two_steps", "--train.save_every", 2, "--train.max_steps", 4)
    with contextlib.chdir(workdir):
        succeed("train", *flags)
    return Path("two_steps")
