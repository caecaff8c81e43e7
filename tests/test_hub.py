import re

import pytest
from helpers.adapters import GOLDEN
from helpers.hub_server import answer_at
from helpers.tiny import CONFIG, tensors, write_hf

from jlora.errors import UsageError
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.hub import is_hub_id, nothing_there
from jlora.loading import open_adapter


@pytest.fixture(autouse=True)
def somewhere(hub, tmp_path) -> None:
    (tmp_path / "demo" / "base").mkdir(parents=True)


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.2-1B",
        "owner/name@v1",
        "owner/name@refs/pr/1",
        "a_b/_c",
        "demo/Llama@main",
    ],
)
def test_what_is_a_hub_id(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "demo/base",
        "demo/bse",
        "name",
        "a/b/c",
        "./a/b",
        "../name",
        "~/name",
        "/owner/name",
        "owner/",
        "owner/name/",
        "owner//name",
        "owner/na me",
        "owner/-name",
        "owner/name.",
        "owner/na--me",
        "owner/na..me",
        "owner/name@",
        "owner/model.gguf",
        "owner/model.safetensors",
        "owner/name.git",
        "öwner/name",
        "owner/name\n",
        "owner/" + "n" * 91,
        "n" * 300,
        "demo/base@main/../../..\0",
    ],
)
def test_what_is_no_hub_id(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("demo/bse", "did you mean 'demo/base'?"),
        ("dmo/bas", "did you mean 'demo/base'?"),
        ("demo/Llama-3.2-1B", "give demo/Llama-3.2-1B@main"),
        ("demo/base/model", "no such file or folder; give a model or a hub id"),
    ],
)
def test_the_message_names_what_was_probably_meant(name, hint):
    assert hint in str(nothing_there(name, "a model"))


def test_model_and_adapter_are_read_by_their_ids(hub, tmp_path):
    model = write_hf(tmp_path / "model", CONFIG, tensors(CONFIG))
    (model / "pytorch_model.bin").write_bytes(b"never fetched")
    repository = hub.add("models/owner/model", model)
    source = open_model("owner/model")
    assert source.provenance["source"] == "owner/model"
    assert source.provenance["revision"] == repository.commit
    assert source.config == open_model(str(model)).config
    hub.add("models/owner/adapter", GOLDEN / "basic")
    assert open_adapter("owner/adapter").config == read_adapter(GOLDEN / "basic").config
    assert "pytorch_model.bin" not in hub.downloads


@pytest.mark.parametrize("open_", [open_model, open_adapter])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "owner/none",
            "the hub has no model or adapter of that name, or a private one;",
        ),
        (
            "owner/gated",
            "it is gated: ask for access at {}/owner/gated, then log in with",
        ),
        ("owner/gated@v7", "{}/owner/gated has no revision v7; leave it out"),
        ("demoo/base", "no such local path; did you mean 'demo/base'?; the hub has no"),
    ],
)
def test_what_cannot_be_fetched_is_one_message(hub, tmp_path, open_, name, message):
    model = write_hf(tmp_path / "model", CONFIG, tensors(CONFIG))
    (model / "adapter_config.json").write_text("{}")
    hub.add("models/owner/gated", model, gated=True)
    expected = re.escape(message.format(hub.address))
    with pytest.raises(UsageError, match=expected) as error:
        open_(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("open_", [open_model, open_adapter])
def test_hub_that_does_not_answer_is_one_message(hub, monkeypatch, open_):
    answer_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        UsageError, match=r"127.0.0.1:9\) does not answer: .* try again"
    ):
        open_("owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="where there is a network, run `hf download"):
        open_("owner/name")


@pytest.mark.parametrize("open_", [open_model, open_adapter])
def test_mistyped_path_is_not_asked_for(hub, open_):
    with pytest.raises(UsageError, match="did you mean 'demo/base'"):
        open_("demo/bse")
    assert not hub.asked
