"""Models that `jlora convert` must refuse: how each is made, and what is answered.

`python tests/helpers/faults.py` writes the table of docs/conversion.md; test_faults.py
checks every row and that the table is the one this file makes.
"""

import contextlib
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from convert import from_hf  # noqa: E402
from helpers.quantized_files import bnb_model  # noqa: E402
from helpers.tiny import (  # noqa: E402
    CONFIG,
    EMBEDDING,
    HEAD,
    Q_PROJ,
    halves,
    tensors,
    write_hf,
    write_sharded,
)
from jlora.cli.command import run_command  # noqa: E402

DOCUMENT = ROOT / "docs" / "conversion.md"
BEGIN, END = (
    "<!-- faults: made by tests/helpers/faults.py -->\n",
    "<!-- end of faults -->\n",
)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fault:
    """One kind of bad input; `make` writes it into a folder and returns SRC."""

    what: str
    status: int
    words: str
    """Part of the message."""
    make: Callable[[Path], Path]


@dataclass(frozen=True)
class Answer:
    """What the command said."""

    status: int
    message: str
    left: tuple[str, ...]
    """What it left where OUT should have appeared."""


def answer(fault: Fault, folder: Path) -> Answer:
    """Returns what `jlora convert SRC OUT` answers."""
    home, target = folder / "in", folder / "out"
    home.mkdir()
    target.mkdir()
    source = fault.make(home)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = run_command(
            from_hf.main,
            from_hf.Arguments,
            argv=[str(source), str(target / "base")],
        )
    message = errors.getvalue().strip().replace(f"{home}/", "").replace(str(home), "")
    left = tuple(sorted(path.name for path in target.rglob("*")))
    return Answer(status, message, left)


def config(**changes: Any) -> Callable[[Path], Path]:
    """Makes a sound model whose config.json was changed (null deletes nothing)."""

    def make(home: Path) -> Path:
        return write_hf(home / "model", CONFIG | changes, tensors(CONFIG))

    return make


def without(key: str) -> Callable[[Path], Path]:
    """Makes a model whose config.json lacks a key."""

    def make(home: Path) -> Path:
        kept = {k: v for k, v in CONFIG.items() if k != key}
        return write_hf(home / "model", kept, tensors(CONFIG))

    return make


def config_text(text: bytes) -> Callable[[Path], Path]:
    """Makes a model whose config.json is these bytes."""

    def make(home: Path) -> Path:
        folder = write_hf(home / "model", CONFIG, tensors(CONFIG))
        (folder / "config.json").write_bytes(text)
        return folder

    return make


def beside(name: str, content: bytes) -> Callable[[Path], Path]:
    """Makes a model with one more file beside its weights."""

    def make(home: Path) -> Path:
        folder = write_hf(home / "model", CONFIG, tensors(CONFIG))
        (folder / name).write_bytes(content)
        return folder

    return make


def changed(change: Callable[[Arrays], Any], **more: Any) -> Callable[[Path], Path]:
    """Makes a model whose tensors were changed in place."""

    def make(home: Path) -> Path:
        arrays = tensors(CONFIG | more)
        change(arrays)
        return write_hf(home / "model", CONFIG | more, arrays)

    return make


def quantized(method: str, **settings: Any) -> Callable[[Path], Path]:
    """Makes a model whose config.json says that it is quantised."""
    return config(quantization_config={"quant_method": method, **settings})


def nf4(change: Callable[[Arrays], Any]) -> Callable[[Path], Path]:
    """Makes a model of bitsandbytes whose tensors were changed in place."""

    def make(home: Path) -> Path:
        settings, arrays = bnb_model()
        change(arrays)
        return write_hf(home / "model", settings, arrays)

    return make


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """Makes a model whose model.safetensors was changed byte by byte."""

    def make(home: Path) -> Path:
        folder = write_hf(home / "model", CONFIG, tensors(CONFIG))
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return folder

    return make


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """Makes a model whose safetensors header was changed; the data stays."""

    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        document = json.loads(data[8 : 8 + length])
        change(document)
        text = json.dumps(document).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return weights(rewrite)


def sharded(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """Makes a model in two shards; `change` gets the folder and the index."""

    def make(home: Path) -> Path:
        folder = write_sharded(home / "model", CONFIG, halves(tensors(CONFIG)))
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(folder, index)
        path.write_text(json.dumps(index))
        return folder

    return make


def files(*names: str, config: Any = CONFIG) -> Callable[[Path], Path]:
    """Makes a folder of files that are folders, so that opening one would be noticed."""

    def make(home: Path) -> Path:
        folder = home / "model"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for name in names:
            (folder / name).mkdir()
        return folder

    return make


def single(name: str, content: bytes) -> Callable[[Path], Path]:
    """Makes one file."""

    def make(home: Path) -> Path:
        (home / name).write_bytes(content)
        return home / name

    return make


def gguf(change: Callable[[Arrays], Any] | None = None, **how: Any) -> Any:
    """Makes a GGUF file; `how` as in `test_convert_gguf.write_gguf`."""

    def make(home: Path) -> Path:
        from helpers.gguf_files import write_gguf

        arrays = tensors(CONFIG)
        if change is not None:
            change(arrays)
        return Path(write_gguf(home / "model.gguf", arrays, **how))

    return make


def renamed(old: str, new: str) -> Callable[[Arrays], None]:
    """Renames every tensor whose name contains `old`."""

    def change(arrays: Arrays) -> None:
        for key in [key for key in arrays if old in key]:
            arrays[key.replace(old, new)] = arrays.pop(key)

    return change


def add(**arrays: Any) -> Callable[[Arrays], None]:
    """Adds tensors; __ in a name stands for a dot."""
    return lambda found: found.update(
        {key.replace("__", "."): np.asarray(value) for key, value in arrays.items()}
    )


def poke(value: float) -> Callable[[Arrays], None]:
    """Puts one value into a matrix."""
    return lambda arrays: arrays[Q_PROJ].__setitem__((3, 5), value)


def link_out(home: Path) -> Path:
    """Makes a folder whose weights are a link to a file outside."""
    folder = write_hf(home / "model", CONFIG, tensors(CONFIG))
    (folder / "model.safetensors").rename(home / "elsewhere")
    (folder / "model.safetensors").symlink_to(home / "elsewhere")
    return folder


def pipe(home: Path) -> Path:
    """Makes a folder whose config.json is a pipe that nobody writes to."""
    folder = write_hf(home / "model", CONFIG, tensors(CONFIG))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return folder


def point(index: dict[str, Any], target: Any) -> None:
    """Lets the index place one tensor in another file."""
    index["weight_map"][EMBEDDING] = target


def renumbered(folder: Path, index: dict[str, Any]) -> None:
    """Lets the first shard claim to be the third of four."""
    old, new = "model-00001-of-00002.safetensors", "model-00003-of-00004.safetensors"
    (folder / old).rename(folder / new)
    for key, file in index["weight_map"].items():
        index["weight_map"][key] = new if file == old else file


LAYER = "model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
YARN = {"rope_type": "yarn"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 4.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
CONFIG_TEXT = json.dumps(CONFIG).encode()
Q = ("q_proj", "k_proj", "v_proj")
FAULTS = [
    # Other architectures and formats: 3, with what to do instead.
    Fault(
        "another architecture",
        3,
        "biases on q, k and v that its config.json does not mention",
        config(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    ),
    Fault(
        "another head",
        3,
        "LlamaForSequenceClassification",
        config(architectures=["LlamaForSequenceClassification"]),
    ),
    Fault(
        "Granite renamed to Llama",
        3,
        "embedding_multiplier=12.0 changes the computation; residual_multiplier=0.22",
        config(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=1),
    ),
    Fault(
        "Gemma renamed to Llama",
        3,
        "hidden_act='gelu_pytorch_tanh'",
        config(hidden_act="gelu_pytorch_tanh"),
    ),
    Fault(
        "SmolLM3 renamed to Llama",
        3,
        "no_rope_layers=[1, 1, 1, 0]",
        config(no_rope_layers=[1, 1, 1, 0]),
    ),
    Fault(
        "CWM renamed to Llama",
        3,
        "sliding_window=8192 changes",
        config(sliding_window=8192, layer_types=["sliding_attention"]),
    ),
    Fault(
        "Qwen2 renamed to Llama",
        3,
        "biases on q, k and v but not on o (Qwen2)",
        changed(add(**{f"{ATTENTION}.{p}.bias": np.ones(16, "f4") for p in Q})),
    ),
    Fault(
        "Phi-3 renamed to Llama",
        3,
        "one matrix for q, k and v",
        changed(renamed("q_proj", "qkv_proj")),
    ),
    Fault(
        "Qwen3 renamed to Llama",
        3,
        "norms on q and k",
        changed(add(**{f"{ATTENTION}.q_norm.weight": np.ones(4, "f4")})),
    ),
    Fault(
        "Mixtral renamed to Llama",
        3,
        "a mixture of experts",
        changed(renamed("mlp.up_proj", "block_sparse_moe.experts.0.w3")),
    ),
    Fault(
        "Arcee renamed to Llama",
        3,
        "an MLP without a gate",
        changed(lambda a: [a.pop(k) for k in list(a) if "gate_proj" in k]),
    ),
    Fault(
        "an adapter that was not merged",
        3,
        "merge it with PEFT",
        changed(add(**{f"{ATTENTION}.q_proj.lora_A.weight": np.ones((2, 16), "f4")})),
    ),
    Fault(
        "unknown rope type",
        3,
        "jlora supports default, linear, dynamic, llama3, yarn, longrope",
        config(rope_scaling={"rope_type": "su", "factor": 4.0}),
    ),
    Fault(
        "rope for a part of each head",
        3,
        "jlora rotates whole heads only",
        config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ),
    *(
        Fault(
            f"{method} checkpoint",
            3,
            f"the checkpoint is quantised ({method})",
            config(quantization_config={"quant_method": method}),
        )
        for method in ("gptq", "awq", "fbgemm_fp8")
    ),
    *(
        Fault(f"bitsandbytes checkpoint in {kind}", 3, f"bitsandbytes as {kind}", edit)
        for kind, edit in (
            ("fp4", quantized("bitsandbytes", load_in_4bit=True)),
            ("llm_int8", quantized("bitsandbytes", load_in_8bit=True)),
        )
    ),
    Fault(
        "compressed-tensors checkpoint of integers",
        3,
        "compressed-tensors with format='pack-quantized'",
        quantized("compressed-tensors", format="pack-quantized"),
    ),
    Fault(
        "nf4 checkpoint without an absmax",
        4,
        "absmax', a part of a quantised weight, is missing",
        nf4(lambda arrays: arrays.pop(f"{Q_PROJ}.absmax")),
    ),
    Fault(
        "nf4 checkpoint with another code book",
        4,
        "quant_map': not the 16 values of nf4",
        nf4(lambda a: a.update({f"{Q_PROJ}.quant_map": np.zeros(16, "f4")})),
    ),
    Fault(
        "NaN in the absmax of nf4",
        4,
        "nan at [0] is no scale",
        nf4(lambda arrays: arrays[f"{Q_PROJ}.nested_absmax"].fill(np.nan)),
    ),
    Fault(
        "quantised tensors, not declared",
        3,
        "a quantised checkpoint",
        changed(renamed("q_proj.weight", "q_proj.qweight")),
    ),
    Fault(
        "fp8 tensors",
        3,
        "integer, fp8 or quantised tensors",
        header(lambda h: h[Q_PROJ].update(dtype="F8_E4M3")),
    ),
    Fault("only pytorch_model.bin", 3, "never opened", files("pytorch_model.bin")),
    Fault(
        "Meta's consolidated.00.pth",
        3,
        "use HF's conversion script",
        files("params.json", "consolidated.00.pth", config=None),
    ),
    Fault("Flax weights", 3, "save_pretrained", files("flax_model.msgpack")),
    Fault("TensorFlow weights", 3, "save_pretrained", files("tf_model.h5")),
    Fault(
        "a torch zip named model.safetensors",
        3,
        "a pickled PyTorch file",
        weights(lambda data: b"PK\x03\x04" + data),
    ),
    Fault(
        "a pickle named model.safetensors",
        3,
        "a pickled PyTorch file",
        weights(lambda data: b"\x80\x02" + data),
    ),
    Fault(
        "GGUF named model.safetensors",
        3,
        "a GGUF file under another name",
        weights(lambda data: b"GGUF\x03\0\0\0" + data),
    ),
    # Damaged or contradictory: 4, with the place.
    Fault("config.json is not JSON", 4, "line 1, column 2", config_text(b"{a}")),
    Fault(
        "a key given twice",
        4,
        "'vocab_size' occurs twice",
        config_text(CONFIG_TEXT[:-1] + b', "vocab_size": 20}'),
    ),
    Fault(
        "a number that is not finite",
        4,
        "1e999 is not finite",
        config_text(CONFIG_TEXT.replace(b"1e-05", b"1e999")),
    ),
    Fault("NaN", 4, "NaN is not finite", config_text(b'{"rms_norm_eps": NaN}')),
    Fault(
        "JSON 100,000 levels deep",
        4,
        "nested too deeply",
        config_text(b'{"a":' + b"[" * 100_000),
    ),
    Fault(
        "config.json of 2 MB",
        4,
        "more than 1,048,576 bytes",
        config_text(b" " * 2_000_000),
    ),
    Fault("config.json in Latin-1", 4, "not UTF-8", config_text(b'{"a": "\xe9"}')),
    Fault("config.json is a pipe", 4, "not a file", pipe),
    Fault(
        "several wrong values",
        4,
        "vocab_size='20', expected an integer above 0; rms",
        config(vocab_size="20", rms_norm_eps=0, hidden_size=True),
    ),
    Fault("a missing key", 4, "rms_norm_eps=None", without("rms_norm_eps")),
    Fault(
        "kv heads that do not divide the heads",
        4,
        "num_key_value_heads=3",
        config(num_key_value_heads=3),
    ),
    Fault("an odd head_dim", 4, "head_dim=5 is odd", config(head_dim=5)),
    Fault(
        "ten billion layers",
        4,
        "num_hidden_layers=10000000000",
        config(num_hidden_layers=10**10),
    ),
    Fault(
        "a missing rope key",
        4,
        "rope_type 'yarn': factor=None",
        config(rope_scaling=YARN),
    ),
    Fault(
        "llama3 rope with the factors swapped",
        4,
        "high_freq_factor=1",
        config(rope_scaling=LLAMA3),
    ),
    Fault(
        "type and rope_type differ",
        4,
        "type and rope_type differ: linear, yarn",
        config(rope_scaling=YARN | {"type": "linear", "factor": 2.0}),
    ),
    Fault(
        "two values of rope_theta",
        4,
        "10000.0, 500000.0",
        config(rope_parameters={"rope_theta": 5e5}),
    ),
    Fault("rope_theta null", 4, "rope_theta=None", config(rope_theta=None)),
    Fault(
        "missing, unexpected and misshapen tensors",
        4,
        "1 missing: model.norm.weight; 1 unexpected: model.extra; 1 of another shape",
        changed(
            lambda a: a.update(
                {"model.extra": a.pop("model.norm.weight"), Q_PROJ: a[Q_PROJ][:8]}
            )
        ),
    ),
    Fault(
        "no lm_head, not tied",
        4,
        "set tie_word_embeddings to true",
        changed(lambda a: a.pop(HEAD)),
    ),
    Fault(
        "tied, with another lm_head",
        4,
        f"{HEAD} differs from {EMBEDDING}",
        config(tie_word_embeddings=True),
    ),
    Fault("NaN in a tensor", 4, "nan at [3, 5]", changed(poke(np.nan))),
    Fault("infinity in a tensor", 4, "inf at [3, 5]", changed(poke(np.inf))),
    Fault("a cut file", 4, "cut or damaged", weights(lambda data: data[:50])),
    Fault("a cut tensor", 4, "cut: the tensors end", weights(lambda data: data[:-9])),
    Fault(
        "bytes after the end", 4, "longer than declared", weights(lambda d: d + b"x")
    ),
    Fault("an empty file", 4, "cut or damaged", weights(lambda data: b"")),
    Fault(
        "a header of 2^40 bytes",
        4,
        "its header declares 1,099,511,627,784",
        weights(lambda data: (1 << 40).to_bytes(8, "little") + data[8:]),
    ),
    Fault(
        "a tensor named twice",
        4,
        f"'{EMBEDDING}' occurs twice",
        weights(lambda data: _twice(data)),
    ),
    Fault(
        "overlapping tensors",
        4,
        "an overlap before tensor",
        header(
            lambda h: h["model.norm.weight"].update(
                data_offsets=h[f"{LAYER}.input_layernorm.weight"]["data_offsets"]
            )
        ),
    ),
    Fault(
        "shapes and offsets that disagree",
        4,
        f"tensor '{HEAD}': F32 of shape [20, 17] takes 1,360 bytes",
        header(
            lambda h: [
                h[HEAD].update(shape=[20, 17]),
                h[EMBEDDING].update(shape=[2**62, 4]),
            ]
        ),
    ),
    Fault(
        "a Git LFS pointer",
        4,
        "run `git lfs pull`",
        weights(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha"),
    ),
    Fault(
        "tokenizer.json is a Git LFS pointer",
        4,
        "tokenizer.json: a Git LFS pointer",
        beside(
            "tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha"
        ),
    ),
    Fault(
        "config.json is a saved web page",
        4,
        "config.json: a saved web page",
        config_text(b"<!DOCTYPE html><html><head><title>404</title>"),
    ),
    Fault(
        "a saved web page",
        4,
        "a saved web page",
        weights(lambda data: b"<!DOCTYPE html><html><head><title>404</title>"),
    ),
    Fault("a link that leaves the folder", 4, "a link that leaves", link_out),
    Fault(
        "an index that names ../secret",
        4,
        "not plain .safetensors file names",
        sharded(lambda folder, index: point(index, "../secret.safetensors")),
    ),
    Fault(
        "missing shards",
        4,
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
        sharded(lambda folder, _: [p.unlink() for p in folder.glob("model-*")]),
    ),
    Fault(
        "two cut shards",
        4,
        "again; model/model-00002-of-00002.safetensors: cut",
        sharded(
            lambda folder, _: [os.truncate(p, 900) for p in folder.glob("model-*")]
        ),
    ),
    Fault(
        "a gap in the numbering",
        4,
        "model-00002-of-00004.safetensors, model-00004-of-00004.safetensors",
        sharded(renumbered),
    ),
    Fault(
        "index and shards disagree",
        4,
        "that the index does not name: model.norm",
        sharded(lambda _, index: index["weight_map"].pop("model.norm.weight")),
    ),
    Fault(
        "shards without their index",
        4,
        "safetensors shards without",
        lambda home: [
            path := sharded(lambda *_: None)(home),
            (path / "model.safetensors.index.json").unlink(),
        ][0],
    ),
    # GGUF.
    Fault(
        "GGUF of another architecture",
        3,
        "general.architecture='qwen2'",
        gguf(architecture="qwen2"),
    ),
    Fault(
        "GGUF with experts",
        3,
        "llama.expert_count=8",
        gguf(changes={"llama.expert_count": 8}),
    ),
    Fault(
        "GGUF with integer tensors",
        3,
        "output_norm.weight (I32)",
        gguf(lambda a: a.update({"model.norm.weight": np.ones(16, np.int32)})),
    ),
    Fault(
        "GGUF with longrope",
        3,
        "type='longrope'; jlora reads none, linear and yarn",
        gguf(changes={"llama.rope.scaling.type": "longrope"}),
    ),
    Fault(
        "GGUF with an unknown tokenizer",
        3,
        "tokenizer.json beside the file",
        gguf(changes={"tokenizer.ggml.pre": "new"}),
    ),
    Fault(
        "GGUF of one part of several",
        3,
        "llama-gguf-split --merge",
        gguf(changes={"split.count": 2}),
    ),
    Fault(
        "GGUF of version 1",
        3,
        "GGUF version 1",
        single("model.gguf", b"GGUF\1\0\0\0" + bytes(99)),
    ),
    Fault(
        "GGUF of the other byte order",
        3,
        "other byte order",
        single("model.gguf", b"GGUF\0\0\0\3" + bytes(99)),
    ),
    Fault(
        "safetensors named model.gguf",
        3,
        "a safetensors file under another name",
        single("model.gguf", struct.pack("<Q", 20) + b'{"a": {"dtype": "F32"'),
    ),
    Fault(
        "a Git LFS pointer named model.gguf",
        4,
        "run `git lfs pull`",
        single("model.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha"),
    ),
    Fault(
        "an array of 2^60 items in GGUF",
        4,
        "an array of 1,152,921,504,606,846,976 items",
        single(
            "model.gguf",
            b"GGUF"
            + struct.pack("<IQQQ", 3, 0, 1, 1)
            + b"k"
            + struct.pack("<IIQ", 9, 4, 2**60),
        ),
    ),
    Fault(
        "NaN in a GGUF tensor",
        4,
        "tensor 'blk.0.attn_q.weight': nan",
        gguf(poke(np.nan)),
    ),
    Fault(
        "GGUF with a missing tensor",
        4,
        "1 missing: output_norm.weight",
        gguf(lambda a: a.pop("model.norm.weight")),
    ),
    # Not a model: 2.
    Fault(
        "an adapter",
        2,
        "an adapter, not a model",
        files("adapter_config.json", "adapter_model.safetensors", config=None),
    ),
    Fault("a folder without config.json", 2, "no config.json", files(config=None)),
    Fault("a folder without weights", 2, "holds no weights", files()),
    Fault("nothing there", 2, "no such file or folder", lambda home: home / "nothing"),
    Fault("a text file", 2, "not a model folder", single("notes.txt", b"hello")),
]


def _twice(data: bytes) -> bytes:
    """Gives the head the embedding's name in a safetensors header."""
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(f'"{HEAD}"'.encode(), f'"{EMBEDDING}"'.encode())
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def answers() -> dict[str, Answer]:
    """Returns what the command answers to every fault."""
    found = {}
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            found[fault.what] = answer(fault, Path(folder))
    return found


def table(found: dict[str, Answer], limit: int = 230) -> str:
    """Returns the table of the document."""
    lines = ["| input | exit | message |", "|---|---|---|"]
    for what, given in found.items():
        message = given.message.removeprefix("error: ").replace("|", "\\|")
        if len(message) > limit:
            message = message[:limit].rsplit(" ", 1)[0] + " ..."
        lines.append(f"| {what} | {given.status} | {message} |")
    return "\n".join(lines) + "\n"


def written_table() -> str:
    """Returns the table that stands in the document."""
    return DOCUMENT.read_text("utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    before, rest = DOCUMENT.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + table(answers()) + END + after, "utf-8")
