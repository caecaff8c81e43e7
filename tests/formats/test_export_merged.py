import json

import numpy as np
import pytest
import safetensors.numpy
from helpers.adapters import CASES, assert_merged, bits, changed_copy, golden, tensors
from helpers.exports import Q_PROJ, copy_base, export, read_config

from jlora.errors import CorruptError
from jlora.formats import export_merged
from jlora.formats.export_merged import plan_shards, write_merged
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.tensor_names import module_path

EMBEDDING = "model.embed_tokens.weight"


def set_one(key, index, value):
    def change(arrays):
        arrays[key][index] = value
        return arrays

    return change


@pytest.mark.parametrize("name", CASES)
def test_exported_tensors_are_the_base_but_for_what_peft_merges(name, out):
    case = golden(name)
    before, after = with_head(tensors(case.base)), with_head(tensors(export(case, out)))
    changed = [key for key in before if before[key].tobytes() != after[key].tobytes()]
    assert sorted(changed) == list(case.expected["changed"])
    assert before.keys() == after.keys()
    for key, value in case.expected.items():
        if key.startswith("merged/"):
            assert_merged(name, after[key.removeprefix("merged/")], value)


def with_head(arrays):
    return {"lm_head.weight": arrays["model.embed_tokens.weight"], **arrays}


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("tied", True),
        ("tied_embed", False),
        ("tied_lm_head", False),
        ("tied_embed_ensured", True),
        ("tied_modules_to_save", False),
        ("tied_modules_to_save_ensured", True),
        ("tied_trainable_tokens", True),
    ],
)
def test_a_tied_base_is_untied_where_its_ends_differ(name, tied, out):
    folder = export(golden(name), out, check=True)
    assert read_config(folder)["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in tensors(folder)) is not tied


def test_a_resized_vocabulary_is_exported_with_its_size(out):
    folder = export(golden("resized_vocab"), out, check=True)
    assert read_config(folder)["vocab_size"] == 84
    assert tensors(folder)["lm_head.weight"].shape == (84, 64)


def test_bytes_that_the_disk_changed_are_found(out, monkeypatch):
    read = export_merged.read_tensor
    monkeypatch.setattr(export_merged, "read_tensor", lambda entry: read(entry) + 1)
    with pytest.raises(CorruptError, match="other bytes than were written"):
        export(golden("basic"), out)
    assert not out.exists()


def test_an_adapter_of_zeros_gives_the_bytes_of_the_base(out, tmp_path):
    def no_change(arrays):
        return {k: v * 0 if "lora_B" in k else v for k, v in arrays.items()}

    adapter = changed_copy(tmp_path / "zero", "bf16", arrays=no_change)
    case = golden("bf16")._replace(folder=adapter)
    written = tensors(export(case, out))
    for key, value in tensors(case.base).items():
        assert written[key].tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["patterns", "bf16"])
def test_another_dtype_is_rounded_to_once(name, dtype, out):
    case = golden(name)
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    written = tensors(export(case, out, dtype=dtype))
    assert {value.dtype.name for value in written.values()} == {dtype}
    pair, path = adapter.tensors, module_path("model.layers.1.mlp.gate_proj")
    delta = (pair[path]["lora_B"].T @ pair[path]["lora_A"].T) * np.float32(
        adapter.scalings[path]
    )
    exact = source.read(f"{path}/kernel").T.astype(np.float32) + delta
    merged = written["model.layers.1.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(bits(merged), bits(exact.astype(merged.dtype)))
    assert read_config(out)["dtype"] == dtype


@pytest.mark.parametrize("key", [Q_PROJ, EMBEDDING])
def test_a_value_too_large_for_the_dtype_is_named(key, out, tmp_path):
    large = set_one(key, (3, 4), 1e6)
    base = copy_base(tmp_path / "base", "untied_fp32", arrays=large)
    message = rf"{key}: 1000000[.\d]+ at \[3, 4\] does not fit float16"
    with pytest.raises(CorruptError, match=message):
        export(golden("basic")._replace(base=base), out, dtype="float16")
    assert not out.exists()


def test_a_merge_that_is_not_finite_is_named(out, tmp_path):
    def huge(arrays):
        return {k: v * np.float32(1e30) for k, v in arrays.items()}

    adapter = changed_copy(tmp_path / "huge", "basic", arrays=huge)
    with pytest.raises(CorruptError, match=rf"{Q_PROJ}: .* after the merge"):
        export(golden("basic")._replace(folder=adapter), out)
    assert not out.exists()


def test_a_mixed_model_keeps_each_dtype(out, tmp_path):
    def narrow_norm(arrays):
        key = "model.norm.weight"
        return arrays | {key: arrays[key].astype(np.float16)}

    base = copy_base(tmp_path / "base", "untied_fp32", arrays=narrow_norm)
    written = tensors(export(golden("basic")._replace(base=base), out))
    assert written["model.norm.weight"].dtype == np.float16
    assert written[Q_PROJ].dtype == np.float32
    assert read_config(out)["dtype"] == "float32"


def test_shards_hold_every_tensor_once_below_the_limit(out, monkeypatch):
    whole = tensors(export(golden("basic"), out))
    monkeypatch.setattr(export_merged, "MAX_SHARD_BYTES", 60_000)
    sharded = export(golden("basic"), out.parent / "sharded")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    found = {}
    for name in names:
        shard = safetensors.numpy.load_file(sharded / name)
        assert sum(value.nbytes for value in shard.values()) <= 60_000
        assert not found.keys() & shard.keys()
        assert {index["weight_map"][key] for key in shard} == {name}
        found |= shard
    for key, value in whole.items():
        np.testing.assert_array_equal(found[key], value)
    assert not (sharded / "model.safetensors").exists()


def test_a_sharded_export_is_read_again(out, monkeypatch):
    monkeypatch.setattr(export_merged, "MAX_SHARD_BYTES", 60_000)
    export(golden("basic"), out, check=True)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(monkeypatch):
    monkeypatch.setattr(export_merged, "MAX_SHARD_BYTES", 1)
    specs = open_model(str(golden("basic").base)).tensors
    shards = plan_shards(specs)
    assert [len(keys) for keys in shards.values()] == [1] * len(specs)


def test_files_have_the_format_transformers_insists_on(out):
    export(golden("basic"), out)
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_merging_reads_each_tensor_once(out, monkeypatch):
    case = golden("basic")
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    paths = []
    read = source.read
    object.__setattr__(source, "read", lambda path: paths.append(path) or read(path))
    out.mkdir()
    write_merged(source, adapter, out, "keep")
    assert sorted(paths) == sorted(source.tensors)
