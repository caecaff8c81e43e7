"""Weights that are stored in fp8 (e4m3) with scales: `fp8` and compressed-tensors.

A scale belongs to the whole matrix [out, in], to each of its rows, or to a block of rows and
columns. The first two are jlora's fp8, which has a scale for each column of the transpose.
Scales of activations are left out, as jlora computes with the activations themselves.

Source: transformers `FineGrainedFP8Config`; compressed-tensors `float-quantized`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jlora.config.quantization import Quantization
from jlora.formats.array_blocks import Index, empty, for_each, whole
from jlora.formats.hf.quantized_tensor import (
    QuantizedTensor,
    damaged,
    is_plain,
    part_of,
    read_scales,
    read_transposed,
)
from jlora.formats.safetensors_file import DTYPES, Entry
from jlora.ops.quantize import Format

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale")
_COLUMNS = 128  # that are dequantised at a time


@dataclass(frozen=True)
class FP8Tensor(QuantizedTensor):
    """A weight in fp8."""

    codes: Entry
    """float8_e4m3fn [out, in]."""
    scales: Entry
    """One scale for each block."""
    scale_name: str
    block: tuple[int, int]
    """Rows and columns that share a scale."""

    @property
    def form(self) -> Format:
        """fp8, unless a row has several scales."""
        return "fp8" if self.block[1] >= self.shape[1] else "none"

    def read_leaf(self, leaf: str, box: Index | None) -> np.ndarray:
        """Returns kernel_q or kernel_scale."""
        rows, columns = self.shape
        if leaf == "kernel_q":
            return self._read_codes(whole((columns, rows)) if box is None else box)
        scales = np.repeat(self._read_scales()[:, 0], self.block[0])[:rows]
        return scales if box is None else scales[box]

    def read(self) -> np.ndarray:
        """Returns the weight, dequantised."""
        rows, columns = self.shape
        codes = self._read_codes(whole((columns, rows)))
        scales, result = self._read_scales(), empty(codes.shape, np.float32)

        def dequantize(start: int) -> None:
            part = slice(start, start + _COLUMNS)
            own = scales[np.arange(rows)[part] // self.block[0]]
            factors = np.repeat(own, self.block[1], axis=1)[:, :columns].T
            result[:, part] = codes[:, part].astype(np.float32) * factors

        for_each(dequantize, range(0, rows, _COLUMNS))
        return result

    def _read_codes(self, box: Index) -> np.ndarray:
        def check(block: np.ndarray, first: int) -> None:
            is_nan = (block.view(np.uint8) & 0x7F) == 0x7F
            if is_nan.any():
                row, column = (int(i) for i in np.argwhere(is_nan)[0])
                raise damaged(self.codes, self.key, f"nan at {[row + first, column]}")

        return read_transposed(self.codes, box, check)

    def _read_scales(self) -> np.ndarray:
        scales = read_scales(self.scales, self.scale_name)
        if scales.max(initial=0) > np.finfo(np.float32).max / 448:
            raise damaged(self.scales, self.scale_name, f"{scales.max()} is no scale")
        return scales


def group_fp8(
    entries: Mapping[str, Entry], quantization: Quantization, hf_config: dict[str, Any]
) -> dict[str, Entry | QuantizedTensor]:
    """Returns {HF key: tensor}, where a weight and its scales are one tensor.

    Raises:
        CorruptError: a scale is missing or misshapen.
    """
    dtypes = {dtype.name: dtype for dtype in DTYPES.values()}
    stands_for = dtypes.get(
        str(hf_config.get("dtype") or hf_config.get("torch_dtype")), dtypes["bfloat16"]
    )
    found: dict[str, Entry | QuantizedTensor] = {**entries}
    for key, entry in entries.items():
        if is_plain(entry):
            continue
        stem = key.removesuffix("weight")
        if (
            entry.dtype != _FP8
            or len(entry.shape) != 2
            or 0 in entry.shape
            or stem == key
        ):
            what = f"{entry.dtype} {list(entry.shape)} is no weight in fp8"
            raise damaged(entry, key, what)
        names = [stem + name for name in _SCALES]
        name = next((name for name in names if name in entries), names[0])
        block, shape = _blocks_of(entry, entries.get(name), quantization)
        parts = {key: entry} | ({name: entries[name]} if name in entries else {})
        dtype = part_of(parts, name).dtype
        wanted = dtype if dtype in DTYPES.values() else np.float32
        scales = part_of(parts, name, shape, wanted)
        found[key] = FP8Tensor(entry.shape, stands_for, key, entry, scales, name, block)
        for part in (name, *(stem + other for other in _OF_ACTIVATIONS)):
            found.pop(part, None)
    return found


def _blocks_of(
    weight: Entry, scales: Entry | None, quantization: Quantization
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the size of the blocks of a weight, and how many scales that makes."""
    rows, columns = weight.shape
    block = quantization.block
    if block is None:  # one for each row, or one for all
        is_by_row = scales is not None and scales.shape[:1] == (rows,)
        block = (1 if is_by_row else rows, columns)
    block = (min(block[0], rows), min(block[1], columns))
    return block, (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
