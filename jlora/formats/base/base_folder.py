"""Converted bases: one Orbax tree per part of the model, so that one layer is in memory.

A base folder holds config.json, tokenizer and template files, `params/<part>/` and
jlora.json, which says where the model came from and has the digest of every leaf and
the checksum of every chunk.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from jlora.errors import CorruptError, UnsupportedError, listing
from jlora.formats.array_blocks import Index, whole
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.base.base_chunks import StoredLeaf, read_chunks
from jlora.formats.digests import leaf_digest
from jlora.formats.model_files import read_json, read_side_files
from jlora.formats.model_source import (
    Dtype,
    Source,
    hashing,
    parse_config,
    read_leaves,
    stored_dtype,
)
from jlora.formats.safetensors_file import Spec, are_sizes
from jlora.formats.stored_leaves import (
    dequantize_tensor,
    is_quantizable,
    quantized_specs,
    resulting_format,
)
from jlora.formats.tensor_checks import check_names
from jlora.formats.tensor_names import Params, all_names, set_leaf
from jlora.ops.quantize import Format
from jlora.train.checkpoint import save_tree

SCHEMA_VERSION = 2
# About 200 bytes per leaf and 12 per chunk: room for a model of 500 billion weights.
MAX_RECORD_BYTES = 16 << 20
_DTYPES = ("float32", "float16", "bfloat16")
_QUANTIZED_DTYPES = ("int8", "uint8", "float8_e4m3fn")


def write_base(
    source: Source,
    out: Path,
    dtype: Dtype,
    overwrite: bool,
    quantize: Format = "none",
) -> str:
    """Writes a converted base and returns its content digest.

    A quantised source stays quantised if the dtype is keep; any other dequantises it.

    Raises:
        UsageError: `out` cannot be made or holds something else.
        CorruptError: a NaN, an infinity, or a value that does not fit the dtype.
        ResourceError: the disk is full.
    """
    leaves: dict[str, dict[str, Any]] = {}
    quantize = resulting_format(source, dtype, quantize)
    specs = {path: source.specs(path, dtype, quantize) for path in source.tensors}
    with (
        atomic_folder(out, overwrite, source.location) as folder,
        hashing(source) as file_digests,
    ):
        for part, paths in _parts(list(source.tensors)).items():
            arrays: dict[str, np.ndarray] = {}
            for path in paths:
                boxes = {leaf: whole(spec.shape) for leaf, spec in specs[path].items()}
                arrays |= read_leaves(source, path, dtype, quantize, boxes)
            leaves |= _write_part(folder / "params" / part, arrays)
            arrays.clear()
        for name, data in source.files.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        digest = content_digest({k: leaf["sha256"] for k, leaf in leaves.items()})
        record = {
            "schema": SCHEMA_VERSION,
            "content_digest": digest,
            "quantize": quantize,
            "kernel_dtype": _kernel_dtype(source, dtype).name,
            "provenance": source.provenance
            | ({"sha256": file_digests()} if source.weights else {}),
            "leaves": leaves,
        }
        _write_json(folder / "config.json", source.hf_config)
        _write_json(folder / "jlora.json", record)
    return digest


def _write_part(
    folder: Path, arrays: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Writes the leaves of one part; returns what jlora.json says of each."""
    tree: Params = {}
    for path, array in arrays.items():
        set_leaf(tree, path, array)
    with ThreadPoolExecutor(1) as pool:  # hashes while Orbax writes
        digests = pool.map(leaf_digest, arrays.values())
        written = save_tree(folder, tree)
        chunks = [written[path.replace("/", ".")] for path in arrays]
        return {
            path: {
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "sha256": digest,
                "chunk": list(chunk.shape),
                "crc32": chunk.crc32,
            }
            for (path, array), chunk, digest in zip(
                arrays.items(), chunks, digests, strict=True
            )
        }


def _kernel_dtype(source: Source, dtype: Dtype) -> np.dtype[Any]:
    """Returns the dtype that quantised kernels had, or would have had."""
    kernel = next(path for path in source.tensors if is_quantizable(path))
    return stored_dtype(source.tensors[kernel], dtype)


def content_digest(leaf_digests: Mapping[str, str]) -> str:
    """Returns one sha256 over all leaves, independent of time and place.

    A leaf's own digest covers its shape, dtype and bytes.
    """
    lines = (f"{path} {digest}\n" for path, digest in sorted(leaf_digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def _parts(paths: list[str]) -> dict[str, list[str]]:
    """Groups params paths by what is written together: layers.0, norm, ..."""
    parts: dict[str, list[str]] = {}
    for path in paths:
        first, second, *_ = path.split("/")
        part = f"{first}.{second}" if first == "layers" else first
        parts.setdefault(part, []).append(path)
    return parts


def open_base(folder: Path) -> Source:
    """Returns the model of a converted base; digests are compared as leaves are read.

    Raises:
        UnsupportedError: written by another schema of jlora.
        CorruptError: a missing or damaged file, or one that does not fit the others.
    """
    record = read_json(folder, "jlora.json", MAX_RECORD_BYTES)
    if record.get("schema") != SCHEMA_VERSION:
        raise UnsupportedError(
            f"{folder}: a base of schema {record.get('schema')!r}; this jlora reads "
            f"schema {SCHEMA_VERSION}; convert the model again"
        )
    hf_config = read_json(folder, "config.json")
    config = parse_config(hf_config, f"{folder}/")
    leaves = _recorded_leaves(folder, record)
    quantize, kernel_dtype = _recorded_format(folder, record)
    tensors: dict[str, Spec] = {}
    expected: dict[str, dict[str, Spec]] = {}
    for name in all_names(config):
        if quantize != "none" and is_quantizable(name.path):
            tensors[name.path] = Spec(name.shape, kernel_dtype)
            expected[name.path] = quantized_specs(name.path, name.shape, quantize)
        else:
            stored = leaves.get(name.path, Spec(name.shape, kernel_dtype))
            tensors[name.path] = stored
            expected[name.path] = {name.path: Spec(name.shape, stored.dtype)}
    _check_leaves(folder, leaves, expected)
    part_of = {
        leaf: part
        for part, paths in _parts(list(expected)).items()
        for path in paths
        for leaf in expected[path]
    }

    def read(path: str, box: Index | None = None) -> np.ndarray:
        if path not in leaves:  # a quantised kernel
            stored = {leaf: read(leaf) for leaf in expected[path]}
            kernel = dequantize_tensor(stored, tensors[path].shape)
            return kernel if box is None else kernel[box]
        place = folder / "params" / part_of[path] / path.replace("/", ".")
        leaf = leaves[path]
        return read_chunks(place, path, leaf, whole(leaf.shape) if box is None else box)

    return Source(
        kind="base",
        location=folder,
        config=config,
        hf_config=hf_config,
        tensors=tensors,
        read=read,
        files=read_side_files(folder),
        provenance={
            **record.get("provenance", {}),
            "content_digest": record["content_digest"],
        },
        quantize=quantize,
    )


def _recorded_format(
    folder: Path, record: dict[str, Any]
) -> tuple[Format, np.dtype[Any]]:
    """Returns the format of the projections and the dtype they had before."""
    quantize: Any = record.get("quantize")
    dtype: Any = record.get("kernel_dtype")
    if quantize not in get_args(Format) or dtype not in _DTYPES:
        raise CorruptError(
            f"{folder / 'jlora.json'}: quantize={quantize!r}, kernel_dtype={dtype!r}; "
            "expected a format and a dtype that jlora writes"
        )
    return quantize, np.dtype(jnp.dtype(dtype))


def _check_leaves(
    folder: Path,
    leaves: Mapping[str, Spec],
    expected: Mapping[str, Mapping[str, Spec]],
) -> None:
    """Raises CorruptError if the record lists other leaves than the model has."""
    wanted = {
        leaf: spec.shape for specs in expected.values() for leaf, spec in specs.items()
    }
    found = {leaf: spec.shape for leaf, spec in leaves.items()}
    check_names(f"{folder / 'jlora.json'}", found, wanted)
    wrong = [
        f"{leaf} {leaves[leaf].dtype} instead of {spec.dtype}"
        for specs in expected.values()
        for leaf, spec in specs.items()
        if leaves[leaf].dtype != spec.dtype
    ]
    if wrong:
        raise CorruptError(f"{folder / 'jlora.json'}: other dtypes: {listing(wrong)}")


def _recorded_leaves(folder: Path, record: dict[str, Any]) -> dict[str, StoredLeaf]:
    """Returns the leaves that jlora.json lists."""
    where = folder / "jlora.json"
    leaves = record.get("leaves")
    if not isinstance(leaves, dict):
        raise CorruptError(f"{where}: leaves is not an object")
    found = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, dict) or not _is_leaf(path, leaf):
            raise CorruptError(
                f"{where}: {path}: expected dtype, shape, sha256, chunk and crc32"
            )
        found[path] = StoredLeaf(
            tuple(leaf["shape"]),
            np.dtype(jnp.dtype(leaf["dtype"])),
            leaf["sha256"],
            tuple(leaf["chunk"]),
            leaf["crc32"],
        )
    digests = {path: leaf.sha256 for path, leaf in found.items()}
    if content_digest(digests) != record.get("content_digest"):
        raise CorruptError(f"{where}: content_digest does not fit the leaves' digests")
    return found


def _is_leaf(path: str, leaf: dict[str, Any]) -> bool:
    if not all(are_sizes(leaf.get(key)) for key in ("shape", "chunk", "crc32")):
        return False
    shape, chunk = leaf["shape"], leaf["chunk"]
    fits = len(shape) == len(chunk) and all(
        part > 0 and size % part == 0 for size, part in zip(shape, chunk, strict=True)
    )
    return (
        fits
        and leaf.get("dtype")
        in (_QUANTIZED_DTYPES if path.endswith("/kernel_q") else _DTYPES)
        and isinstance(leaf.get("sha256"), str)
        and len(leaf["crc32"]) == math.prod(shape) // math.prod(chunk)
    )
