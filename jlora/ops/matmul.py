"""Matrix products in one dtype, asked for in the form that each platform makes fastest."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def matmul(x: Array, w: Array, dtype: Any) -> Array:
    """Returns x @ w in `dtype`; float32 means float32 products, also on GPU and TPU.

    A CPU is asked for narrower products in float32, which are rounded after: XLA then
    uses its bfloat16 instructions, and else it makes float32 copies of both operands.
    """
    dtype = jnp.dtype(dtype)
    x, w = x.astype(dtype), w.astype(dtype)
    if dtype.itemsize > 2:
        return jnp.matmul(x, w, precision=lax.Precision.HIGHEST)
    if jax.default_backend() == "cpu":
        return _rounded_after(x, w)
    return jnp.matmul(x, w)


@jax.custom_vjp
def _rounded_after(x: Array, w: Array) -> Array:
    return _forward(x, w)[0]


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, w, (x.ndim - 1,), (0,)), (x, w)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # Left to itself, JAX would multiply float32 gradients by bfloat16 operands.
    x, w = kept
    rows = tuple(range(x.ndim - 1))
    return _dot(dy, w, (x.ndim - 1,), (1,)), _dot(x, dy, rows, rows)


_rounded_after.defvjp(_forward, _backward)


def _dot(x: Array, y: Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]) -> Array:
    """Returns the sum of products over these axes, float32 until its end."""
    axes = ((x_axes, y_axes), ((), ()))
    product = lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
