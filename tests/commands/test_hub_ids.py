"""Commands on a model, an adapter and data that are named by hub ids."""

import json

import pytest
from helpers.commands import adapter_bytes, finish, start_python, train_flags
from helpers.data_cases import write_rows
from helpers.hub_server import hub_server

pytestmark = pytest.mark.usefixtures("in_workdir")

COMMANDS = """
import importlib, json, sys
from jlora.cli.command import run_command

for name, *flags in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    print("status:", run_command(module.main, module.Arguments, argv=flags))
"""


@pytest.fixture
def hub(tmp_path, workdir, run):
    with hub_server() as server:
        server.add("models/owner/model", workdir / "hf")
        server.add("models/owner/adapter", run / "adapter")
        data = tmp_path / "data"
        data.mkdir()
        for name in ("train", "eval"):
            text = (workdir / f"{name}.jsonl").read_bytes()
            (data / f"{name.replace('eval', 'validation')}.jsonl").write_bytes(text)
        server.add("datasets/owner/data", data)
        yield server


def on(hub, tmp_path, *commands: list[object]):
    """What commands print, one after the other in a new process that asks this hub."""
    words = [[str(word) for word in command] for command in commands]
    where = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf_home")}
    caches = {
        "JLORA_CACHE": str(tmp_path / "jlora"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return finish(start_python("-c", COMMANDS, json.dumps(words), **where, **caches))


def test_a_run_needs_no_local_file(hub, tmp_path, run):
    out = tmp_path / "run"
    names = ("--data.train", "owner/data", "--model", "owner/model")
    training = train_flags(out, "--train.max_steps", 2, *names)
    done = on(
        hub,
        tmp_path,
        ["train", *training, "--init_adapter", "owner/adapter"],
        [
            *("evaluate", "--model", "owner/model", "--adapter", "owner/adapter"),
            *("--data", "owner/data:default/validation", "--data.seq_len", 64),
        ],
    )
    assert done.out.count("status: 0") == 2, done
    data = f"owner/data@{hub.repositories['datasets/owner/data'].commit}"
    for line in (
        f"owner/data: {data} of the hub, the split train, 1 file",
        f"owner/data (validation): {data} of the hub, the split validation, 1 file",
        f"data: {data}",
    ):
        assert line in done.out.splitlines()
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/model"
    before = adapter_bytes(out)
    # The data set changes: the run does not go on with it, but with its own revision.
    repository = hub.repositories["datasets/owner/data"]
    write_rows(tmp_path / "more.jsonl", [{"prompt": "a", "completion": "b"}])
    repository.files["train.jsonl"] += (tmp_path / "more.jsonl").read_bytes()
    longer = [*training[:-4], "--model", "owner/model", "--train.max_steps", 3]
    resumed = ["--init_adapter", "owner/adapter", "--data.train"]
    done = on(
        hub,
        tmp_path,
        ["train", *longer, *resumed, "owner/data"],
        ["train", *longer, *resumed, data],
    )
    assert "status: 2" in done.out
    assert (
        f'data.revisions is ["owner/data@{repository.commit}"], was ["{data}"]'
        in done.err
    )
    assert "resuming after step 2" in done.out
    assert done.out.endswith("status: 0\n")
    assert adapter_bytes(out) != before
