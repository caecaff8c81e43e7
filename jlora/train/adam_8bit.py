"""Adam whose moments are kept in 8 bits: block-wise dynamic quantisation.

Every 256 values of a moment share a scale, their largest magnitude, and each is one of 256
numbers from -1 to 1 (from 0 to 1 for the second moment), dense near 0 over seven powers of
ten. A step computes in float32 and rounds what it keeps.

Source: "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2022).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

BLOCK = 256
# Smaller arrays keep float32 moments, as in bitsandbytes: they are little memory, and rounding
# them costs most.
SMALLEST = 4096
_DECADES = 7


class Rounded(NamedTuple):
    """An array in 8 bits: a code for each value, and a scale for each block of them."""

    codes: Any
    """uint8, of the array's shape; blocks run over it row by row."""
    scales: Any
    """float32 [blocks]."""


class Adam8bitState(NamedTuple):
    """Steps done, and the moments: `Rounded`, or float32 where an array is small."""

    count: Any
    mu: Any
    nu: Any


def code_values(*, signed: bool) -> np.ndarray:
    """Returns the 256 values of the codes, rising: float32 from -1 or 0 to 1."""
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        # Twice as many in each larger decade, in the middles of equal parts of [0.1, 1].
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = np.linspace(0.1, 1.0, parts + 1)
        middles = 10.0 ** (decade + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.asarray(values, np.float32))


def rounded(array: Array, values: np.ndarray) -> Rounded:
    """Returns an array with each value at the nearest code's, of its block's scale."""
    blocks = _in_blocks(array)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    shares = blocks / jnp.where(scales > 0, scales, 1)[:, None]
    middles = jnp.asarray((values[:-1] + values[1:]) / 2)
    codes = jnp.searchsorted(middles, shares).astype(jnp.uint8)
    return Rounded(codes.reshape(-1)[: array.size].reshape(array.shape), scales)


def restored(moment: Rounded, values: np.ndarray) -> Float[Array, "..."]:
    """Returns the float32 array that codes and scales stand for."""
    found = _in_blocks(jnp.asarray(values)[moment.codes]) * moment.scales[:, None]
    return found.reshape(-1)[: moment.codes.size].reshape(moment.codes.shape)


def _in_blocks(array: Array) -> Float[Array, "blocks 256"]:
    flat = array.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def scale_by_adam_8bit(
    b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Returns Adam's rule, as `optax.scale_by_adam`, with moments in 8 bits."""
    tables = (code_values(signed=True), code_values(signed=False))

    def kept(moment: Array, values: np.ndarray) -> Any:
        return rounded(moment, values) if is_rounded(moment.size) else moment

    def read(moment: Any, values: np.ndarray) -> Array:
        return restored(moment, values) if isinstance(moment, Rounded) else moment

    def init(params: Any) -> Adam8bitState:
        def zeros(values: np.ndarray) -> Any:
            return jax.tree.map(
                lambda p: kept(jnp.zeros(p.shape, jnp.float32), values), params
            )

        return Adam8bitState(jnp.int32(0), *map(zeros, tables))

    def update(gradients: Any, state: Adam8bitState, params: Any = None) -> Any:
        count = optax.safe_increment(state.count)
        leaves, tree = jax.tree.flatten(gradients)
        moved, means, squares = [], [], []
        pairs = zip(
            leaves,
            tree.flatten_up_to(state.mu),
            tree.flatten_up_to(state.nu),
            strict=True,
        )
        for gradient, mu, nu in pairs:
            mean = b1 * read(mu, tables[0]) + (1 - b1) * gradient
            square = b2 * read(nu, tables[1]) + (1 - b2) * gradient**2
            unbiased = square / (1 - b2**count)
            moved.append(mean / (1 - b1**count) / (jnp.sqrt(unbiased) + eps))
            means.append(kept(mean, tables[0]))
            squares.append(kept(square, tables[1]))
        state = Adam8bitState(count, tree.unflatten(means), tree.unflatten(squares))
        return tree.unflatten(moved), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def is_rounded(size: int) -> bool:
    """Whether the moments of an array of so many values are kept in 8 bits."""
    return size >= SMALLEST


def moment_bytes(size: int) -> int:
    """Returns the bytes of one moment of an array of so many values."""
    return size + 4 * math.ceil(size / BLOCK) if is_rounded(size) else 4 * size
