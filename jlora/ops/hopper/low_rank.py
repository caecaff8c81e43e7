"""Adapters of one input side by side, as the kernels take them.

A narrow array [M, W] holds all adapters of an input, each in the columns that `placed`
gives it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jlora.ops.hopper import dropout_kernels as hopper_dropout
from jlora.ops.hopper import matmul_kernel as hopper

# The narrowest place: the depth of one product of the tensor cores.
_LEAST = 16


class Adapter(NamedTuple):
    """Of a projection: A [in, R], s B [R, out], float32; the seeds of its dropout, if any."""

    a: Array
    b: Array
    seeds: UInt32[Array, "2"] | None


# Of the projections of one input, None where one has no adapter.
Adapters = Sequence[Adapter | None]


class Dropout(NamedTuple):
    """A rate, and for every adapter of a group what `dropout.seeds` returns."""

    rate: float
    seeds: Sequence[UInt32[Array, "2"]]


def fits(ranks: Sequence[int]) -> bool:
    """Returns whether adapters of these ranks are narrow enough."""
    return all(rank <= hopper_dropout.WIDEST for rank in ranks)


def placed(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (first column, columns) of each adapter in a narrow array.

    All are as wide as the widest needs, a power of two.
    """
    width = max(_LEAST, 1 << (max(ranks) - 1).bit_length())
    places, start = [], 0
    for rank in ranks:
        places.append((start, width if rank else 0))
        start += width if rank else 0
    return places


def ranks(pairs: Adapters) -> list[int]:
    """Returns every adapter's rank, 0 where there is none."""
    return [0 if pair is None else pair.a.shape[1] for pair in pairs]


def wide_a(pairs: Adapters, dtype: Any) -> list[Array | None]:
    """Returns every A with zeros after it, as wide as `placed` has it."""
    return [
        None
        if pair is None
        else jnp.pad(pair.a.astype(dtype), ((0, 0), (0, width - pair.a.shape[1])))
        for pair, (_, width) in zip(pairs, placed(ranks(pairs)), strict=True)
    ]


def wide_b(pairs: Adapters, dtype: Any) -> list[Array | None]:
    """Returns every s B likewise."""
    return [
        None
        if pair is None
        else jnp.pad(pair.b.astype(dtype), ((0, width - pair.b.shape[0]), (0, 0)))
        for pair, (_, width) in zip(pairs, placed(ranks(pairs)), strict=True)
    ]


def joined_a(pairs: Adapters, dtype: Any) -> Array:
    """Returns the A of all pairs side by side: [in, multiple of 64]."""
    wide = [a for a in wide_a(pairs, dtype) if a is not None]
    return padded(jnp.concatenate(wide, axis=1))


def placed_b(pairs: Adapters, sizes: list[int], dtype: Any) -> list[Array]:
    """Returns each pair's B in the rows that its A has as columns of `joined_a`."""
    places = placed(ranks(pairs))
    total = sum(width for _, width in places)
    total += -total % hopper.DEPTH
    result = []
    for pair, size, (start, _) in zip(pairs, sizes, places, strict=True):
        b = jnp.zeros((0, size), dtype) if pair is None else pair.b.astype(dtype)
        result.append(jnp.pad(b, ((start, total - start - b.shape[0]), (0, 0))))
    return result


def padded(x: Array) -> Array:
    """Returns x with columns of zeros after it, to a multiple of what hopper takes."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % hopper.DEPTH)))
