"""Dropout whose mask follows from each element's row and column number.

Rows and columns each get a random word, their code, and an element is kept or dropped by
the product of its two codes. So no mask is ever stored: the backward pass and every tile of
a kernel compute their part again, and sharding does not change it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, UInt32

from jlora.parallel.context import token_numbers
from jlora.parallel.own_program import own_size


def drop(x: Float[Array, "... T D"], key: Array, rate: float | Array) -> Array:
    """Returns x with a share `rate` of its elements set to 0 and the others scaled up."""
    return drop_by(x, placed(seeds(key), x), rate)


def drop_by(
    x: Float[Array, "... D"], seeds: UInt32[Array, " words"], rate: float | Array
) -> Float[Array, "... D"]:
    """Returns what `drop` does, given the `seeds` of its key, `placed` for x."""
    # Float32 from here on, so that a rate which a sweep traces gives the same mask.
    rate = jnp.float32(rate)
    size = x.shape[-1]
    rows = _numbers(x.size // size, 0, seeds).reshape(*x.shape[:-1], 1)
    columns = _numbers(size, 1, seeds)
    keep = is_kept(codes(rows, seeds[0]), codes(columns, seeds[1]), threshold(rate))
    return jnp.where(keep, x.astype(jnp.float32) * (1 / (1 - rate)), 0).astype(x.dtype)


def seeds(key: Array) -> UInt32[Array, "2"]:
    """Returns the seeds of the codes of rows and of columns."""
    return jax.random.bits(key, (2,), jnp.uint32)


def placed(
    seeds: UInt32[Array, "2"],
    x: Float[Array, "... T D"],
    first_column: Array | int = 0,
) -> UInt32[Array, " words"]:
    """Returns the seeds, and words that say where x lies if a device has a part of it.

    They are the number of its first column among all columns, and its tokens of each row.
    """
    if own_size("context") == own_size("tensor") == 1:
        return seeds
    words = [jnp.uint32(first_column), jnp.uint32(x.shape[-2])]
    return jnp.concatenate([seeds, jnp.stack(words)])


def threshold(rate: float | Array) -> UInt32[Array, ""]:
    """Returns the limit, of 2^32, below which a product of codes drops its element."""
    return (jnp.float32(rate) * 2.0**32).astype(jnp.uint32)


def codes(index: Integer[Array, "..."], seed: Array) -> UInt32[Array, "..."]:
    """Returns a random odd word for the number of every row or column.

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
    """Returns whether each element is kept, given the codes of its row and its column.

    The product of two odd words, modulo 2^32, hashes one by the other. Source:
    Dietzfelbinger et al., "A Reliable Randomized Algorithm for the Closest-Pair Problem"
    (1997), multiplicative hashing.
    """
    return rows * columns >= limit


def axis_codes(
    seeds: Sequence[UInt32[Array, " words"]], shape: Sequence[int]
) -> list[UInt32[Array, "masks _"]]:
    """Returns the codes of all rows and those of all columns, from which kernels make masks."""
    words = jnp.stack(seeds)
    return [
        jax.vmap(lambda own, n=size, i=axis: codes(_numbers(n, i, own), own[i]))(words)
        for axis, size in enumerate(shape)
    ]


def _numbers(size: int, axis: int, seeds: Array) -> Integer[Array, " size"]:
    """Returns the numbers of all rows (axis 0) or columns."""
    first_column, length = (0, size) if seeds.shape[0] == 2 else (seeds[2], seeds[3])
    if axis == 1:
        return jnp.arange(size) + first_column
    return token_numbers(size, length)


def tile_mask(
    rows: UInt32[Array, " M"], columns: UInt32[Array, " N"], rate: float
) -> Bool[Array, "M N"]:
    """Returns a tile's mask from the codes of its rows and columns, inside a kernel."""
    shape = rows.size, columns.size
    with jax.ensure_compile_time_eval():
        limit = threshold(rate)
    rows, columns = (
        lax.broadcast_in_dim(words, shape, (axis,))
        for axis, words in enumerate((rows, columns))
    )
    return is_kept(rows, columns, jnp.uint32(int(limit)))


def kept(keep: Bool[Array, "..."], values: Array) -> Array:
    """Returns the values, with 0 where they are dropped."""
    return jnp.where(keep, values, jnp.zeros_like(values))
