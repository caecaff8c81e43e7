"""Dropout whose masks are a function of place: cheap to make again, the same everywhere.

Whether an element is kept depends on two random words, of its row and of its column, and
their product. So a mask is never stored, a kernel makes its own part of it, and it is the
same however an array is sharded or tiled.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32


def drop(x: Float[Array, "... D"], key: Array, rate: float | Array) -> Array:
    """Returns x with a share `rate` of its elements zero and the others scaled up."""
    return drop_by(x, seeds(key), rate)


def drop_by(
    x: Float[Array, "... D"], seeds: UInt32[Array, "2"], rate: float | Array
) -> Float[Array, "... D"]:
    """As `drop`, given the key's `seeds`.

    A rate is a float32 from here on, so that one that varies in a sweep gives the same.
    """
    rate = jnp.float32(rate)
    size = x.shape[-1]
    rows = _places(x.size // size, 0).reshape(*x.shape[:-1], 1)
    columns = jnp.arange(size)
    keep = is_kept(codes(rows, seeds[0]), codes(columns, seeds[1]), threshold(rate))
    return jnp.where(keep, x.astype(jnp.float32) * (1 / (1 - rate)), 0).astype(x.dtype)


def seeds(key: Array) -> UInt32[Array, "2"]:
    """Returns what `codes` needs of a key, for rows and for columns."""
    return jax.random.bits(key, (2,), jnp.uint32)


def threshold(rate: float | Array) -> UInt32[Array, ""]:
    """Returns the words below which an element is dropped, of 2^32."""
    return (jnp.float32(rate) * 2.0**32).astype(jnp.uint32)


def codes(index: Int[Array, "..."], seed: Array) -> UInt32[Array, "..."]:
    """Returns a random odd word for every row or column.

    Source: Wellons, "Prospecting for Hash Functions" (2018), the constants of `lowbias32`
    as improved by "TheIronBorn".
    """
    x = index.astype(jnp.uint32) ^ seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15) | 1


def is_kept(
    rows: UInt32[Array, "..."], columns: UInt32[Array, "..."], limit: Array
) -> Bool[Array, "..."]:
    """Returns whether elements stay, by the codes of their rows and columns.

    The high bits of the product of two random odd words, modulo 2^32: each is a hash of
    the other. Source: Dietzfelbinger et al., "A Reliable Randomized Algorithm for the
    Closest-Pair Problem" (1997), multiplicative hashing.
    """
    return rows * columns >= limit


def axis_codes(
    seeds: Sequence[UInt32[Array, "2"]], shape: Sequence[int]
) -> list[UInt32[Array, "masks _"]]:
    """Returns the codes of all rows and of all columns, of which kernels make masks."""
    words = jnp.stack(seeds)
    return [
        jax.vmap(functools.partial(codes, _places(size, axis)))(words[:, axis])
        for axis, size in enumerate(shape)
    ]


def _places(size: int, axis: int) -> Int[Array, " size"]:
    """Returns the numbers of all rows (axis 0) or columns.

    Where every device computes on its own rows, `jlora.parallel.sharding.over_rows`, they go on
    from one device to the next.
    """
    devices = jax.sharding.get_abstract_mesh().manual_axes
    first = lax.axis_index(devices) * size if devices and axis == 0 else 0
    return first + jnp.arange(size)


def tile_mask(
    rows: UInt32[Array, " M"], columns: UInt32[Array, " N"], rate: float
) -> Bool[Array, "M N"]:
    """Returns a tile's mask by the codes of its rows and columns, inside a kernel."""
    shape = rows.size, columns.size
    with jax.ensure_compile_time_eval():
        limit = threshold(rate)
    rows, columns = (
        lax.broadcast_in_dim(words, shape, (axis,))
        for axis, words in enumerate((rows, columns))
    )
    return is_kept(rows, columns, jnp.uint32(int(limit)))


def kept(keep: Bool[Array, "..."], values: Array) -> Array:
    """Returns the values, zero where they are not kept."""
    return jnp.where(keep, values, jnp.zeros_like(values))
