"""A GGUF file that `jlora export` writes: the same model, tokenizer and template."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import files, golden
from helpers.commands import call, succeed
from helpers.data_cases import CONFIG, TEMPLATES, make_files, make_tokenizer, render
from helpers.exports import copy_base
from helpers.gguf_files import permute
from helpers.tiny import tensors, write_hf

import jlora
from jlora.cli import jlora_command
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UnsupportedError
from jlora.formats import export_gguf
from jlora.formats.gguf.gguf_file import read_gguf
from jlora.formats.gguf.gguf_tokenizer import tokenizer_files
from jlora.formats.gguf.gguf_vocabulary import vocabulary_metadata
from jlora.formats.gguf.modelfile import modelfile, ollama_template
from jlora.formats.open_model import open_model

gguf = pytest.importorskip("gguf")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 400, (2, 40)), jnp.int32)
TEXTS = [
    "Hello world, it is 12345 o'clock!\n\n  Really?",
    " leading and trailing ",
    "Größe ☃ 日本語 \U0001f999",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    model, params, _ = jlora.load(path, adapter)
    found: Any = model.apply({"params": params}, TOKENS)
    return np.asarray(found)


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_biases_are_written_in_the_order_of_gguf(kind, workdir, run, tmp_path):
    config = json.loads((workdir / "hf" / "config.json").read_text())
    config |= {"attention_bias": True}
    model = write_hf(tmp_path / "hf", config, tensors(config))
    for name, data in make_files().items():
        (model / name).write_bytes(data)
    flags = ["--model", model, "--type", kind]
    done = call("convert.to_gguf", run / "adapter", tmp_path / "out", *flags)
    assert done.status == 0, done.err
    expected = logits(model, run / "adapter")
    found = logits(tmp_path / "out" / "model.gguf")
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("F32", 1e-5), ("F16", 1e-2), ("BF16", 5e-2), ("Q8_0", 1e-1)],
)
def test_the_file_is_the_model_of_base_and_adapter(
    kind, tolerance, workdir, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(workdir)
    out = tmp_path / "out"
    words = ["export", str(run), str(out), "--to", "gguf", "--type", kind]
    assert jlora_command.main(words) == 0
    text = capsys.readouterr().out
    assert "read back 21 tensors: all as written" in text
    assert "largest logit difference: base+adapter to merged" in text
    assert f"ollama create NAME -f {out / 'Modelfile'}" in text
    expected = logits(workdir / "hf", run)
    found = logits(out / "model.gguf")
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    types = open_model(str(out / "model.gguf")).provenance["tensor_types"]
    # Rows of 48 are no whole number of blocks of 32.
    assert (
        types
        == {
            "F32": {"F32": 21},
            "F16": {"F16": 16, "F32": 5},
            "BF16": {"BF16": 16, "F32": 5},
            "Q8_0": {"F16": 2, "F32": 5, "Q8_0": 14},
        }[kind]
    )


def test_q_and_k_have_the_rows_of_llama_cpp(workdir, run, tmp_path):
    hf, out = tmp_path / "hf", tmp_path / "out"
    flags = ("--model", workdir / "hf", "--verify", "false")
    succeed("convert.to_hf", run, hf, *flags)
    succeed("convert.to_gguf", run, out, *flags, "--type", "F32")
    merged = open_model(str(hf))
    reader = gguf.GGUFReader(out / "model.gguf")  # not jlora's own
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for projection, heads in (("q", 4), ("k", 2), ("v", None)):
        weight = merged.read(f"layers/1/self_attn/{projection}_proj/kernel").T
        expected = permute(weight, heads) if heads else weight
        assert np.array_equal(tensors[f"blk.1.attn_{projection}.weight"], expected)
    assert int(reader.fields["general.file_type"].contents()) == 0


def test_writing_twice_gives_the_same_bytes_and_nothing_else(workdir, run, tmp_path):
    flags = ("--model", workdir / "hf", "--verify", "false")
    for name in "ab":
        succeed("convert.to_gguf", run, tmp_path / name, *flags)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a").keys() == {"model.gguf", "Modelfile"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    done = call("convert.to_gguf", run, tmp_path / "a", *flags)
    assert (done.status, "--overwrite" in done.err) == (2, True)
    succeed("convert.to_gguf", run, tmp_path / "a", *flags, "--overwrite")


def test_a_wrong_row_order_is_found_and_nothing_is_written(
    workdir, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(export_gguf, "interleave_rows", lambda data, *_: data)
    flags = ("--model", workdir / "hf", "--verify", "false")
    done = call("convert.to_gguf", run, tmp_path / "out", *flags)
    assert done.status == 4
    assert "gives back something else than was written" in done.err
    assert "q_proj" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_nothing_is_written(
    workdir, run, tmp_path, monkeypatch
):
    def full(*_: Any) -> None:
        raise OSError("512 requested and 100 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    flags = ("--model", workdir / "hf", "--verify", "false")
    done = call("convert.to_gguf", run, tmp_path / "out", *flags)
    assert (done.status, "the disk is full" in done.err) == (5, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_settings_and_a_tied_head_survive(rope, tmp_path):
    base = make_base(tmp_path, {"rope_parameters": {"rope_theta": 5e4, **rope}})
    adapter = golden("basic").folder
    out = tmp_path / "out"
    succeed("convert.to_gguf", adapter, out, "--model", base, "--type", "F32")
    tokens = TOKENS % 20
    found = []
    for path, extra in ((base, adapter), (out / "model.gguf", None)):
        model, params, _ = jlora.load(path, extra)
        result: Any = model.apply({"params": params}, tokens)
        found.append(np.asarray(result))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope type dynamic: llama.cpp computes",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
            "rope type yarn with these settings has no form in GGUF",
        ),
    ],
    ids=["dynamic", "yarn"],
)
def test_rotary_settings_without_a_form_in_gguf_are_refused(rope, message, tmp_path):
    base = make_base(tmp_path, {"rope_parameters": {"rope_theta": 1e4, **rope}})
    done = call(
        *("convert.to_gguf", golden("basic").folder, tmp_path / "out"),
        *("--model", base, "--verify", "false"),
    )
    assert (done.status, message in done.err) == (3, True), done.err
    assert not (tmp_path / "out").exists()


def make_base(tmp_path: Path, config: dict[str, Any]) -> Path:
    """A golden base with a tokenizer of its 20 tokens."""
    base = copy_base(tmp_path / "base", "untied_fp32", config)
    letters = {chr(ord("a") + i): i for i in range(20)}
    document = json.loads(make_files()["tokenizer.json"])
    document["model"] |= {"vocab": letters, "merges": []}
    (base / "tokenizer.json").write_text(json.dumps(document | {"added_tokens": []}))
    return base


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_byte_level_tokenizer_is_rebuilt_from_tokens_and_merges(
    ignore_merges, workdir, run, tmp_path
):
    own = make_files()
    document = json.loads(own["tokenizer.json"])
    document["model"]["ignore_merges"] = ignore_merges
    own["tokenizer.json"] = json.dumps(document).encode()
    tokenizer = Tokenizer(own, CONFIG)
    metadata = vocabulary_metadata(own, tokenizer, CONFIG)
    assert json.loads(metadata.pop("tokenizer.huggingface.json")) == document
    assert metadata["tokenizer.ggml.pre"] == ("llama-bpe" if ignore_merges else "dbrx")
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD399]"
    rebuilt = Tokenizer(read_again(tmp_path, metadata), CONFIG)
    assert rebuilt.encode_many(TEXTS) == tokenizer.encode_many(TEXTS)
    assert rebuilt.stop_ids == tokenizer.stop_ids
    assert rebuilt.adds_bos == tokenizer.adds_bos
    chat = [{"role": "user", "content": "hi"}]
    assert rebuilt.encode_chat(chat) == tokenizer.encode_chat(chat)


def test_what_is_read_back_is_the_tokenizer_itself(workdir, run, tmp_path):
    flags = ("--model", workdir / "hf", "--verify", "false")
    succeed("convert.to_gguf", run, tmp_path / "out", *flags)
    found = open_model(str(tmp_path / "out" / "model.gguf")).files
    assert found["tokenizer.json"] == (workdir / "hf" / "tokenizer.json").read_bytes()


def read_again(folder: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
    path = folder / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        export_gguf._add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer_files(read_gguf(path))


def test_a_sentencepiece_tokenizer_has_scores_in_the_order_of_its_merges():
    name = next(n for n, c in TEMPLATES.items() if c["tokenizer"] == "metaspace")
    own = make_files(name)
    metadata = vocabulary_metadata(own, Tokenizer(own, CONFIG), CONFIG)
    texts, scores, kinds = (
        metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")
    )
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert kinds[texts.index("<0x0A>")] == 6
    assert [kinds[texts.index(t)] for t in ("<unk>", "<s>")] == [2, 3]
    reference = make_tokenizer(name)
    for text in ("Hello world", "the sum is five", "a  b"):
        pieces = merge_by_scores("\u2581" + text.replace(" ", "\u2581"), texts, scores)
        ids = [texts.index(piece) for piece in pieces]
        assert ids == reference.encode(text, add_bos=False)


def merge_by_scores(text: str, texts: list[str], scores: list[float]) -> list[str]:
    """What llama.cpp does: merges the pair of the highest score, the leftmost first."""
    known, pieces = dict(zip(texts, scores, strict=True)), list(text)
    while True:
        pairs = [
            (known[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in known
        ]
        if not pairs:
            return [p if p in known else f"<0x{ord(p):02X}>" for p in pieces]
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_another_pre_tokenizer_is_refused():
    own = make_files()
    document = json.loads(own["tokenizer.json"]) | {"normalizer": {"type": "NFC"}}
    own["tokenizer.json"] = json.dumps(document).encode()
    with pytest.raises(UnsupportedError, match=r"convert_hf_to_gguf\.py"):
        vocabulary_metadata(own, Tokenizer(own, CONFIG), CONFIG)


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_the_modelfile_has_the_text_of_the_chat_template(name):
    tokenizer = make_tokenizer(name)
    template = ollama_template(tokenizer)
    assert template is not None
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    for said in (messages, messages[1:], messages[:2], messages[1:2]):
        expected = render(tokenizer, said, add_generation_prompt=True)
        if tokenizer.adds_bos and tokenizer.bos_id is not None:
            expected = expected.removeprefix(tokenizer.token(tokenizer.bos_id))
        assert as_ollama(template, said) == expected
    lines = modelfile("model.gguf", tokenizer).splitlines()
    assert lines[0] == "FROM ./model.gguf"
    stops = {f'PARAMETER stop "{tokenizer.token(i)}"' for i in tokenizer.stop_ids}
    assert stops <= set(lines)


def as_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """Runs the few forms of Go's template language that the Modelfile uses, as Jinja."""
    import jinja2

    for go, jinja in (
        ("{{ range $i, $_ := .Messages }}", "{% for m in messages %}"),
        ('{{ if eq .Role "user" }}', '{% if m.role == "user" %}'),
        ('{{ else if eq .Role "assistant" }}', '{% elif m.role == "assistant" %}'),
        ('{{ else if eq .Role "system" }}', '{% elif m.role == "system" %}'),
        ("{{ if eq $i 0 }}", "{% if loop.index0 == 0 %}"),
        ("{{ if $i }}", "{% if loop.index0 %}"),
        (
            '{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}',
            '{% elif loop.index0 == 1 and messages[0].role == "system" %}',
        ),
        ("{{ else }}", "{% else %}"),
        ("{{ .Content }}", "{{ m.content }}"),
    ):
        template = template.replace(go, jinja)
    head, _, end = template.rpartition("{{ end }}{{ end }}")
    head = head.replace("{{ end }}{{ .Content }}", "{% endif %}{{ .Content }}")
    head = head.replace("{{ end }}{{ m.content }}", "{% endif %}{{ m.content }}")
    text = f"{head}{{% endif %}}{{% endfor %}}{end}"
    environment = jinja2.Environment(keep_trailing_newline=True)
    return environment.from_string(text).render(messages=messages)
