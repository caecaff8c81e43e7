"""Rounds activations to codes of 8 bits with a scale for each row, reading them once.

XLA needs two kernels for it, one for the largest value of each row and one for the codes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jlora.ops.hopper.kernel_parts import build_kernel, multiprocessors
from jlora.ops.quantize import largest_code
from jlora.ops.quantized_matmul import SMALLEST_PEAK

# Thread blocks of a multiprocessor: enough rows on their way from memory.
_BLOCKS = 8


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def quantize_rows(
    arrays: Sequence[Float[Array, "M _"]],
    dtype: Any,
    factors: Sequence[Array] = (),
    *,
    interpret: Any = None,
) -> tuple[list[Array], Array]:
    """Returns what `jlora.ops.quantized_matmul.quantize_rows` does.

    Args:
        arrays: bfloat16 [M, K]; each K is a multiple of 256.
        dtype: of the codes.
        factors: float32 [K] of each array, by which its columns are multiplied; or none.
        interpret: simulates the GPU on a CPU, for tests.
    """
    rows = arrays[0].shape[0]
    blocks = min(rows, multiprocessors() * _BLOCKS)
    largest = largest_code(dtype)

    def body(*refs: Any) -> None:
        x_refs, refs = refs[: len(arrays)], refs[len(arrays) :]
        factor_refs, refs = refs[: len(factors)], refs[len(factors) :]
        code_refs, scale_ref = refs[: len(arrays)], refs[len(arrays)]

        def wide(i: int, row: Any) -> Array:
            x = x_refs[i][row].astype(jnp.float32)
            return x * factor_refs[i][...] if factors else x

        def one(i: Any, _: Any) -> Any:
            row = lax.axis_index("block") + i * blocks
            peak = jnp.float32(SMALLEST_PEAK)
            for j in range(len(arrays)):
                peak = jnp.maximum(peak, jnp.max(jnp.abs(wide(j, row))))
            for j, ref in enumerate(code_refs):
                codes = wide(j, row) * (largest / peak)
                codes = jnp.round(codes) if dtype == jnp.int8 else codes
                ref[row] = codes.astype(dtype)
            scale_ref[row] = peak / largest
            return 0

        count = (rows - 1 - lax.axis_index("block")) // blocks + 1
        lax.fori_loop(0, count, one, 0)

    kernel = build_kernel(
        body,
        [
            *(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        [],
        grid={"block": blocks},
        warpgroups=1,
        interpret=interpret,
    )
    *codes, scale = kernel(*arrays, *factors)
    return codes, scale
