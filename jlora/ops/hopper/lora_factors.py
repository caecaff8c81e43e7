"""Pads and concatenates the LoRA factors of projections that share an input.

The kernels compute x A for all these projections at once. They take the A of every
adapter side by side, all padded with zeros to the same number of columns:

    s = x A:   | q: rank, zeros | v: rank, zeros | zeros to a multiple of 64 |

A projection without an adapter, None in the lists below, takes no columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jlora.ops.hopper.kernel_parts import DEPTH

# The smallest padded rank: the depth of one product of the tensor cores.
_SMALLEST = 16


class Adapter(NamedTuple):
    """A [in, R] and scaling * B [R, out] of one projection, and its dropout seeds."""

    a: Array
    b: Array
    seeds: UInt32[Array, " words"] | None


Adapters = Sequence[Adapter | None]


class Dropout(NamedTuple):
    """The dropout rate, and for each projection what `dropout.seeds` returns."""

    rate: float
    seeds: Sequence[UInt32[Array, " words"]]


def padded_rank(adapters: Adapters) -> int:
    """Returns the columns of each adapter: a power of two that holds the largest rank."""
    return max(_SMALLEST, 1 << (max(ranks(adapters)) - 1).bit_length())


def column_slices(adapters: Adapters) -> list[slice]:
    """Returns the columns that belong to each adapter, an empty slice for None."""
    width = padded_rank(adapters)
    slices, start = [], 0
    for adapter in adapters:
        end = start if adapter is None else start + width
        slices.append(slice(start, end))
        start = end
    return slices


def ranks(adapters: Adapters) -> list[int]:
    """Returns the rank of each adapter, 0 for None."""
    return [0 if adapter is None else adapter.a.shape[1] for adapter in adapters]


def padded_a(adapters: Adapters, dtype: Any) -> list[Array]:
    """Returns A of every adapter that exists, padded to `padded_rank` columns."""
    width = padded_rank(adapters)
    return [pad_columns(own.a.astype(dtype), width) for own in adapters if own]


def concatenated_a(adapters: Adapters, dtype: Any) -> Array:
    """Returns A of all adapters side by side: [in, multiple of 64]."""
    return pad_to_depth(jnp.concatenate(padded_a(adapters, dtype), axis=1))


def padded_b(adapters: Adapters, dtype: Any) -> list[Array | None]:
    """Returns B of every adapter, padded to `padded_rank` rows."""
    width = padded_rank(adapters)
    return [own and pad_rows(own.b.astype(dtype), width) for own in adapters]


def aligned_b(adapters: Adapters, sizes: list[int], dtype: Any) -> list[Array]:
    """Returns for each projection the B to multiply by the whole of s.

    Its rows stand where `concatenated_a` has the adapter's columns; the others are zero.
    """
    slices = column_slices(adapters)
    total = slices[-1].stop
    total += -total % DEPTH
    result = []
    for own, size, place in zip(adapters, sizes, slices, strict=True):
        b = jnp.zeros((0, size), dtype) if own is None else own.b.astype(dtype)
        below = total - place.start - b.shape[0]
        result.append(jnp.pad(b, ((place.start, below), (0, 0))))
    return result


def pad_columns(x: Array, width: int) -> Array:
    """Returns x with columns of zeros added on the right, up to `width`."""
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))


def pad_rows(x: Array, height: int) -> Array:
    """Returns x with rows of zeros added below, up to `height`."""
    return jnp.pad(x, ((0, height - x.shape[0]), (0, 0)))


def pad_to_depth(x: Array) -> Array:
    """Returns x with columns of zeros added, up to a multiple of 64, as kernels need."""
    return pad_columns(x, x.shape[1] + -x.shape[1] % DEPTH)
