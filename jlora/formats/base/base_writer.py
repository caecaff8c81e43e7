"""Writes a converted base: weights in safetensors files, one part of the model each."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.array_blocks import aligned_copy, whole
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.base.base_record import (
    RECORD,
    SCHEMA_VERSION,
    block_checksums,
    block_rows_of,
    content_digest,
    file_digests,
    part_of,
)
from jlora.formats.digests import leaf_digest
from jlora.formats.model_source import (
    Dtype,
    ModelSource,
    hash_weights,
    read_leaves,
    resulting_format,
    stored_dtype,
)
from jlora.formats.quantized_kernels import is_quantizable
from jlora.formats.safetensors_file import Spec, write_safetensors
from jlora.ops.quantize import Format


def write_base(
    source: ModelSource,
    out: Path,
    dtype: Dtype,
    overwrite: bool,
    quantize: Format = "none",
) -> str:
    """Writes a converted base and returns its content digest.

    One layer is in memory at a time. A quantised source stays quantised if the dtype is
    keep; any other dequantises it.

    Raises:
        UsageError: `out` cannot be made or holds something else.
        CorruptError: a NaN, an infinity, or a value that does not fit the dtype.
        ResourceError: the disk is full.
    """
    quantize = resulting_format(source, dtype, quantize)
    parts: dict[str, list[str]] = {}
    for path in source.tensors:
        parts.setdefault(part_of(path), []).append(path)
    tensors: dict[str, dict[str, Any]] = {}
    files = {"config.json": _json_bytes(source.hf_config), **source.files}
    with (
        atomic_folder(out, overwrite, source.location) as folder,
        hash_weights(source) as weight_digests,
    ):
        (folder / "params").mkdir()
        for part, paths in parts.items():
            arrays: dict[str, np.ndarray] = {}
            for path in paths:
                specs = source.specs(path, dtype, quantize)
                boxes = {leaf: whole(spec.shape) for leaf, spec in specs.items()}
                found = read_leaves(source, path, dtype, quantize, boxes)
                for leaf in specs:
                    array = found.pop(leaf)
                    row_major = array.flags.c_contiguous
                    arrays[leaf] = array if row_major else aligned_copy(array)
            tensors |= _write_part(folder / "params" / f"{part}.safetensors", arrays)
            arrays.clear()
        for name, data in files.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        digest = content_digest({path: t["sha256"] for path, t in tensors.items()})
        record = {
            "schema": SCHEMA_VERSION,
            "content_digest": digest,
            "quantize": quantize,
            "kernel_dtype": _kernel_dtype(source, dtype).name,
            "provenance": source.provenance
            | ({"sha256": weight_digests()} if source.weights else {}),
            "files": file_digests(files),
            "tensors": tensors,
        }
        (folder / RECORD).write_bytes(_json_bytes(record))
    return digest


def _write_part(
    file: Path, arrays: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Writes one file; returns what jlora.json records of each tensor."""
    specs = {path: Spec(array.shape, array.dtype) for path, array in arrays.items()}
    with ThreadPoolExecutor(2) as pool:  # computes both digests meanwhile
        digests = pool.map(leaf_digest, arrays.values())
        checksums = pool.map(block_checksums, arrays.values())
        write_safetensors(file, specs, arrays.__getitem__)
        return {
            path: {
                "dtype": spec.dtype.name,
                "shape": list(spec.shape),
                "sha256": digest,
                "block_rows": block_rows_of(spec),
                "crc32": sums,
            }
            for (path, spec), digest, sums in zip(
                specs.items(), digests, checksums, strict=True
            )
        }


def _kernel_dtype(source: ModelSource, dtype: Dtype) -> np.dtype[Any]:
    """Returns the dtype that quantised kernels had, or would have had."""
    kernel = next(path for path in source.tensors if is_quantizable(path))
    return stored_dtype(source.tensors[kernel], dtype)


def _json_bytes(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
