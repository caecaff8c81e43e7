import json
import os
import shutil
import stat
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers.adapters import (
    CASES,
    GOLDEN,
    assert_merged,
    bits,
    changed_copy,
    golden,
    tensors,
)

from convert import to_hf
from convert.to_hf import plan_shards, write_merged
from convert.to_peft import Arguments as ToPeft
from convert.to_peft import bake
from convert.to_peft import main as to_peft
from jlora.cli.command import run_command
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.formats import verify_export as verify
from jlora.formats.base.base_writer import write_base
from jlora.formats.hf.hf_config import export_config
from jlora.formats.open_model import open_model
from jlora.formats.peft.attach_adapter import attach_adapter, check_fit, read_adapter
from jlora.formats.tensor_names import module_path
from jlora.formats.verify_export import compare

HF_GOLDEN = GOLDEN.parent / "hf"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def export(case, out, *, dtype: Any = "keep", check: Any = False, **more):
    arguments = to_hf.Arguments(
        out=str(out),
        model=str(case.base),
        adapter=str(case.folder),
        dtype=dtype,
        verify=check,
        **more,
    )
    to_hf.main(arguments)
    return out


def copy_base(folder, name, **more):
    """Copies a golden base, with tensors passed through and settings merged in."""
    source = GOLDEN / "_base" / name
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | more.get("config", {})
    (folder / "config.json").write_text(json.dumps(config))
    arrays = tensors(source)
    safetensors.numpy.save_file(
        more.get("arrays", lambda a: a)(arrays), folder / "model.safetensors"
    )
    return folder


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


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


@pytest.mark.parametrize("name", ["patterns", "tied", "bf16_rslora"])
def test_exported_model_equals_base_and_adapter(name, out):
    case = golden(name)
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    figures = compare(source, adapter, export(case, out))
    assert figures.agree
    assert figures.memory_to_disk == 0


def test_figures_of_an_export_are_printed(out, capsys):
    export(golden("basic"), out, check=None)
    text = capsys.readouterr().out
    assert "largest logit difference: base+adapter to merged" in text
    assert "read back 21 tensors: all as written" in text


def test_a_wrong_merge_is_found_and_nothing_is_written(out, monkeypatch):
    exact = to_hf.merge_module

    def doubled(leaves, dtype):
        scaling = 2 * leaves.get("lora_scaling", np.float32(1))
        return exact({**leaves, "lora_scaling": scaling}, dtype)

    monkeypatch.setattr(to_hf, "merge_module", doubled)
    with pytest.raises(CorruptError, match="not the model of base and adapter"):
        export(golden("bf16"), out, check=True)
    assert list(out.parent.iterdir()) == []


def test_models_above_the_limit_are_not_checked_unasked(out, monkeypatch, capsys):
    monkeypatch.setattr(to_hf, "MAX_VERIFIED_PARAMETERS", 1000)
    monkeypatch.setattr(to_hf, "check", None)
    export(golden("basic"), out, check=None)
    assert "logit" not in capsys.readouterr().out


def test_bytes_that_the_disk_changed_are_found(out, monkeypatch):
    read = to_hf.read_tensor
    monkeypatch.setattr(to_hf, "read_tensor", lambda entry: read(entry) + 1)
    with pytest.raises(CorruptError, match="other bytes than were written"):
        export(golden("basic"), out)
    assert not out.exists()


@pytest.mark.parametrize("base", ["untied_fp32", "tied_fp32"])
def test_rope_and_dtype_stand_where_every_reader_looks(base, out):
    name = {"untied_fp32": "basic", "tied_fp32": "tied"}[base]
    config = read_config(export(golden(name), out))
    theta = {"untied_fp32": 500000.0, "tied_fp32": 50000.0}[base]
    assert config["rope_theta"] == theta
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert config["dtype"] == config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["basic", "tied"])
def test_other_settings_are_kept_verbatim(name, out):
    case = golden(name)
    before, after = read_config(case.base), read_config(export(case, out))
    rewritten = {"rope_theta", "rope_scaling", "rope_parameters"}
    rewritten |= {"dtype", "torch_dtype"}
    for key in before.keys() - rewritten:
        assert after[key] == before[key]
    assert after.keys() == before.keys() | rewritten


def test_an_exported_configuration_means_the_same_model(out):
    source = open_model(str(HF_GOLDEN / "llama3"))
    out.mkdir()
    for name, data in files(HF_GOLDEN / "llama3").items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(
        json.dumps(export_config(source.hf_config, source.config, "float32"))
    )
    assert open_model(str(out)).config == source.config


def test_llama3_rope_is_written_for_every_reader():
    source = open_model(str(HF_GOLDEN / "llama3"))
    config = export_config(source.hf_config, source.config, "bfloat16")
    numbers = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert config["rope_scaling"] == numbers
    assert config["rope_parameters"] == numbers | {"rope_theta": 500000.0}
    assert config["original_max_position_embeddings"] == 32
    assert config["rope_theta"] == 500000.0


def test_code_and_private_settings_are_stripped(out, tmp_path):
    settings = {
        "auto_map": {"AutoModel": "evil.Model"},
        "quantization_config": None,
        "_name_or_path": "x",
        "_attn_implementation_internal": "eager",
        "pretraining_tp": 2,
    }
    base = copy_base(tmp_path / "base", "untied_fp32", config=settings)
    config = read_config(export(golden("basic")._replace(base=base), out))
    assert not settings.keys() - {"pretraining_tp"} & config.keys()
    assert config["pretraining_tp"] == 2


def test_side_files_are_copied_byte_for_byte(out, tmp_path):
    base = copy_base(tmp_path / "base", "untied_fp32")
    side = {
        "tokenizer.json": b'{ "odd":  "spacing"}\r\n',
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "tokenizer.model": bytes(range(256)),
        "additional_chat_templates/tool.jinja": b"{{ messages }}",
    }
    (base / "additional_chat_templates").mkdir()
    for name, data in side.items():
        (base / name).write_bytes(data)
    (base / "modeling_evil.py").write_text("raise SystemExit")
    written = files(export(golden("basic")._replace(base=base), out))
    assert written.keys() == {"config.json", "model.safetensors"} | side.keys()
    assert {name: written[name] for name in side} == side


def test_exporting_twice_gives_the_same_bytes(tmp_path):
    first, second = (export(golden("bf16"), tmp_path / name) for name in "ab")
    assert files(first) == files(second)


def test_a_converted_base_exports_the_same_model(tmp_path):
    case = golden("bf16")
    write_base(open_model(str(case.base)), tmp_path / "base", "keep", False)
    converted = case._replace(base=tmp_path / "base")
    first, second = (
        export(c, tmp_path / name) for c, name in ((case, "a"), (converted, "b"))
    )
    assert files(first) == files(second)


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


@pytest.mark.parametrize("key", [Q_PROJ, TABLE])
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
    monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 60_000)
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
    monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 60_000)
    case = golden("basic")
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    assert compare(source, adapter, export(case, out)).agree


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(monkeypatch):
    monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 1)
    specs = open_model(str(golden("basic").base)).tensors
    shards = plan_shards(specs)
    assert [len(keys) for keys in shards.values()] == [1] * len(specs)


def test_files_have_the_format_transformers_insists_on(out):
    export(golden("basic"), out)
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(umask, out):
    before = os.umask(umask)
    try:
        export(golden("basic"), out)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_an_existing_folder_needs_overwrite(out):
    export(golden("basic"), out)
    first = files(out)
    with pytest.raises(UsageError, match="--overwrite"):
        export(golden("rslora"), out)
    assert files(out) == first
    export(golden("rslora"), out, overwrite=True)
    assert files(out) != first


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_the_source_is_never_overwritten(what, tmp_path):
    base = copy_base(tmp_path / "base", "untied_fp32")
    adapter = changed_copy(tmp_path / "adapter", "basic")
    case = golden("basic")._replace(base=base, folder=adapter)
    with pytest.raises(UsageError, match="the source"):
        export(case, tmp_path / what, overwrite=True)


def test_an_adapter_of_another_model_is_refused_before_writing(out):
    case = golden("basic")._replace(base=HF_GOLDEN / "mha")
    with pytest.raises(CorruptError, match="does not fit the model"):
        export(case, out)
    assert not out.exists()


def test_merging_reads_each_tensor_once(out, monkeypatch):
    case = golden("basic")
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    paths = []
    read = source.read
    object.__setattr__(source, "read", lambda path: paths.append(path) or read(path))
    out.mkdir()
    write_merged(source, adapter, out, "keep")
    assert sorted(paths) == sorted(source.tensors)


def test_the_command_reports_and_succeeds(out, capsys):
    case = golden("patterns")
    words = ["--model", str(case.base), "--adapter", str(case.folder), str(out)]
    assert run_command(to_hf.main, to_hf.Arguments, argv=words) == 0
    assert "merged 14 of 21 tensors" in capsys.readouterr().out


def test_the_command_fails_with_one_message(out, capsys):
    words = ["--model", str(out / "none"), "--adapter", "x", str(out)]
    status = run_command(to_hf.main, to_hf.Arguments, argv=words)
    assert status == 2
    assert capsys.readouterr().err.startswith(f"error: {out / 'none'}: no such file")


def test_kl_of_equal_logits_is_zero():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert verify._mean_kl(logits, logits + 7) == pytest.approx(0, abs=1e-15)


def peft_for(reader, folder, out):
    to_peft(ToPeft(out=str(out), adapter=str(folder), for_=reader))
    return read_adapter(out)


def update(adapter, path):
    pair = adapter.pairs[path]
    wide = pair["lora_A"].astype(np.float64) @ pair["lora_B"]
    return wide * adapter.scalings[path]


@pytest.mark.parametrize("name", CASES)
def test_baking_keeps_the_update_with_scaling_one(name):
    before = read_adapter(golden(name).folder)
    after = bake(before)
    assert set(after.scalings.values()) == {1.0}
    for path in before.pairs:
        expected = update(before, path)
        # One float32 rounding of each element of B.
        limit = 1e-7 * np.abs(expected).max() + 1e-9
        np.testing.assert_allclose(update(after, path), expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("name", "reader", "rank", "baked"),
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
def test_only_what_a_reader_ignores_is_baked(name, reader, rank, baked, out):
    adapter = peft_for(reader, golden(name).folder, out)
    assert adapter.config.r == rank
    assert (set(adapter.scalings.values()) == {1.0} and baked) or (
        adapter.scalings == read_adapter(golden(name).folder).scalings and not baked
    )


def test_baked_adapters_have_one_rank_and_no_patterns(out):
    adapter = peft_for("vllm", golden("patterns").folder, out)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert (settings["r"], settings["lora_alpha"]) == (8, 8)
    assert {p["lora_A"].shape[1] for p in adapter.tensors.values()} == {8}
    check_fit(adapter, open_model(str(golden("patterns").base)).config)


@pytest.mark.parametrize("reader", ["peft", "vllm", "gguf"])
def test_an_adapter_is_written_with_the_same_bytes_twice(reader, tmp_path):
    folder = golden("patterns").folder
    for name in "ab":
        peft_for(reader, folder, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_writing_what_was_written_changes_nothing(tmp_path):
    peft_for("peft", golden("regex").folder, tmp_path / "a")
    peft_for("peft", tmp_path / "a", tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(("rank", "needed"), [(8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_rank_to_serve_with_is_printed(rank, needed, tmp_path, capsys):
    peft_for("vllm", wide_adapter(tmp_path / "wide", rank), tmp_path / "out")
    assert f"--max-lora-rank {needed}\n" in capsys.readouterr().out


def test_a_rank_that_vllm_does_not_serve_is_refused(tmp_path):
    folder = wide_adapter(tmp_path / "wide", 513)
    with pytest.raises(UnsupportedError, match=r"rank 513.*convert\.to_hf"):
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
        ("owner/name", "gguf.py OUT\n"),
        ("_base/untied_fp32", "gguf.py OUT --base _base/untied_fp32\n"),
        ("base.gguf", "gguf.py OUT --base FOLDER"),
        (None, "gguf.py OUT --base FOLDER"),
    ],
)
def test_llama_cpp_needs_to_know_the_base(base, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    settings = {"base_model_name_or_path": base}
    folder = changed_copy(tmp_path / "adapter", "basic", settings)
    peft_for("gguf", folder, tmp_path / "out")
    assert hint in capsys.readouterr().out


def test_an_adapter_is_not_written_over_its_source(tmp_path):
    folder = changed_copy(tmp_path / "adapter", "basic")
    arguments = ToPeft(out=str(folder), adapter=str(folder), overwrite=True)
    with pytest.raises(UsageError, match="the source"):
        to_peft(arguments)


def test_the_adapter_command_takes_its_reader_as_a_flag(out, capsys):
    words = ["--adapter", str(golden("basic").folder), "--for", "vllm", str(out)]
    assert run_command(to_peft, ToPeft, argv=words) == 0
    assert "written for vllm" in capsys.readouterr().out


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
        ("tied_embed", "gguf", "either end of a table"),
        ("tied_lm_head", "gguf", "either end of a table"),
        ("tied_embed_ensured", "gguf", "either end of a table"),
    ],
)
def test_what_a_reader_cannot_load_is_refused(name, reader, words, out, monkeypatch):
    monkeypatch.chdir(GOLDEN)  # which the adapters name their bases from
    with pytest.raises(UnsupportedError, match=words):
        peft_for(reader, golden(name).folder, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_that_peft_took_out_of_the_base_is_exported_as_plain_lora(
    name, out, monkeypatch
):
    monkeypatch.chdir(GOLDEN)
    adapter = peft_for("peft", golden(name).folder, out)
    assert adapter.config.init_lora_weights is True
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 32)
    model, base, _ = golden(name).load()
    params = attach_adapter(base, model.config, adapter)
    logits = model.apply({"params": params}, golden(name).tokens)
    np.testing.assert_allclose(logits, golden(name).expected["logits"], atol=1e-4)


def test_a_start_without_its_base_cannot_be_exported(out, tmp_path):
    folder = changed_copy(
        tmp_path / "adapter", "pissa", {"base_model_name_or_path": "nowhere"}
    )
    with pytest.raises(UsageError, match="needs its base, named as 'nowhere'"):
        peft_for("peft", folder, out)


@pytest.mark.parametrize(
    ("name", "reader", "why"),
    [
        ("pissa", "peft", "init_lora_weights='pissa'"),
        ("tied_embed", "gguf", "telling whether embedding and head share a table"),
    ],
)
def test_what_needs_a_base_says_that_none_is_named(
    name, reader, why, out, tmp_path, monkeypatch
):
    monkeypatch.chdir(golden(name).base)  # a model, but not the adapter's
    folder = changed_copy(tmp_path / "adapter", name, {"base_model_name_or_path": None})
    with pytest.raises(UsageError, match=f"names no base: {why} needs it; set base"):
        peft_for(reader, folder, out)
    assert not out.exists()


def test_tables_without_a_named_base_are_left_out_with_a_warning(
    out, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(golden("embed").base)
    folder = changed_copy(tmp_path / "a", "embed", {"base_model_name_or_path": None})
    peft_for("peft", folder, out)
    assert "names no base: telling a resized vocab" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "reader"), [("embed", "gguf"), ("pissa", "peft")])
def test_of_a_base_on_the_hub_no_more_is_fetched_than_needed(
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
