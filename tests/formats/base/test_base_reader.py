import json
import shutil
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.tiny import CONFIG, tensors, write_hf

from jlora.errors import CorruptError, UnsupportedError
from jlora.formats.base import base_record
from jlora.formats.base.base_reader import open_base
from jlora.formats.base.base_writer import write_base
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.formats.safetensors_file import read_header


@pytest.fixture
def base(hf, tmp_path):
    write_base(open_model(str(hf)), tmp_path / "base", "keep", False)
    return tmp_path / "base"


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("path", ["embed_tokens/embedding", "norm/scale"])
def test_a_flipped_bit_is_refused_with_the_tensor(base, path):
    entry = open_entries(base)[path]
    flip(entry.file, entry.offset + entry.nbytes // 2)
    with pytest.raises(CorruptError, match=f"{path} is damaged .* differ"):
        load_params(open_base(base))


def open_entries(base):
    return {
        path: entry
        for file in (base / "params").iterdir()
        for path, entry in read_header(file).items()
    }


def test_a_cut_file_is_refused(base):
    file = base / "params" / "norm.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"norm.safetensors: cut"):
        open_base(base)


def test_a_file_that_is_cut_after_it_was_opened_is_refused(base):
    source = open_base(base)
    file = base / "params" / "norm.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"norm.safetensors: cut while it was read"):
        load_params(source)


def test_the_safetensors_library_reads_the_files(base):
    params = load_params(open_base(base))["layers"]["0"]
    file = base / "params" / "layers.0.safetensors"
    found = safetensors.numpy.load_file(file)
    assert len(found) == 9
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(found[f"layers/0/{name}"], leaf)


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """A base whose checksums are of 128 bytes each, and its source."""
    monkeypatch.setattr(base_record, "BLOCK_BYTES", 128)
    config = CONFIG | {"vocab_size": 30, "intermediate_size": 48}
    hf = write_hf(tmp_path / "hf", config, tensors(config))
    write_base(open_model(str(hf)), tmp_path / "out", "keep", False)
    return tmp_path / "out", hf


PATH = "layers/0/self_attn/q_proj/kernel"
BOXES = [(0, 16, 0, 16), (0, 8, 0, 16), (3, 9, 5, 16), (0, 16, 12, 13)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_box_is_that_part_of_the_whole(blocks, which, box):
    source = open_model(str(blocks[which]))
    index = (slice(*box[:2]), slice(*box[2:]))
    np.testing.assert_array_equal(source.read(PATH, index), source.read(PATH)[index])


def test_a_box_is_verified_and_needs_only_its_blocks(blocks):
    path = "embed_tokens/embedding"
    entry = open_entries(blocks[0])[path]
    flip(entry.file, entry.offset + 5 * 64)  # in row 5 of 64 bytes, so in block 2
    source = open_model(str(blocks[0]))
    for rows in (slice(0, 4), slice(6, 30)):
        source.read(path, (rows, slice(0, 16)))
    for rows in (slice(0, 5), slice(4, 5), slice(5, 6), slice(0, 30)):
        with pytest.raises(CorruptError, match="rows 4 to 5 differ"):
            source.read(path, (rows, slice(3, 4)))


def test_a_missing_part_is_refused(base, tmp_path):
    (base / "params" / "norm.safetensors").rename(tmp_path / "moved")
    with pytest.raises(CorruptError, match=r"norm.safetensors: no such file"):
        open_base(base)


def test_an_added_part_is_refused(base):
    (base / "params" / ".DS_Store").touch()  # what a system writes is not a part
    open_base(base)
    shutil.copy(base / "params" / "norm.safetensors", base / "params" / "x.safetensors")
    with pytest.raises(CorruptError, match=r"params: x\.safetensors was added"):
        open_base(base)


def edit(folder, change):
    record = json.loads((folder / "jlora.json").read_text())
    change(record)
    (folder / "jlora.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: r.pop("files"), CorruptError, "files or provenance is"),
        (lambda r: r.update(schema=1), UnsupportedError, "schema 1; this jlora reads"),
        (lambda r: r.pop("tensors"), CorruptError, "tensors is not an object"),
        (lambda r: r["tensors"].pop("norm/scale"), CorruptError, "content_digest"),
        (
            lambda r: r["tensors"]["norm/scale"].update(dtype="int8"),
            CorruptError,
            "norm/scale: expected dtype",
        ),
        (
            lambda r: r["tensors"]["norm/scale"].update(shape=[4]),
            CorruptError,
            r"norm/scale \[4\] instead of \[16\]",
        ),
    ],
)
def test_edited_record_is_refused(base, change, error, message):
    edit(base, change)
    with pytest.raises(error, match=message):
        open_base(base)


def test_another_checksum_than_the_tensor_has_is_refused(base):
    edit(base, lambda r: r["tensors"]["norm/scale"].update(crc32=[zlib.crc32(b"")]))
    with pytest.raises(CorruptError, match="norm/scale is damaged"):
        load_params(open_base(base))


def test_a_changed_configuration_is_refused(base):
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] *= 2
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with pytest.raises(
        CorruptError, match=r"config\.json was changed; change the orig"
    ):
        open_base(base)


def test_a_missing_a_changed_and_an_added_file_are_named_at_once(base):
    (base / "tokenizer.json").write_bytes(b"{}")
    (base / "additional_chat_templates" / "tools.jinja").unlink()
    (base / "chat_template.jinja").write_bytes(b"x")
    with pytest.raises(CorruptError) as caught:
        open_base(base)
    assert (
        "additional_chat_templates/tools.jinja is missing, chat_template.jinja was "
        "added, tokenizer.json was changed"
    ) in str(caught.value)


def test_a_missing_configuration_is_refused(base):
    (base / "config.json").unlink()
    with pytest.raises(CorruptError, match=r"config\.json: no such file"):
        open_base(base)


OLD = {
    "schema": 2,
    "quantize": "none",
    "provenance": {"format": "hf", "source": "owner/name", "revision": "abc"},
    "leaves": {"norm/scale": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "owner/name@abc {} --dtype bfloat16 --overwrite"),
        (
            {
                "provenance": {"source": "my models/a.gguf"},
                "quantize": "nf4",
                "leaves": {
                    "norm/scale": {"dtype": "float32"},
                    "embed_tokens/embedding": {"dtype": "bfloat16"},
                    "layers/0/mlp/up_proj/kernel_q": {"dtype": "uint8"},
                },
            },
            "'my models/a.gguf' {} --quantize nf4 --overwrite",
        ),
        ({"leaves": None}, "SRC OUT --overwrite"),
        ({"leaves": {"a": 5, "b": {"dtype": [1]}}}, "owner/name@abc {} --overwrite"),
        ({"quantize": ["q"], "leaves": {}}, "owner/name@abc {} --overwrite"),
    ],
)
def test_an_older_base_is_refused_with_the_command_that_converts_it(
    base, changes, command
):
    (base / "jlora.json").write_text(json.dumps(OLD | changes))
    with pytest.raises(UnsupportedError) as caught:
        open_base(base)
    expected = f"jlora convert {command.format(base)}"
    assert str(caught.value).endswith(expected)
