"""jlora.json: what a converted base says of itself, and the checks of what it says."""

import hashlib
import math
import shlex
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from jlora.errors import CorruptError, UnsupportedError, listing
from jlora.formats.model_files import read_json
from jlora.formats.safetensors_file import Spec, are_sizes
from jlora.ops.quantize import Format

RECORD = "jlora.json"
# 3: safetensors files. 2 had a folder of Orbax for each part of the model.
SCHEMA_VERSION = 3
# About 200 bytes per tensor and 12 per block: room for a model of 500 billion weights.
MAX_RECORD_BYTES = 16 << 20
# A block is the least that is read, as its checksum covers all of it.
BLOCK_BYTES = 16 << 20
_DTYPES = ("float32", "float16", "bfloat16")
_QUANTIZED_DTYPES = ("int8", "uint8", "float8_e4m3fn")


@dataclass(frozen=True)
class StoredTensor(Spec):
    """A tensor of a base: shape, dtype, digest, and the checksum of each block of rows.

    The checksums are checked when rows are read. The digest is not: it says which values
    the base holds, as a part of `content_digest`.
    """

    sha256: str
    block_rows: int
    crc32: list[int]


@dataclass(frozen=True)
class Record:
    """The contents of jlora.json, checked."""

    tensors: dict[str, StoredTensor]
    quantize: Format
    kernel_dtype: np.dtype[Any]
    """Of the quantised kernels before, which is the dtype they are read in."""
    files: dict[str, str]
    """Name of every other file -> sha256 of its bytes."""
    provenance: dict[str, Any]


def block_rows_of(spec: Spec) -> int:
    """Returns how many rows of a tensor a block has."""
    return max(1, BLOCK_BYTES // max(1, spec.nbytes // spec.shape[0]))


def block_checksums(array: np.ndarray) -> list[int]:
    """Returns the CRC-32 of each block of rows."""
    rows = block_rows_of(Spec(array.shape, array.dtype))
    blocks = (array[first : first + rows] for first in range(0, len(array), rows))
    return [zlib.crc32(block.view(np.uint8).data) for block in blocks]


def content_digest(tensors: Mapping[str, str]) -> str:
    """Returns one sha256 of {params path: sha256 of a tensor's shape, dtype and bytes}."""
    lines = (f"{path} {digest}\n" for path, digest in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns {file name: sha256}, sorted by name."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def part_of(path: str) -> str:
    """Returns the part of the model that shares a file with a tensor: layers.0, norm."""
    first, second, *_ = path.split("/")
    return f"{first}.{second}" if first == "layers" else first


def read_record(folder: Path) -> Record:
    """Returns the contents of jlora.json.

    Raises:
        UnsupportedError: written by another version of jlora.
        CorruptError: it contradicts itself.
    """
    document = read_json(folder, RECORD, MAX_RECORD_BYTES)
    if document.get("schema") != SCHEMA_VERSION:
        raise UnsupportedError(
            f"{folder}: a base of schema {document.get('schema')!r}; this jlora reads "
            f"schema {SCHEMA_VERSION}; convert the model again: "
            f"{_command(folder, document)}"
        )
    where = folder / RECORD
    tensors = _tensors(where, document)
    quantize: Any = document.get("quantize")
    dtype: Any = document.get("kernel_dtype")
    if quantize not in get_args(Format) or dtype not in _DTYPES:
        raise CorruptError(
            f"{where}: quantize={quantize!r}, kernel_dtype={dtype!r}; "
            "expected a format and a dtype that jlora writes"
        )
    files, provenance = document.get("files"), document.get("provenance")
    if not isinstance(files, dict) or not isinstance(provenance, dict):
        raise CorruptError(f"{where}: files or provenance is not an object")
    digest = content_digest({path: tensor.sha256 for path, tensor in tensors.items()})
    if digest != document.get("content_digest"):
        raise CorruptError(f"{where}: content_digest does not fit the tensors' digests")
    return Record(
        tensors,
        quantize,
        np.dtype(jnp.dtype(dtype)),
        files,
        {**provenance, "content_digest": digest},
    )


def check_files(
    folder: Path, recorded: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Raises CorruptError unless the files beside the weights are those that were written.

    Args:
        folder: the base.
        recorded: {file name: sha256} of jlora.json.
        found: the same of the files that are there.
    """
    problems = [
        f"{name} {what}"
        for what, names in (
            ("is missing", recorded.keys() - found.keys()),
            ("was added", found.keys() - recorded.keys()),
            (
                "was changed",
                {n for n in recorded.keys() & found.keys() if recorded[n] != found[n]},
            ),
        )
        for name in sorted(names)
    ]
    if problems:
        raise CorruptError(
            f"{folder}: not as it was converted: {listing(problems)}; change the "
            "original model instead, and convert it again"
        )


def _tensors(where: Path, document: dict[str, Any]) -> dict[str, StoredTensor]:
    tensors = document.get("tensors")
    if not isinstance(tensors, dict):
        raise CorruptError(f"{where}: tensors is not an object")
    for path, tensor in tensors.items():
        if not isinstance(tensor, dict) or not _is_tensor(path, tensor):
            raise CorruptError(
                f"{where}: {path}: expected dtype, shape, sha256, block_rows and crc32"
            )
    return {
        path: StoredTensor(
            tuple(tensor["shape"]),
            np.dtype(jnp.dtype(tensor["dtype"])),
            tensor["sha256"],
            tensor["block_rows"],
            tensor["crc32"],
        )
        for path, tensor in tensors.items()
    }


def _is_tensor(path: str, tensor: dict[str, Any]) -> bool:
    shape: Any = tensor.get("shape")
    rows: Any = tensor.get("block_rows")
    sums: Any = tensor.get("crc32")
    if not all(map(are_sizes, (shape, [rows], sums))):
        return False
    known = _QUANTIZED_DTYPES if path.endswith("/kernel_q") else _DTYPES
    return (
        tensor.get("dtype") in known
        and isinstance(tensor.get("sha256"), str)
        and bool(shape and rows)
        and len(sums) == math.ceil(shape[0] / rows)
    )


def _command(folder: Path, document: dict[str, Any]) -> str:
    """Returns the command that converts a base of schema 2 again."""
    provenance, leaves = document.get("provenance"), document.get("leaves")
    if not isinstance(provenance, dict) or not isinstance(leaves, dict):
        return "jlora convert SRC OUT --overwrite"
    source, revision = provenance.get("source", "SRC"), provenance.get("revision")
    words = [f"{source}@{revision}" if revision else str(source), str(folder)]
    dtypes = {
        leaf["dtype"]
        for path, leaf in leaves.items()
        if isinstance(leaf, dict)
        and leaf.get("dtype") in _DTYPES
        and not path.endswith(("/kernel_q", "/kernel_scale", "/kernel_absmax"))
    }
    if len(dtypes) == 1:
        words += ["--dtype", str(*dtypes)]
    if document.get("quantize") in ("fp8", "int8", "nf4"):
        words += ["--quantize", document["quantize"]]
    return f"jlora convert {shlex.join(words)} --overwrite"
