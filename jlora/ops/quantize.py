"""Quantised formats of frozen weights.

A quantised layer has these leaves in place of its `kernel` [in, out]:

| format | `kernel_q` | scales | weight i, j |
|---|---|---|---|
| int8 | int8 [in, out] | `kernel_scale` [out] | q * scale[j] |
| fp8 | float8_e4m3fn [in, out] | `kernel_scale` [out] | q * scale[j] |
| nf4 | uint8 [in / 2, out] | `kernel_absmax` [in / 64, out] | NF4[q] * absmax[i // 64, j] |

nf4 packs two weights into a byte, the one of the even row in the high half. Its blocks are
64 rows of a column, as in bitsandbytes, except that the last block may be shorter. The
absmax is not quantised again, so a weight takes 4.5 bits. Scales are float32, and the dtype
of `kernel_q` tells the format. A weight is computed in float32 and rounded once.

Source: "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023), appendix
E for the table; "FP8 Formats for Deep Learning" (Micikevicius et al., 2022).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

from jlora.config.run_config import Format
from jlora.errors import UnsupportedError

BLOCK = 64
SCALES = ("kernel_scale", "kernel_absmax")
QUANTIZED_LEAVES = ("kernel_q", *SCALES)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
CODES = {"int8": np.dtype(np.int8), "fp8": _FP8, "nf4": np.dtype(np.uint8)}
_LARGEST = {"int8": np.float32(127), "fp8": np.float32(448)}
# The quantiles of a normal distribution, with zero and both ends exact.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_NF4_BORDERS = (NF4[1:] + NF4[:-1]) / 2
# Rows that are quantised to nf4 at a time: many, so that threads rarely need the
# interpreter's lock.
_SLAB = 64 * BLOCK


def quantized_shapes(
    shape: tuple[int, int], quantize: Format
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns {leaf: (shape, dtype)} of a kernel of this shape [in, out], quantised.

    Raises:
        UnsupportedError: nf4 of an odd number of rows.
    """
    rows, columns = shape
    if quantize != "nf4":
        return {
            "kernel_q": (shape, CODES[quantize]),
            "kernel_scale": ((columns,), np.dtype(np.float32)),
        }
    if rows % 2:
        raise UnsupportedError(
            f"nf4 has two rows in a byte, and a kernel of {rows} inputs is odd; use int8 "
            "or fp8"
        )
    return {
        "kernel_q": ((rows // 2, columns), CODES[quantize]),
        "kernel_absmax": ((math.ceil(rows / BLOCK), columns), np.dtype(np.float32)),
    }


def quantize_kernel(kernel: np.ndarray, quantize: Format) -> dict[str, np.ndarray]:
    """Returns the quantised leaves of a kernel [in, out], computed on the host.

    Each weight becomes the nearest value of the format, in float32; nf4 rounds ties down,
    int8 and fp8 to even. Columns do not influence each other.
    """
    wide = kernel.astype(np.float32)
    if quantize == "nf4":
        return _quantize_nf4(wide)
    largest = _LARGEST[quantize]
    scale = np.abs(wide).max(axis=0) / largest
    wide /= np.where(scale > 0, scale, np.float32(1))
    np.clip(wide, -largest, largest, out=wide)
    codes = np.rint(wide) if quantize == "int8" else wide
    return {"kernel_q": codes.astype(CODES[quantize]), "kernel_scale": scale}


def largest_code(dtype: Any) -> np.float32:
    """Returns the largest value of int8 or fp8 codes."""
    return _LARGEST["int8" if dtype == np.int8 else "fp8"]


def _quantize_nf4(wide: np.ndarray) -> dict[str, np.ndarray]:
    slabs = [_nf4_slab(wide[row : row + _SLAB]) for row in range(0, len(wide), _SLAB)]
    packed, absmax = (np.concatenate(parts) for parts in zip(*slabs, strict=True))
    return {"kernel_q": packed[: len(wide) // 2], "kernel_absmax": absmax}


def _nf4_slab(slab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (packed codes, absmax) of some rows, the last block padded with zeros."""
    slab = np.pad(slab, ((0, -len(slab) % BLOCK), (0, 0)))
    blocks = slab.reshape(-1, BLOCK, slab.shape[1])
    absmax = np.abs(blocks).max(axis=1)
    blocks = blocks / np.where(absmax > 0, absmax, np.float32(1))[:, None]
    codes, above = np.zeros(blocks.shape, np.uint8), np.empty(blocks.shape, bool)
    for border in _NF4_BORDERS:
        np.greater(blocks, border, out=above)
        codes += above.view(np.uint8)
    codes = codes.reshape(slab.shape)
    return codes[::2] << 4 | codes[1::2], absmax


def is_quantized(leaves: Mapping[str, Any]) -> bool:
    """Whether a module's weight is stored in one of the formats."""
    return "kernel_q" in leaves


def stored_format(params: Mapping[str, Any]) -> str | None:
    """Returns the format of a model's quantised weights, None if there are none."""
    for name, part in params.items():
        if isinstance(part, Mapping):
            if found := stored_format(part):
                return found
        elif name == "kernel_q":
            return next(key for key, dtype in CODES.items() if dtype == part.dtype)
    return None


def kernel_shape(leaves: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (in, out) of a module with a weight, quantised or not."""
    if not is_quantized(leaves):
        return leaves["kernel"].shape
    columns = leaves["kernel_q"].shape[1]
    return num_weights(leaves["kernel_q"]) // columns, columns


def num_weights(leaf: Any) -> int:
    """Returns how many weights a `kernel_q`, or any plain leaf, holds."""
    return math.prod(leaf.shape) * (2 if leaf.dtype == np.uint8 else 1)


def kernel_of(
    leaves: Mapping[str, Any], dtype: Any, *, has_fast_gather: bool = False
) -> Any:
    """Returns a module's kernel [in, out] in `dtype`, dequantised if necessary.

    NumPy leaves give a NumPy array with the same bits as JAX would compute.

    Args:
        leaves: of the module.
        dtype: of the kernel.
        has_fast_gather: whether the device looks values of nf4 up faster than it selects
            them bit by bit, as GPUs do.
    """
    if not is_quantized(leaves):
        return leaves["kernel"].astype(dtype)
    codes = leaves["kernel_q"]
    if "kernel_absmax" in leaves:
        values = _nf4_pairs if has_fast_gather else _nf4_values
        return _dequantize_nf4(codes, leaves["kernel_absmax"], values).astype(dtype)
    return (codes.astype(np.float32) * leaves["kernel_scale"]).astype(dtype)


def _dequantize_nf4(packed: Any, absmax: Any, values_of: Callable[[Any], Any]) -> Any:
    """Returns the float32 weights."""
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    rows, columns = 2 * packed.shape[0], packed.shape[1]
    values = (_nf4_values if xp is np else values_of)(packed).reshape(rows, columns)
    whole = xp.broadcast_to(absmax[:, None], (absmax.shape[0], BLOCK, columns))
    return values * whole.reshape(-1, columns)[:rows]


def _nf4_pairs(packed: Array) -> Array:
    """Returns both values of each byte [R, 2, C], from a table of all bytes."""
    bytes_ = np.arange(256)
    table = jnp.asarray(NF4[np.stack([bytes_ >> 4, bytes_ & 15], axis=1)])
    pairs = table.at[packed.astype(jnp.int32)].get(mode="promise_in_bounds")
    return jnp.moveaxis(pairs, -1, 1)


def _nf4_values(packed: Any) -> Any:
    """Returns both values of each byte [R, 2, C].

    In JAX without a gather: every bit of a code selects half of the values.
    """
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    codes = xp.stack([packed >> 4, packed & 15], axis=1)
    if xp is np:
        return NF4[codes]
    values: list[Any] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]
