import json

import numpy as np
import pytest
from helpers.adapters import CASES, GOLDEN, changed_copy, golden
from helpers.exports import peft_for

from jlora.errors import UnsupportedError
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.serving_formats import with_one_rank


def update(adapter, path):
    pair = adapter.pairs[path]
    wide = pair["lora_A"].astype(np.float64) @ pair["lora_B"]
    return wide * adapter.scalings[path]


@pytest.mark.parametrize("name", CASES)
def test_one_rank_and_scaling_keep_the_update(name):
    before = read_adapter(golden(name).folder)
    after = with_one_rank(before)
    assert set(after.scalings.values()) == {1.0}
    for path in before.pairs:
        expected = update(before, path)
        # One float32 rounding of each element of B.
        limit = 1e-7 * np.abs(expected).max() + 1e-9
        np.testing.assert_allclose(update(after, path), expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("name", "reader", "rank", "converted"),
    [
        ("basic", "vllm", 8, False),
        ("rslora", "vllm", 8, False),
        ("patterns", "vllm", 8, True),
        ("basic", "gguf", 8, False),
        ("rslora", "gguf", 8, True),
        ("patterns", "gguf", 8, True),
        ("patterns", "peft", 8, False),
    ],
)
def test_only_what_a_reader_ignores_is_converted(name, reader, rank, converted, out):
    adapter = peft_for(reader, golden(name).folder, out)
    assert adapter.config.r == rank
    assert (set(adapter.scalings.values()) == {1.0} and converted) or (
        adapter.scalings == read_adapter(golden(name).folder).scalings and not converted
    )


def test_converted_adapters_have_one_rank_and_no_patterns(out):
    adapter = peft_for("vllm", golden("patterns").folder, out)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert (settings["r"], settings["lora_alpha"]) == (8, 8)
    assert {p["lora_A"].shape[1] for p in adapter.tensors.values()} == {8}
    place_adapter(adapter, open_model(str(golden("patterns").base)).config)


@pytest.mark.parametrize(("rank", "needed"), [(8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_rank_to_serve_with_is_printed(rank, needed, tmp_path, capsys):
    peft_for("vllm", wide_adapter(tmp_path / "wide", rank), tmp_path / "out")
    assert f"--max-lora-rank {needed}\n" in capsys.readouterr().out


def test_a_rank_that_vllm_does_not_serve_is_refused(tmp_path):
    folder = wide_adapter(tmp_path / "wide", 513)
    with pytest.raises(UnsupportedError, match=r"rank 513.*jlora export"):
        peft_for("vllm", folder, tmp_path / "out")


def wide_adapter(folder, rank):
    def widen(arrays):
        missing = rank - 8
        return {
            key: np.pad(
                v, ((0, missing), (0, 0)) if "_A" in key else ((0, 0), (0, missing))
            )
            for key, v in arrays.items()
        }

    return changed_copy(folder, "defaults", {"r": rank}, arrays=widen)


@pytest.mark.parametrize(
    ("base", "hint"),
    [
        ("owner/name", "my out'\n"),
        ("_base/untied_fp32", "my out' --base _base/untied_fp32\n"),
        ("base.gguf", "my out' --base FOLDER"),
        (None, "my out' --base FOLDER"),
    ],
)
def test_the_command_for_llama_cpp_names_the_base(
    base, hint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(GOLDEN)
    settings = {"base_model_name_or_path": base}
    folder = changed_copy(tmp_path / "adapter", "basic", settings)
    peft_for("gguf", folder, tmp_path / "my out")
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reader", "words"),
    [
        ("dora", "vllm", r"DoRA \(use_dora\)"),
        ("dora", "gguf", r"DoRA \(use_dora\)"),
        ("modules_to_save", "vllm", "whole weights"),
        ("modules_to_save_norm", "gguf", "whole weights"),
        ("trainable_tokens", "vllm", "rows of single tokens"),
        ("bias_all", "gguf", "biases"),
        ("resized_vocab", "vllm", "a resized vocabulary"),
        ("tied_embed", "gguf", "on tied embeddings"),
        ("tied_lm_head", "gguf", "on tied embeddings"),
        ("tied_embed_ensured", "gguf", "on tied embeddings"),
    ],
)
def test_what_a_reader_cannot_load_is_refused(name, reader, words, out, monkeypatch):
    monkeypatch.chdir(GOLDEN)  # which the adapters name their bases from
    with pytest.raises(UnsupportedError, match=words):
        peft_for(reader, golden(name).folder, out)
    assert not out.exists()
