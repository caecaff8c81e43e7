"""Opens a Hugging Face model folder: checks every tensor name and shape, reads no weights."""

from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.config.quantization import find_quantization
from jlora.errors import CorruptError, UnsupportedError, UsageError, warn
from jlora.formats.array_blocks import Index, read_box, whole
from jlora.formats.hf.bitsandbytes_nf4 import group_bitsandbytes
from jlora.formats.hf.fp8_scaled import group_fp8
from jlora.formats.hf.hf_index import find_tensors
from jlora.formats.hf.quantized_tensor import QuantizedTensor
from jlora.formats.model_files import read_json, read_side_files
from jlora.formats.model_source import ModelSource, parse_config
from jlora.formats.quantized_kernels import is_quantizable
from jlora.formats.refusals import ADAPTER, META, refuse_other_models, refuse_quantised
from jlora.formats.safetensors_file import Entry, Spec, read_bytes
from jlora.formats.tensor_checks import check_names, first_non_finite
from jlora.formats.tensor_names import Name, all_names
from jlora.ops.quantize import QUANTIZED_LEAVES, Format


def open_hf(folder: Path, provenance: dict[str, Any]) -> ModelSource:
    """Opens a Hugging Face folder.

    Args:
        folder: with config.json and safetensors files.
        provenance: where it came from, for jlora.json.

    Raises:
        UsageError: not a model folder.
        UnsupportedError: not a plain Llama in safetensors.
        CorruptError: files that are damaged or contradict each other.
    """
    hf_config, config = read_config(folder)
    entries = find_tensors(folder, quantized=find_quantization(hf_config) is not None)
    names = {name.path: name for name in all_names(config)}
    stored = _match(
        folder, _group(folder, entries, hf_config), config, [*names.values()]
    )
    _check_dtype(folder, hf_config, {stored[n.key].dtype for n in names.values()})
    held: dict[str, Format] = {
        path: tensor.form
        for path, name in names.items()
        if isinstance(tensor := stored[name.key], QuantizedTensor)
        and tensor.form != "none"
        and is_quantizable(path)
    }

    def read(path: str, box: Index | None = None) -> np.ndarray:
        stem, _, leaf = path.rpartition("/")
        if leaf in QUANTIZED_LEAVES:
            tensor = stored[names[f"{stem}/kernel"].key]
            assert isinstance(tensor, QuantizedTensor)
            return tensor.read_leaf(leaf, box)
        name = names[path]
        tensor = stored[name.key]
        if isinstance(tensor, QuantizedTensor):
            array = tensor.read() if name.transposed else tensor.read().T
            return array if box is None else array[box]
        box = whole(name.shape) if box is None else box
        in_file = box[::-1] if name.transposed else box
        return read_checked(tensor, name.key, in_file, transposed=name.transposed)

    return ModelSource(
        kind="hf",
        location=folder,
        config=config,
        hf_config=hf_config,
        tensors={
            path: Spec(name.shape, stored[name.key].dtype)
            for path, name in names.items()
        },
        read=read,
        files=read_side_files(folder),
        provenance=provenance,
        weights=tuple(sorted({entry.file for entry in entries.values()})),
        quantize="nf4" if "nf4" in held.values() else "none",
        held=held,
    )


def read_checked(entry: Entry, key: str, box: Index, *, transposed: bool) -> np.ndarray:
    """Returns a box of a stored tensor, or its transpose; warns if it is all zero.

    Raises:
        CorruptError: a NaN or an infinity, or the file got shorter.
    """
    where = f"{entry.file}: tensor {key!r}"
    non_zero = False

    def check(block: np.ndarray, first: int) -> None:
        nonlocal non_zero
        index = first_non_finite(block)
        if index is not None:
            raise CorruptError(
                f"{where}: {block[index]} at {[index[0] + first, *index[1:]]}; the file "
                "is damaged, use another copy"
            )
        non_zero = non_zero or bool(block[:1].any() or block.any())

    array = read_box(entry, box, transposed=transposed, check=check)
    if array.ndim == 2 and not non_zero:
        warn(f"{where}: every value is zero")
    return array


def _check_dtype(
    folder: Path, hf_config: dict[str, Any], stored: set[np.dtype[Any]]
) -> None:
    """Warns if config.json names a dtype that no tensor has; the dtype of the tensors counts."""
    declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
    found = sorted(str(dtype) for dtype in stored)
    if declared is not None and declared not in found:
        warn(
            f"{folder}: config.json says dtype {declared}, the tensors are "
            f"{', '.join(found)}"
        )


def read_config(folder: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """Returns the contents of config.json, and the architecture that they describe.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_hf`.
    """
    _require_config(folder)
    hf_config = read_json(folder, "config.json")
    return hf_config, parse_config(hf_config, f"{folder}/")


def _require_config(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if (folder / "params.json").exists():
        raise UnsupportedError(f"{folder}: params.json without config.json is {META}")
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder}: {ADAPTER}")
    if (folder / "checkpoints").is_dir():
        raise UsageError(
            f"{folder}: a run folder, which holds an adapter, not a model; give the base "
            "model here and this folder as the adapter"
        )
    raise UsageError(f"{folder}: holds no config.json, so it is not a model folder")


def _group(
    folder: Path, entries: dict[str, Entry], hf_config: dict[str, Any]
) -> dict[str, Entry | QuantizedTensor]:
    """Returns {HF key: tensor}, where what belongs to a quantised weight is one tensor."""
    quantization = find_quantization(hf_config)
    if quantization is None:
        refuse_quantised(str(folder), entries)
        return {**entries}
    if quantization.method == "bitsandbytes":
        return group_bitsandbytes(str(folder), entries)
    return group_fp8(entries, quantization, hf_config)


def _match(
    folder: Path,
    entries: dict[str, Entry | QuantizedTensor],
    config: LlamaConfig,
    names: list[Name],
) -> dict[str, Entry | QuantizedTensor]:
    """Returns {HF key: stored tensor}; one error names everything that does not match."""
    refuse_other_models(str(folder), entries)
    stored = {k: v for k, v in entries.items() if not k.endswith("rotary_emb.inv_freq")}
    if not any(key.startswith("model.") for key in stored):  # saved as a LlamaModel
        stored = {
            key if key.startswith("lm_head.") else f"model.{key}": entry
            for key, entry in stored.items()
        }
    head = stored.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_names(
        str(folder),
        {key: entry.shape for key, entry in stored.items()},
        {name.key: name.hf_shape for name in names},
    )
    if head is not None and not _same_bytes(head, stored["model.embed_tokens.weight"]):
        raise CorruptError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight; if both are meant, set tie_word_embeddings to "
            "false in config.json"
        )
    return stored


def _same_bytes(a: Spec, b: Spec, chunk: int = 16 << 20) -> bool:
    if not isinstance(a, Entry) or not isinstance(b, Entry):
        return False
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(
        np.array_equal(
            read_bytes(a.file, a.offset + i, min(chunk, a.nbytes - i)),
            read_bytes(b.file, b.offset + i, min(chunk, a.nbytes - i)),
        )
        for i in range(0, a.nbytes, chunk)
    )
