"""Matrix products in one dtype, in the form that each platform computes fastest."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.ops.compute_choices import Compute


def matmul(x: Array, w: Array, compute: Compute) -> Array:
    """Returns x @ w in `compute.dtype`, as `matmul_float32` if that is float32.

    On a CPU a bfloat16 product is requested as a float32 one that is rounded afterwards.
    XLA then uses the bfloat16 instructions; otherwise it copies both operands to float32.
    """
    dtype = jnp.dtype(compute.dtype)
    if dtype.itemsize > 2:
        return matmul_float32(x, w)
    x, w = x.astype(dtype), w.astype(dtype)
    if compute.platform == "cpu" and w.ndim == 2:
        return _rounded_after(x, w)
    return jnp.matmul(x, w)  # with a matrix for each row, as adapters that are served


def matmul_float32(x: Array, w: Array) -> Array:
    """Returns x @ w with float32 products, also on GPU and TPU."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.matmul(x, w, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def _rounded_after(x: Array, w: Array) -> Array:
    return _rounded_forward(x, w)[0]


def _rounded_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, w, (x.ndim - 1,), (0,)), (x, w)


def _rounded_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # Left to itself, JAX would multiply float32 gradients by bfloat16 operands.
    x, w = residuals
    rows = tuple(range(x.ndim - 1))
    return _dot(dy, w, (x.ndim - 1,), (1,)), _dot(x, dy, rows, rows)


_rounded_after.defvjp(_rounded_forward, _rounded_backward)


def _dot(x: Array, y: Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]) -> Array:
    """Returns the products summed over these axes in float32, in the dtype of x."""
    axes = ((x_axes, y_axes), ((), ()))
    product = lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
