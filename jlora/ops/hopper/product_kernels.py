"""Kernels for Hopper GPUs that finish several matrix products in one pass over the output.

The accumulators of the tensor cores sum x W + s B of a layer. An adapter then costs one
more step of the inner loop, where a second matmul would read and write the whole output
again. All of them are `matmul_kernel` with their own loading of weights and their own
last step before a tile is stored.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jlora.ops.hopper.matmul_kernel import (
    COLUMNS,
    ROWS,
    Extras,
    copy_to_both_blocks,
    launch_matmul,
    store_tiles,
)
from jlora.ops.hopper.operands import Operands


# Each function is compiled once and shared by all layers.
@functools.partial(jax.jit, static_argnames=("interpret",))
def sum_of_products(
    operands: Operands,
    addend: Float[Array, "M N"] | None = None,
    *,
    interpret: Any = None,
) -> list[Float[Array, "M _"]]:
    """Returns the sum of every output of `operands`, summed in float32, as bfloat16.

    Args:
        operands: M and N are multiples of 256, K one of 64, and of 128 for codes.
        addend: is added to the sum; only with a single output.
        interpret: simulates the GPU on a CPU, for tests.
    """
    weights, transposed = operands.weights, operands.transposed
    rows = operands.xs[0].shape[0]
    sizes = [_columns(operands, i) for i in range(len(weights))]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        for group, start, size in zip(groups, starts, sizes, strict=True):

            @pl.when((n >= start) & (n < start + size))
            def _(w: Any = group[term], start: int = start) -> None:
                along = pl.ds(pl.multiple_of(n - start, COLUMNS), COLUMNS)
                tile = w.at[along, k] if transposed else w.at[k, along]
                copy_to_both_blocks(tile, buffer.at[0], done)

    def store(
        made: list[Array], extras: Extras, outs: Any, m: Any, n: Any, buffers: Any
    ) -> None:
        (sums,) = made
        if addend is not None:
            out = outs[0].at[m, n]
            totals = ((at, sums[:, at] + own) for at, (own,) in extras)
            store_tiles(
                ((x.astype(out.dtype), out.at[:, at]) for at, x in totals), buffers
            )
            return
        for out, start, size in zip(outs, starts, sizes, strict=True):

            @pl.when((n.start >= start) & (n.start < start + size))
            def _(out: Any = out, start: int = start) -> None:
                place = out.at[m, pl.ds(n.start - start, n.size)]
                store_tiles([(sums.astype(out.dtype), place)], buffers)

    return launch_matmul(
        operands,
        outputs=[(rows, size) for size in sizes],
        grid=(rows // ROWS, sum(sizes) // COLUMNS),
        load=load,
        store=store,
        extras=[] if addend is None else [addend],
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("interpret",))
def swiglu_forward(
    operands: Operands, *, interpret: Any = None
) -> list[Float[Array, "M F"]]:
    """Returns [gate, up, silu(gate) * up], where gate and up are the sums of `operands`.

    Args:
        operands: as `sum_of_products` takes them, but N of one output is a multiple of 128.
        interpret: simulates the GPU on a CPU, for tests.
    """
    transposed = operands.transposed
    rows, size = operands.xs[0].shape[0], _columns(operands, 0)
    half = COLUMNS // 2

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        for i, group in enumerate(groups):
            along = pl.ds(pl.multiple_of(lax.div(n, 2), half), half)
            w = group[term]
            tile = w.at[along, k] if transposed else w.at[k, along]
            copy_to_both_blocks(tile, buffer.at[i], done)

    def store(
        sums: list[Array], _: Extras, outs: Any, m: Any, n: Any, buffers: Any
    ) -> None:
        at = pl.ds(pl.multiple_of(lax.div(n.start, 2), half), half)
        g, u = (x.astype(outs[0].dtype) for x in sums)
        wide = g.astype(jnp.float32)
        act = wide * jax.nn.sigmoid(wide) * u.astype(jnp.float32)
        made = (g, u, act.astype(g.dtype))
        places = [out.at[m, at] for out in outs]
        store_tiles(list(zip(made, places, strict=True)), buffers)

    return launch_matmul(
        operands,
        outputs=[(rows, size)] * 3,
        grid=(rows // ROWS, size // half),
        load=load,
        store=store,
        sums_per_tile=2,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("interpret",))
def swiglu_gradients(
    operands: Operands,
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    *,
    interpret: Any = None,
) -> list[Float[Array, "M F"]]:
    """Returns the gradients of gate and up, given that of act = silu(gate) * up.

    The gradient of act is the sum of the products; it stays in float32.

    Args:
        operands: as `sum_of_products` takes them, transposed, with one output.
        gate: bfloat16, as `swiglu_forward` returned it.
        up: likewise.
        interpret: simulates the GPU on a CPU, for tests.
    """
    rows, size = gate.shape

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        along = pl.ds(pl.multiple_of(n, COLUMNS), COLUMNS)
        copy_to_both_blocks(groups[0][term].at[along, k], buffer.at[0], done)

    def store(
        sums: list[Array], extras: Extras, outs: Any, m: Any, n: Any, buffers: Any
    ) -> None:
        def pairs() -> Iterator[tuple[Array, Any]]:
            for at, (g, u) in extras:
                *made, _ = swiglu_gradients_of_tile(sums[0][:, at], g, u)
                for values, out in zip(made, outs, strict=True):
                    yield values.astype(out.dtype), out.at[m, n].at[:, at]

        store_tiles(pairs(), buffers)

    return launch_matmul(
        operands,
        outputs=[(rows, size)] * 2,
        grid=(rows // ROWS, size // COLUMNS),
        load=load,
        store=store,
        extras=[gate, up],
        interpret=interpret,
    )


def swiglu_gradients_of_tile(
    d_act: Array, gate: Array, up: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of gate and up, and silu(gate) * up, of float32 tiles."""
    share = 1 / (1 + jnp.exp(-gate))
    silu = gate * share
    return d_act * up * share * (1 + gate - silu), d_act * silu, silu * up


def _columns(operands: Operands, i: int) -> int:
    """Returns the number of columns of an output."""
    return operands.weights[i][0].shape[0 if operands.transposed else 1]
