"""Products with quantised weights: of the codes themselves, or of dequantised weights.

A product of codes runs in the tensor cores of 8 bits, which are twice as fast as those of
bfloat16. Activations and gradients are rounded to the format of the weights, with a scale for
each token. The weights' own scales, one for each output, multiply the result in the forward
pass. In the backward pass, where outputs are summed, they multiply the gradient before it is
rounded.

Source: "LLM.int8()" (Dettmers et al., 2022), section 2 for scales per token and per column;
"FP8 Formats for Deep Learning" (Micikevicius et al., 2022).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jlora.ops.compute_choices import Compute
from jlora.ops.matmul import matmul
from jlora.ops.quantize import CODES, QUANTIZED_LEAVES, kernel_of, largest_code

# Rows whose largest value is smaller have no codes but zero: scales are normal numbers.
SMALLEST_PEAK = 1e-30


def multiplies_codes(leaves: Mapping[str, Any], compute: Compute) -> bool:
    """Returns whether a module's weight is multiplied as it is stored."""
    dtype = getattr(leaves.get("kernel_q"), "dtype", None)
    return any(dtype == CODES[name] for name in compute.code_products)


def dequantised(leaves: Mapping[str, Any], compute: Compute) -> Array:
    """Returns a module's kernel [in, out] in `compute.dtype`."""
    on_gpu = compute.platform == "gpu"
    return kernel_of(leaves, compute.dtype, has_fast_gather=on_gpu)


def quantize_rows(
    arrays: Sequence[Float[Array, "... _"]], dtype: Any
) -> tuple[list[Array], Float[Array, "..."]]:
    """Returns the codes of arrays, and a float32 scale for each row, the same for all.

    A row's largest value becomes the largest code. Infinity and NaN are in the scale, too.
    """
    largest = largest_code(dtype)
    wide = [x.astype(jnp.float32) for x in arrays]
    peaks = [jnp.max(jnp.abs(x), axis=-1, keepdims=True) for x in wide]
    peak = jnp.maximum(functools.reduce(jnp.maximum, peaks), SMALLEST_PEAK)
    codes = [x * (largest / peak) for x in wide]
    if dtype == jnp.int8:
        codes = [jnp.round(x) for x in codes]
    return [x.astype(dtype) for x in codes], jnp.squeeze(peak / largest, -1)


def quantized_matmul(
    x: Float[Array, "... D_in"], leaves: Mapping[str, Any], compute: Compute
) -> Float[Array, "... D_out"]:
    """Returns x W in `compute.dtype`; W has no gradient.

    Codes are multiplied if `compute.code_products` names their format. Otherwise W is
    dequantised, and again in the backward pass, so that between them only the quantised W
    is in memory.
    """
    stored = {name: leaves[name] for name in QUANTIZED_LEAVES if name in leaves}
    return _product(x, stored, compute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, leaves: dict[str, Array], compute: Compute) -> Any:
    # Without the barrier XLA may dequantise the weights of many layers beforehand.
    leaves, x = lax.optimization_barrier((leaves, x))
    if not multiplies_codes(leaves, compute):
        return matmul(x, dequantised(leaves, compute), compute)
    y = _product_of_codes(x, leaves["kernel_q"], weight_axis=0)
    return (y * leaves["kernel_scale"]).astype(compute.dtype)


def _forward(x: Array, leaves: dict[str, Array], compute: Compute) -> tuple[Array, Any]:
    # An empty array remembers the dtype of x.
    return _product(x, leaves, compute), (leaves, jnp.zeros((0,), x.dtype))


def _backward(compute: Compute, residuals: Any, gradient: Array) -> tuple[Array, None]:
    leaves, like = residuals
    # Without the barrier XLA would reuse the W of the forward pass, and so keep it.
    leaves, gradient = lax.optimization_barrier((leaves, gradient))
    if multiplies_codes(leaves, compute):
        scaled = gradient.astype(jnp.float32) * leaves["kernel_scale"]
        dx = _product_of_codes(scaled, leaves["kernel_q"], weight_axis=1)
    else:
        dx = matmul(gradient, dequantised(leaves, compute).T, compute)
    return dx.astype(like.dtype), None


_product.defvjp(_forward, _backward)


def _product_of_codes(x: Array, weight: Array, *, weight_axis: int) -> Array:
    """Returns the float32 products of x, rounded to codes, summed over an axis of W."""
    (codes,), scale = quantize_rows([x], weight.dtype)
    sums = jnp.int32 if weight.dtype == jnp.int8 else jnp.float32
    axes = (((x.ndim - 1,), (weight_axis,)), ((), ()))
    y = lax.dot_general(codes, weight, axes, preferred_element_type=sums)
    return y.astype(jnp.float32) * scale[..., None]
