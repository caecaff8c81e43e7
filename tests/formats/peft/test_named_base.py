import shutil
from dataclasses import replace

import pytest
from helpers.adapters import changed_copy, golden
from helpers.exports import peft_for
from helpers.tiny import CONFIG, tensors, write_hf

from jlora.errors import UsageError
from jlora.formats.base.base_writer import write_base
from jlora.formats.open_model import open_model
from jlora.formats.peft.named_base import name_for_peft


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))


def test_peft_finds_a_folder_or_hub_id_by_the_name_given(hf):
    source = open_model(str(hf))
    assert name_for_peft(source, str(hf)) == str(hf)
    assert name_for_peft(source, "owner/name@abc") == "owner/name@abc"


def test_peft_finds_what_a_base_was_converted_from(hf, tmp_path):
    write_base(open_model(str(hf)), tmp_path / "base", "keep", overwrite=False)
    base = open_model(str(tmp_path / "base"))
    assert name_for_peft(base, str(tmp_path / "base")) == str(hf)
    of_hub = {"format": "hf", "source": "owner/name", "revision": "abc"}
    assert name_for_peft(replace(base, provenance=of_hub), "base") == "owner/name@abc"


def test_peft_cannot_load_a_gguf_file(hf):
    source = replace(open_model(str(hf)), provenance={"format": "gguf", "source": "m"})
    assert name_for_peft(source, "m") is None


def test_pissa_without_its_base_is_refused(out, tmp_path):
    folder = changed_copy(
        tmp_path / "adapter", "pissa", {"base_model_name_or_path": "nowhere"}
    )
    with pytest.raises(UsageError, match="needs its base, named as 'nowhere'"):
        peft_for("peft", folder, out)


@pytest.mark.parametrize(
    ("name", "reader", "why"),
    [
        ("pissa", "peft", "init_lora_weights='pissa'"),
        ("tied_embed", "gguf", "finding out whether its embeddings are tied"),
    ],
)
def test_an_adapter_that_names_no_base_is_refused_if_it_is_needed(
    name, reader, why, out, tmp_path, monkeypatch
):
    monkeypatch.chdir(golden(name).base)  # a model, but not the adapter's
    folder = changed_copy(tmp_path / "adapter", name, {"base_model_name_or_path": None})
    with pytest.raises(UsageError, match=f"names no base: {why} needs it; set base"):
        peft_for(reader, folder, out)
    assert not out.exists()


def test_embeddings_are_left_out_with_a_warning_if_no_base_is_named(
    out, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(golden("embed").base)
    folder = changed_copy(tmp_path / "a", "embed", {"base_model_name_or_path": None})
    peft_for("peft", folder, out)
    assert "names no base: comparing the vocab" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "reader"), [("embed", "gguf"), ("pissa", "peft")])
def test_only_what_is_needed_of_a_base_on_the_hub_is_downloaded(
    name, reader, out, tmp_path, monkeypatch
):
    asked = []

    def fetch(repository, *, revision, allow_patterns, **_):
        asked.append((repository, revision))
        if name == "pissa":
            return str(golden(name).base)
        assert allow_patterns == ["config.json"]
        shutil.copy(golden(name).base / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    named = {"base_model_name_or_path": "owner/name", "revision": "abc"}
    peft_for(reader, changed_copy(tmp_path / "adapter", name, named), out)
    assert set(asked) == {("owner/name", "abc")}
