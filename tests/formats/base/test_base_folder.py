import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT
from helpers.tiny import CONFIG, EMBEDDING, Q_PROJ, tensors, write_hf, write_sharded

from convert.from_hf import Arguments, main
from convert.info import describe
from jlora.cli.command import run_command
from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.formats import array_blocks as blocks
from jlora.formats.base.base_folder import open_base, write_base
from jlora.formats.load_params import load_params
from jlora.formats.model_source import Dtype, open_source
from jlora.formats.safetensors_file import Spec, write_safetensors
from jlora.formats.tensor_names import all_names
from jlora.train import checkpoint
from jlora.train.checkpoint import restore_tree


@pytest.fixture
def hf(tmp_path):
    arrays = tensors(CONFIG, ml_dtypes.bfloat16)
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    folder = write_hf(tmp_path / "hf", CONFIG, arrays)
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_bytes(b"x")
    return folder


def convert_to(hf, out, dtype: Dtype = "keep", overwrite=False):
    return write_base(open_source(str(hf)), out, dtype, overwrite)


def command(*words):
    return run_command(main, Arguments, argv=words)


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16", "float16"])
def test_base_gives_the_params_of_its_source(hf, tmp_path, dtype):
    convert_to(hf, tmp_path / "out", dtype)
    base = load_params(open_source(str(tmp_path / "out")))
    direct = load_params(open_source(str(hf)), dtype=dtype)
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), base, direct
    )
    assert jax.tree.all(equal)


def test_base_keeps_side_files_verbatim_and_the_configuration(hf, tmp_path):
    convert_to(hf, tmp_path / "out")
    source, base = open_source(str(hf)), open_source(str(tmp_path / "out"))
    assert base.files == source.files
    assert list(base.hf_config.items()) == list(source.hf_config.items())
    assert base.config == source.config


def test_base_can_be_converted_again_with_the_same_digest(hf, tmp_path):
    first = convert_to(hf, tmp_path / "out")
    assert convert_to(tmp_path / "out", tmp_path / "again") == first


def test_digest_depends_neither_on_place_nor_on_shards(tmp_path):
    arrays = tensors(CONFIG)
    one = write_hf(tmp_path / "one", CONFIG, arrays)
    keys = sorted(arrays)
    shards = [{key: arrays[key] for key in keys[i::2]} for i in range(2)]
    two = write_sharded(tmp_path / "elsewhere" / "two", CONFIG, shards)
    assert convert_to(one, tmp_path / "a") == convert_to(two, tmp_path / "b")


def test_digest_changes_with_one_bit(hf, tmp_path):
    first = convert_to(hf, tmp_path / "a")
    arrays = tensors(CONFIG, ml_dtypes.bfloat16)
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    arrays[Q_PROJ].view(np.uint16)[0, 0] ^= 1
    write_hf(hf, CONFIG, arrays)
    assert convert_to(hf, tmp_path / "b") != first


def flip_a_byte(folder, part):
    data = [p for p in (folder / "params" / part).glob("*/*") if p.name[0].isdigit()]
    file = max(data, key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_flipped_byte_is_refused_with_the_leaf(tmp_path):
    hf = write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))
    convert_to(hf, tmp_path / "out")
    flip_a_byte(tmp_path / "out", "embed_tokens")
    with pytest.raises(CorruptError, match="embed_tokens"):
        load_params(open_base(tmp_path / "out"))


def test_cut_chunk_is_refused_with_the_leaf(hf, tmp_path):
    convert_to(hf, tmp_path / "out")
    chunk = tmp_path / "out/params/norm/norm.scale/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"norm/scale is damaged .* shorter"):
        load_params(open_base(tmp_path / "out"))


def test_orbax_itself_restores_the_base(hf, tmp_path):
    convert_to(hf, tmp_path / "out")
    params = load_params(open_base(tmp_path / "out"))
    restored = restore_tree(tmp_path / "out/params/layers.0")["layers"]["0"]
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, params["layers"]["0"]))


@pytest.fixture
def chunked(tmp_path, monkeypatch):
    """A base whose leaves are cut into chunks of 128 bytes, and its source."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 128)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    config = CONFIG | {"vocab_size": 32, "intermediate_size": 48}
    hf = write_hf(tmp_path / "hf", config, tensors(config))
    convert_to(hf, tmp_path / "out")
    return tmp_path / "out", hf


BOXES = [(0, 16, 0, 16), (0, 8, 0, 16), (3, 9, 5, 16), (0, 16, 12, 13)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_box_is_that_part_of_the_whole(chunked, which, box):
    source = open_source(str(chunked[which]))
    path = "layers/0/self_attn/q_proj/kernel"
    index = (slice(*box[:2]), slice(*box[2:]))
    np.testing.assert_array_equal(source.read(path, index), source.read(path)[index])


def test_a_box_needs_only_its_chunks(chunked):
    for chunk in (chunked[0] / "params/embed_tokens/embed_tokens.embedding").iterdir():
        if not chunk.name.startswith("0."):
            chunk.unlink()
    source = open_source(str(chunked[0]))
    path = "embed_tokens/embedding"
    rows = source.tensors[path].chunk[0]  # type: ignore[attr-defined]
    assert rows < 32
    source.read(path, (slice(0, rows), slice(0, 16)))
    with pytest.raises(CorruptError, match="no such file"):
        source.read(path, (slice(0, rows + 1), slice(0, 16)))


def test_missing_part_is_refused(hf, tmp_path):
    convert_to(hf, tmp_path / "out")
    (tmp_path / "out" / "params" / "norm").rename(tmp_path / "moved")
    with pytest.raises(CorruptError, match="norm"):
        load_params(open_base(tmp_path / "out"))


def edit(folder, change):
    record = json.loads((folder / "jlora.json").read_text())
    change(record)
    (folder / "jlora.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: r.update(schema=1), UnsupportedError, "schema 1; this jlora reads"),
        (lambda r: r.pop("leaves"), CorruptError, "leaves is not an object"),
        (lambda r: r["leaves"].pop("norm/scale"), CorruptError, "content_digest"),
        (
            lambda r: r["leaves"]["norm/scale"].update(dtype="int8"),
            CorruptError,
            "norm/scale: expected dtype",
        ),
        (
            lambda r: r["leaves"]["norm/scale"].update(shape=[4], chunk=[4]),
            CorruptError,
            r"norm/scale \[4\] instead of \[16\]",
        ),
    ],
)
def test_edited_record_is_refused(hf, tmp_path, change, error, message):
    convert_to(hf, tmp_path / "out")
    edit(tmp_path / "out", change)
    with pytest.raises(error, match=message):
        open_base(tmp_path / "out")


def test_nan_leaves_no_target(tmp_path):
    arrays = tensors(CONFIG)
    arrays[EMBEDDING][1, 2] = np.nan
    hf = write_hf(tmp_path / "hf", CONFIG, arrays)
    with pytest.raises(CorruptError, match=r"at \[1, 2\]"):
        convert_to(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_target_equal_to_the_source_is_refused(hf):
    with pytest.raises(UsageError, match="is or holds the source"):
        convert_to(hf, hf, overwrite=True)


def test_command_converts_and_prints_the_facts(hf, tmp_path, capsys):
    assert command(str(hf), str(tmp_path / "out"), "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    digest = open_base(tmp_path / "out").provenance["content_digest"]
    for fact in ("4,560", "bfloat16 (21)", "default, theta 10,000", digest):
        assert fact in printed


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--dtype", "int8"], 2, "dtype"),
        (["--overwite"], 2, "did you mean --overwrite"),
    ],
)
def test_command_refuses_with_the_exit_status(
    hf, tmp_path, capsys, words, status, message
):
    assert command(str(hf), str(tmp_path / "out"), *words) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_looks_at_the_target_before_the_source(hf, capsys):
    assert command("no/such/model", str(hf)) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_second_conversion_needs_overwrite(hf, tmp_path, capsys):
    words = (str(hf), str(tmp_path / "out"))
    assert [command(*words), command(*words), command(*words, "--overwrite")] == [
        0,
        2,
        0,
    ]
    assert "exists and is not empty" in capsys.readouterr().err


def test_description_of_a_source_reads_no_weights(hf):
    (hf / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    lines = "\n".join(describe(open_source(str(hf))))
    for fact in ("2 layers of 16", "4 heads and 2 kv heads of 4", "own head"):
        assert fact in lines


PROGRAM = """
import resource, sys
from convert.from_hf import Arguments, main
from jlora.formats.load_params import load_params
from jlora.formats.model_source import open_source

folder, load = sys.argv[1], sys.argv[2] == "load"

def work(name):
    if load:
        load_params(open_source(f"{folder}/{name}"))
    else:
        main(Arguments(f"{folder}/{name}", f"{folder}/base-{name}"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = work("small")  # what the libraries take whatever the model's size
print("peak", (work("large") - before) * 1024)
"""


def write_large(folder: Path) -> dict[str, int]:
    config = CONFIG | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    }
    rng = np.random.default_rng(0)
    specs = {
        name.key: Spec(name.hf_shape, np.dtype(np.float32))
        for name in all_names(LlamaConfig.from_hf(config))
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(
        folder / "model.safetensors",
        specs,
        lambda key: rng.random(specs[key].shape, np.float32),
    )
    sizes = {key: spec.nbytes for key, spec in specs.items()}
    layer = sum(size for key, size in sizes.items() if "layers.0." in key)
    return {
        "total": sum(sizes.values()),
        "layer": layer,
        "tensor": max(sizes.values()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("work", ["convert", "load"])
def test_peak_memory_stays_small(tmp_path, work):
    write_hf(tmp_path / "small", CONFIG, tensors(CONFIG))
    size = write_large(tmp_path / "large")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), work],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    peak = int(result.stdout.split("peak ")[1])
    kept = size["layer"] if work == "convert" else size["total"]
    assert peak < kept + 2 * size["tensor"]
