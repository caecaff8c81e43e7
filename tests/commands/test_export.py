import os
import stat

import numpy as np
import pytest
from helpers.adapters import changed_copy, files, golden
from helpers.commands import call, succeed
from helpers.exports import HF_GOLDEN, copy_base, export

from convert import to_hf
from jlora.cli.command import run_command
from jlora.errors import CorruptError, UsageError
from jlora.formats import export_merged, verify_export
from jlora.formats.base.base_writer import write_base
from jlora.formats.open_model import open_model
from jlora.loading import base_model_of


def test_figures_of_an_export_are_printed(out, capsys):
    export(golden("basic"), out, check=None)
    text = capsys.readouterr().out
    assert "largest logit difference: base+adapter to merged" in text
    assert "read back 21 tensors: all as written" in text


def test_a_wrong_merge_is_found_and_nothing_is_written(out, monkeypatch):
    exact = export_merged.merge_module

    def doubled(leaves, dtype):
        scaling = 2 * leaves.get("lora_scaling", np.float32(1))
        return exact({**leaves, "lora_scaling": scaling}, dtype)

    monkeypatch.setattr(export_merged, "merge_module", doubled)
    with pytest.raises(CorruptError, match="not the model of base and adapter"):
        export(golden("bf16"), out, check=True)
    assert list(out.parent.iterdir()) == []


def test_large_models_are_only_verified_on_request(out, monkeypatch, capsys):
    monkeypatch.setattr(verify_export, "MAX_PARAMETERS", 1000)
    monkeypatch.setattr(verify_export, "verify_export", None)
    export(golden("basic"), out, check=None)
    assert "logit" not in capsys.readouterr().out


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


def test_the_command_reports_and_succeeds(out, capsys):
    case = golden("patterns")
    words = ["--model", str(case.base), "--adapter", str(case.folder), str(out)]
    assert run_command(to_hf.main, to_hf.Arguments, argv=words) == 0
    assert "merged 14 of 21 tensors" in capsys.readouterr().out


def test_a_run_or_adapter_says_which_model_it_is_for(
    out, workdir, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(workdir)
    for folder in (run, run / "adapter"):
        assert base_model_of(str(folder)) == "hf"
    flags = ("--verify", "false", "--overwrite")
    for words in ([run, out], ["--adapter", run, out], [run / "adapter", out]):
        assert "merged 14 of 21 tensors" in succeed("convert.to_hf", *words, *flags)
    nameless = changed_copy(
        tmp_path / "nameless", "basic", {"base_model_name_or_path": None}
    )
    done = call("convert.to_hf", nameless, tmp_path / "other")
    assert (done.status, "give --model" in done.err) == (2, True)


def test_the_command_fails_with_one_message(out, capsys):
    words = ["--model", str(out / "none"), "--adapter", "x", str(out)]
    status = run_command(to_hf.main, to_hf.Arguments, argv=words)
    assert status == 2
    assert capsys.readouterr().err.startswith(f"error: {out / 'none'}: no such file")
