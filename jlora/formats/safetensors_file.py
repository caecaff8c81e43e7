"""Reads and writes safetensors files; a header is checked before any of it is used.

Tensors are read with plain file reads, one at a time, as mapped pages would count as
memory of the process.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.config.strict_json import parse_json_object
from jlora.errors import CorruptError, UnsupportedError, listing
from jlora.formats.model_files import reading
from jlora.formats.refusals import refuse_other_format

# A Llama of a thousand layers needs 1.5 MB. Parsing takes thirty times the memory.
MAX_HEADER_BYTES = 4 << 20
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Of jlora's own files; Hugging Face folders with them are refused.
QUANTISED_DTYPES: dict[str, np.dtype[Any]] = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_ALL_DTYPES = DTYPES | QUANTISED_DTYPES
_DTYPE_NAMES = {dtype: name for name, dtype in _ALL_DTYPES.items()}
_OTHER_DTYPE = re.compile(r"BOOL|[IU](8|16|32|64)|F[468](_E\dM\d\w*)?|C64")


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that is not in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Returns the size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry(Spec):
    """A tensor in a file: its shape and dtype, and where its bytes start."""

    file: Path
    offset: int


def read_header(path: Path, *, quantised: bool = False) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name, without reading their data.

    Args:
        path: the file.
        quantised: whether tensors of `QUANTISED_DTYPES` are accepted.

    Raises:
        CorruptError: the file is cut, longer than declared or contradicts itself.
        UnsupportedError: another format under this name, or integer and fp8 tensors.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(64)
        length = int.from_bytes(first[:8], "little")
        if first[8:9] != b"{":
            refuse_other_format(path, first, "safetensors")
        if size < 8 or length > size - 8:
            raise CorruptError(
                f"{path}: cut or damaged: the file has {size:,} bytes and its header "
                f"declares {length + 8:,}; copy or download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CorruptError(
                f"{path}: a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} "
                "are read"
            )
        file.seek(8)
        header = file.read(length)
    document = parse_json_object(header, f"{path}: header", MAX_HEADER_BYTES)
    document.pop("__metadata__", None)
    unsupported = [
        f"{name} ({fields['dtype']})"
        for name, fields in document.items()
        if isinstance(fields, dict)
        and isinstance(fields.get("dtype"), str)
        and _OTHER_DTYPE.fullmatch(fields["dtype"])
        and not (quantised and fields["dtype"] in QUANTISED_DTYPES)
    ]
    if unsupported:
        raise UnsupportedError(
            f"{path}: integer, fp8 or quantised tensors: {listing(sorted(unsupported))}; "
            "use the original bfloat16, float16 or float32 model"
        )
    problems = {name: _problem(fields) for name, fields in document.items()}
    wrong = [f"tensor {name!r:.200}: {what}" for name, what in problems.items() if what]
    if wrong:
        raise CorruptError(f"{path}: {listing(wrong)}; copy or download it again")
    entries = {
        name: _entry(path, fields, 8 + length) for name, fields in document.items()
    }
    _check_layout(path, entries, 8 + length, size)
    return entries


def _problem(fields: Any) -> str | None:
    """Returns what is wrong with the header's entry of one tensor, or None."""
    if not isinstance(fields, dict) or set(fields) != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        return "expected dtype, shape and data_offsets"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ALL_DTYPES:
        return f"unknown dtype {dtype!r:.40}"
    if not are_sizes(shape) or len(shape) > 8:
        return f"shape {shape!r:.80} is not a list of sizes"
    if not are_sizes(offsets) or len(offsets) != 2:
        return f"data_offsets {offsets!r:.80} are not two offsets"
    expected = _ALL_DTYPES[dtype].itemsize
    for size in shape:  # Python integers: a product that overflows 64 bits is seen
        expected *= size
    if offsets[1] - offsets[0] != expected:
        return (
            f"{dtype} of shape {shape} takes {expected:,} bytes, but "
            f"data_offsets={offsets} hold {offsets[1] - offsets[0]:,}"
        )
    return None


def _entry(path: Path, fields: dict[str, Any], start: int) -> Entry:
    """Returns a tensor from its checked entry in the header."""
    begin = fields["data_offsets"][0]
    dtype = _ALL_DTYPES[fields["dtype"]]
    return Entry(tuple(fields["shape"]), dtype, path, start + begin)


def are_sizes(values: Any) -> bool:
    """Whether a value from a JSON document is a list of integers that are not negative."""
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _check_layout(path: Path, entries: dict[str, Entry], start: int, end: int) -> None:
    position = start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)
    ):
        if entry.offset != position:
            kind = "a hole" if entry.offset > position else "an overlap"
            raise CorruptError(
                f"{path}: {kind} before tensor {name!r} at byte {entry.offset:,}; "
                f"expected it at {position:,}"
            )
        position += entry.nbytes
    if position != end:
        problem = "cut" if position > end else "longer than declared"
        raise CorruptError(
            f"{path}: {problem}: the tensors end at byte {position:,}, the file at "
            f"{end:,}; copy or download it again"
        )


def read_tensor(entry: Entry) -> np.ndarray:
    """Returns one tensor as stored.

    Raises:
        CorruptError: the file got shorter since its header was read.
    """
    return (
        read_bytes(entry.file, entry.offset, entry.nbytes)
        .view(entry.dtype)
        .reshape(entry.shape)
    )


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """Returns `count` bytes that start at `offset`, as uint8.

    Raises:
        CorruptError: the file is shorter.
    """
    with reading(path):
        data = np.fromfile(path, np.uint8, count, offset=offset)
    if data.size != count:
        raise CorruptError(f"{path}: cut while it was read")
    return data


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray]
) -> None:
    """Writes one file; `read` returns the tensor of a name, and is called once for each.

    The same names and values give the same bytes. As in the safetensors library, dtypes
    with larger items come first, so that every tensor is aligned to its item size.
    """
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.asarray(read(name), order="C")
            if (array.shape, array.dtype) != (specs[name].shape, specs[name].dtype):
                raise ValueError(
                    f"{name}: promised {specs[name]}, got {array.dtype}{array.shape}"
                )
            # Not array.tofile, whose errors do not say that the disk is full.
            file.write(array.reshape(-1).view(np.uint8).data)
