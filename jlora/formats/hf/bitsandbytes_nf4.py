"""Weights that bitsandbytes stored as nf4, with the same codes and scales as jlora's.

The tensor X.weight packs the codes of W [out, in] row by row, the first of two in the high
half of a byte. Blocks are 64 successive weights; where `in` is a multiple of 64 they run
along a row of W, as jlora's run along a column of its transpose. So nothing is computed but
an absmax that is quantised itself: code book[q] * absmax of some hundred + offset.

Source: bitsandbytes 0.50, `functional.QuantState.as_dict` and `dequantize_4bit`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jlora.config.json_fields import MAX_FLOAT, MAX_SIZE, is_int, is_number
from jlora.config.strict_json import parse_json_object
from jlora.errors import UnsupportedError
from jlora.formats.array_blocks import Index, whole
from jlora.formats.hf.quantized_tensor import (
    QuantizedTensor,
    damaged,
    is_plain,
    part_of,
    read_scales,
    read_transposed,
)
from jlora.formats.quantized_kernels import dequantize_tensor
from jlora.formats.safetensors_file import Entry, are_sizes, read_tensor
from jlora.ops.quantize import BLOCK, NF4, Format

_PART = re.compile(r"(.+)\.((nested_)?(absmax|quant_map)|quant_state\.\w+)")
_STATE = "quant_state.bitsandbytes__nf4"
_MAX_STATE_BYTES = 1 << 16
_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Nested:
    """How an absmax is quantised itself."""

    absmax: Entry
    """float32, one for each block of `size`."""
    book: Entry
    """float32 [256]."""
    size: int
    offset: float


@dataclass(frozen=True)
class NF4Tensor(QuantizedTensor):
    """A weight in nf4."""

    packed: Entry
    """uint8 [out, in / 2]."""
    absmax: Entry
    """[out, in / 64], float32, or uint8 if it is quantised."""
    nested: Nested | None

    @property
    def form(self) -> Format:
        """nf4."""
        return "nf4"

    def read_leaf(self, leaf: str, box: Index | None) -> np.ndarray:
        """Returns kernel_q or kernel_absmax."""
        entry = self.packed if leaf == "kernel_q" else self.absmax
        box = whole(entry.shape[::-1]) if box is None else box
        if leaf == "kernel_q":
            return read_transposed(entry, box)
        return self._read_absmax().T[box]

    def read(self) -> np.ndarray:
        """Returns the weight, dequantised."""
        names = ("kernel_q", "kernel_absmax")
        leaves = {leaf: self.read_leaf(leaf, None) for leaf in names}
        rows, columns = self.shape
        return dequantize_tensor(leaves, (columns, rows))

    def _read_absmax(self) -> np.ndarray:
        if self.nested is None:
            return read_scales(self.absmax, f"{self.key}.absmax")
        nested, codes = self.nested, read_tensor(self.absmax)
        scales = read_scales(nested.absmax, f"{self.key}.nested_absmax")
        block_of = np.arange(codes.size).reshape(codes.shape) // nested.size
        with np.errstate(over="ignore", invalid="ignore"):
            absmax = read_tensor(nested.book)[codes] * scales[block_of]
            absmax += np.float32(nested.offset)
        if not np.isfinite(absmax).all():
            name = f"{self.key}.nested_quant_map"
            raise damaged(nested.book, name, "gives scales that are not finite")
        return absmax


def group_bitsandbytes(
    where: str, entries: Mapping[str, Entry]
) -> dict[str, Entry | QuantizedTensor]:
    """Returns {HF key: tensor}, where the parts of a quantised weight are one tensor.

    Raises:
        UnsupportedError: fp4, llm_int8, or blocks of another size.
        CorruptError: parts are missing, misshapen or damaged.
    """
    found: dict[str, Entry | QuantizedTensor] = {}
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        match = _PART.fullmatch(name)
        if name.endswith((".SCB", ".weight_format")):
            raise _other(where, name, "llm_int8")
        if match is None and is_plain(entry):
            found[name] = entry
        else:
            key = match[1] if match else name
            parts.setdefault(key, {})[name] = entry
    for key, own in parts.items():
        kinds = [name.rpartition("__")[2] for name in own if ".quant_state." in name]
        if kinds and kinds != ["nf4"]:
            raise _other(where, key, kinds[0])
        # The parts of an unquantised weight, or of none, are not a part of the model.
        found[key] = _nf4_tensor(
            key, own | {key: entries[key]} if key in entries else own
        )
    return found


def _other(where: str, name: str, kind: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: {name} is stored as bitsandbytes' {kind}, and jlora reads its nf4 in "
        f"blocks of {BLOCK}; use the original bfloat16, float16 or float32 model"
    )


def _nf4_tensor(key: str, parts: Mapping[str, Entry]) -> NF4Tensor:
    """Returns a weight of its parts, by their names."""
    state = _read_state(key, parts)
    rows, columns = shape = tuple(state["shape"])
    # Whatever dtype the bytes are stored as (bnb_4bit_quant_storage).
    stored = part_of(parts, key)
    packed = Entry((rows, columns // 2), np.dtype(np.uint8), stored.file, stored.offset)
    if columns % BLOCK or state.get("blocksize") != BLOCK:
        what = f"nf4 of {shape} in blocks of {state.get('blocksize')!r:.40}"
        raise _other(str(stored.file), key, what)
    if packed.nbytes != stored.nbytes:
        what = f"{stored.nbytes:,} bytes instead of {packed.nbytes:,} for {shape}"
        raise damaged(stored, key, what)
    book = part_of(parts, f"{key}.quant_map", (len(NF4),), np.float32)
    if not np.array_equal(read_tensor(book), NF4):
        raise damaged(book, f"{key}.quant_map", "not the 16 values of nf4")
    blocks = (rows, columns // BLOCK)
    nested = _nested(key, parts, state, math.prod(blocks))
    return NF4Tensor(
        shape,
        np.dtype(_DTYPES[state["dtype"]]),
        key,
        packed,
        part_of(parts, f"{key}.absmax", blocks, np.uint8 if nested else np.float32),
        nested,
    )


def _nested(
    key: str, parts: Mapping[str, Entry], state: Mapping[str, Any], blocks: int
) -> Nested | None:
    """Returns how the absmax of so many blocks is quantised, or None if it is not."""
    size: Any = state.get("nested_blocksize")
    offset: Any = state.get("nested_offset")
    if size is None and f"{key}.nested_absmax" not in parts:
        return None
    is_offset = is_number(offset) and abs(offset) <= MAX_FLOAT
    if not is_int(size) or not 1 <= size <= MAX_SIZE or not is_offset:
        what = f"nested_blocksize={size!r:.40}, nested_offset={offset!r:.40}"
        raise damaged(parts[key], f"{key}.{_STATE}", what)
    count = math.ceil(blocks / size)
    return Nested(
        part_of(parts, f"{key}.nested_absmax", (count,), np.float32),
        part_of(parts, f"{key}.nested_quant_map", (256,), np.float32),
        size,
        float(offset),
    )


def _read_state(key: str, parts: Mapping[str, Entry]) -> dict[str, Any]:
    """Returns the JSON object that says what the other parts mean."""
    name = f"{key}.{_STATE}"
    stored = part_of(parts, name)
    size = min(stored.nbytes, _MAX_STATE_BYTES)
    entry = part_of(parts, name, (size,), np.uint8)
    state = parse_json_object(read_tensor(entry).tobytes(), f"{entry.file}: {name}")
    shape: Any = state.get("shape")
    if (
        state.get("quant_type") != "nf4"
        or str(state.get("dtype")) not in _DTYPES
        or not are_sizes(shape)
        or len(shape) != 2
        or not all(0 < size <= MAX_SIZE for size in shape)
    ):
        raise damaged(entry, name, f"{state!r:.200} describes no nf4")
    return state
