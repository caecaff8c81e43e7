"""Rows of which several devices have some tokens each, inside `own_program.over_rows`.

Everything but attention is computed for each token by itself. Attention needs whole rows, so
around it the devices of the context axis exchange tokens for heads: each computes some heads
over all tokens, with the same kernels and masks as one device.

Source: "DeepSpeed Ulysses" (Jacobs et al., 2023), section 3.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jlora.parallel.own_program import own_size
from jlora.parallel.sharding import BATCH_AXES


def whole_length(tokens: Array) -> int:
    """Returns the length of rows, of which a device has tokens [B, t, ...]."""
    return tokens.shape[1] * own_size("context")


def whole_rows(x: Int[Array, "B t"] | None) -> Int[Array, "B T"] | None:
    """Returns the rows with the tokens of all devices."""
    if x is None or own_size("context") == 1:
        return x
    return lax.all_gather(x, "context", axis=1, tiled=True)


def heads_of_rows(x: Float[Array, "B t N H"]) -> Float[Array, "B T n H"]:
    """Returns a device's heads of whole rows, from all heads of its tokens.

    Of fewer key-value heads than devices, several devices get the same.
    """
    count = own_size("context")
    if count == 1:
        return x
    copies = count // math.gcd(count, x.shape[2])
    x = jnp.repeat(x, copies, axis=2) if copies > 1 else x
    return lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True)


def tokens_of_heads(x: Float[Array, "B T n H"]) -> Float[Array, "B t N H"]:
    """Returns all heads of a device's tokens, from its heads of whole rows."""
    if own_size("context") == 1:
        return x
    return lax.all_to_all(x, "context", split_axis=1, concat_axis=2, tiled=True)


def token_numbers(size: int, length: UInt32[Array, ""] | int) -> UInt32[Array, " size"]:
    """Returns the numbers, among those of all devices, of so many tokens.

    They are the tokens of a device's rows one after another, `length` of each row.
    """
    numbers = jnp.arange(size, dtype=jnp.uint32)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return numbers
    numbers += lax.axis_index(BATCH_AXES).astype(jnp.uint32) * size
    count = own_size("context")
    if count == 1:
        return numbers
    row, token = numbers // length, numbers % length
    own = lax.axis_index("context").astype(jnp.uint32)
    return (row * count + own) * length + token
