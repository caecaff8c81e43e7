"""Writes the merged model of base and adapter as a GGUF file, tensor by tensor."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UnsupportedError, listing
from jlora.formats.digests import leaf_digest
from jlora.formats.export_merged import MergedModel
from jlora.formats.gguf.gguf_config import ROPE_FREQS
from jlora.formats.gguf.gguf_layout import gguf_name, interleave_rows
from jlora.formats.gguf.gguf_metadata import config_metadata, rope_divisors
from jlora.formats.gguf.gguf_model import import_gguf, open_gguf
from jlora.formats.gguf.gguf_vocabulary import vocabulary_metadata
from jlora.formats.gguf.modelfile import modelfile
from jlora.formats.model_source import ModelSource
from jlora.formats.peft.adapter import Adapter
from jlora.formats.tensor_checks import first_non_finite
from jlora.formats.tensor_names import Name
from jlora.model.rotary import rope_frequencies

FILE = "model.gguf"
Type = Literal["F32", "F16", "BF16", "Q8_0"]
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
}
_COMPARED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size"),
)


def write_gguf(
    source: ModelSource, adapter: Adapter, folder: Path, kind: Type
) -> list[str]:
    """Writes model.gguf and a Modelfile into an existing folder, and reads all of it back.

    Matrices are stored as `kind`, norms and biases as F32. Each is merged in float32 and
    rounded once. In Q8_0, a matrix whose rows are no whole number of blocks is F16.

    Returns:
        Lines for the user about what was written.

    Raises:
        UsageError: the gguf package is not installed.
        UnsupportedError: a rotary type or tokenizer that llama.cpp does not compute.
        CorruptError: a merged value is not finite or does not fit F16, or what is read
            back is something else than was written.
    """
    path = folder / FILE
    gguf = import_gguf(path)
    merged = MergedModel(source, adapter, "float32")
    tokenizer = Tokenizer(source.files, source.config)
    stored: dict[str, Type] = {
        name.path: _stored_type(gguf, name.hf_shape, kind) for name in merged.names
    }
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {
        "general.type": "model",
        "general.file_type": gguf.LlamaFileType[_FILE_TYPES[kind]].value,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **config_metadata(merged.config),
        **vocabulary_metadata(source.files, tokenizer, merged.config),
    }
    for key, value in metadata.items():
        _add(writer, key, value)
    divisors = rope_divisors(merged.config)
    if divisors is not None:
        shape = divisors.shape
        writer.add_tensor_info(ROPE_FREQS, shape, divisors.dtype, divisors.nbytes)
    for name in merged.names:
        _add_info(gguf, writer, name, stored[name.path])
    digests: dict[str, str] = {}
    with contextlib.closing(writer), _naming_a_full_disk(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for name in merged.names:
            array = np.ascontiguousarray(merged.read(name), np.float32)
            data, expected = _encode(gguf, name, array, stored[name.path])
            digests[name.path] = leaf_digest(expected)
            data = interleave_rows(data, name, merged.config)
            writer.write_tensor_data(data.reshape(-1) if array.ndim == 1 else data)
    (folder / "Modelfile").write_text(modelfile(FILE, tokenizer), "utf-8")
    _read_back(path, merged, digests)
    return [
        f"merged {len(adapter.tensors)} of {len(digests)} tensors into "
        f"{path.stat().st_size:,} bytes of {kind}",
        f"read back {len(digests)} tensors: all as written",
    ]


def _stored_type(gguf: ModuleType, shape: tuple[int, ...], kind: Type) -> Type:
    if len(shape) < 2:
        return "F32"
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    return kind if shape[-1] % block == 0 else "F16"


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds a value of the metadata under the type that llama.cpp expects of it."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _add_info(gguf: ModuleType, writer: Any, name: Name, kind: Type) -> None:
    ggml_type = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[ggml_type]
    *rows, columns = name.hf_shape
    shape = (*rows, columns // block * size)  # in bytes
    num_bytes = int(np.prod(shape))
    writer.add_tensor_info(
        gguf_name(name.key), shape, np.dtype(np.uint8), num_bytes, ggml_type
    )


@contextlib.contextmanager
def _naming_a_full_disk(path: Path) -> Iterator[None]:
    """Gives NumPy's error, which says only how many items were written, its number."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, "the disk is full", str(path)) from error
        raise


def _encode(
    gguf: ModuleType, name: Name, array: np.ndarray, kind: Type
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of bytes of a tensor, and the values that they stand for."""
    if kind not in _PLAIN:
        data = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
        return data, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    with np.errstate(over="ignore", under="ignore"):
        values = array.astype(_PLAIN[kind])
    index = first_non_finite(values)
    if index is not None:
        raise CorruptError(
            f"{name.key}: {array[index]} at {list(index)} does not fit F16; choose "
            "--type BF16, Q8_0 or F32"
        )
    return values.view(np.uint8).reshape(len(values), -1), values


def _read_back(path: Path, merged: MergedModel, digests: dict[str, str]) -> None:
    """Opens the file as any other GGUF file, and compares all of it with what was meant.

    Raises:
        CorruptError, UnsupportedError: it is not the same model.
    """
    reopened = open_gguf(path)
    names = {name.path: name for name in merged.names}
    wrong = sorted(names.keys() ^ reopened.tensors.keys()) or [
        key
        for key, name in names.items()
        if leaf_digest(name.to_params(reopened.read(key))) != digests[key]
    ]
    wrong += [
        key
        for key in _COMPARED
        if getattr(merged.config, key) != getattr(reopened.config, key)
    ]
    if wrong:
        raise CorruptError(
            f"{path}: the file gives back something else than was written for "
            f"{listing(wrong)}; use another disk"
        )
    if not _same_rope(merged.config, reopened.config):
        rope = merged.config.rope_parameters
        raise UnsupportedError(
            f"rope type {rope.rope_type} with these settings has no form in GGUF (it has "
            "no attention_factor or mscale and always truncates); export a Hugging Face "
            "folder (--to hf)"
        )


def _same_rope(a: LlamaConfig, b: LlamaConfig) -> bool:
    """Returns whether both turn by the same angles, but for the rounding of the divisors."""
    length = a.max_position_embeddings
    factors = [c.rope_parameters.attention_factor for c in (a, b)]
    found = [rope_frequencies(config, length) for config in (a, b)]
    return bool(
        np.allclose(*found, rtol=1e-5, atol=0) and np.allclose(*factors, rtol=1e-5)
    )
