"""Kernels for Hopper GPUs that finish several matrix products in one pass over the output.

The accumulators of the tensor cores sum x W + s B of a layer. An adapter then costs one
more step of the inner loop, where a second matmul would read and write the whole output
again. All of them are `matmul_kernel` with their own loading of weights and their own
last step before a tile is stored.
"""

import functools
from collections.abc import Iterator, Sequence
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


# Each function is compiled once and shared by all layers.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def sum_of_products(
    xs: Sequence[Float[Array, "M _"]],
    weights: Sequence[Sequence[Array]],
    addend: Float[Array, "M N"] | None = None,
    *,
    transposed: bool = False,
    interpret: Any = None,
) -> list[Float[Array, "M _"]]:
    """Returns for every list of weights the sum of x @ w over xs, summed in float32.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 256, each K one of 64.
        weights: for each output, a w [K, N] for each x ([N, K] if transposed); N is a
            multiple of 256.
        addend: is added to the sum; only with a single output.
        transposed: multiply by w^T instead.
        interpret: simulates the GPU on a CPU, for tests.
    """
    rows = xs[0].shape[0]
    sizes = [group[0].shape[0 if transposed else 1] for group in weights]
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
        xs,
        weights,
        outputs=[(rows, size) for size in sizes],
        grid=(rows // ROWS, sum(sizes) // COLUMNS),
        load=load,
        store=store,
        extras=[] if addend is None else [addend],
        transposed=transposed,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("interpret",))
def swiglu_forward(
    xs: Sequence[Float[Array, "M _"]],
    gate: Sequence[Float[Array, "_ F"]],
    up: Sequence[Float[Array, "_ F"]],
    *,
    interpret: Any = None,
) -> list[Float[Array, "M F"]]:
    """Returns [gate, up, silu(gate) * up] of x, gate and up summed as `sum_of_products`.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 256, each K one of 64.
        gate: a w [K, F] for each x; F is a multiple of 128.
        up: likewise.
        interpret: simulates the GPU on a CPU, for tests.
    """
    rows, size = xs[0].shape[0], gate[0].shape[1]
    half = COLUMNS // 2

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        for i, group in enumerate(groups):
            along = pl.ds(pl.multiple_of(lax.div(n, 2), half), half)
            copy_to_both_blocks(group[term].at[k, along], buffer.at[i], done)

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
        xs,
        [gate, up],
        outputs=[(rows, size)] * 3,
        grid=(rows // ROWS, size // half),
        load=load,
        store=store,
        sums_per_tile=2,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("interpret",))
def swiglu_gradients(
    xs: Sequence[Float[Array, "M _"]],
    weights: Sequence[Float[Array, "F _"]],
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    *,
    interpret: Any = None,
) -> list[Float[Array, "M F"]]:
    """Returns the gradients of gate and up, given that of act = silu(gate) * up.

    The gradient of act is the sum of x @ w^T over xs; it stays in float32.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 256, each K one of 64.
        weights: a w [F, K] for each x; F is a multiple of 256.
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
        xs,
        [weights],
        outputs=[(rows, size)] * 2,
        grid=(rows // ROWS, size // COLUMNS),
        load=load,
        store=store,
        extras=[gate, up],
        transposed=True,
        interpret=interpret,
    )


def swiglu_gradients_of_tile(
    d_act: Array, gate: Array, up: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of gate and up, and silu(gate) * up, of float32 tiles."""
    share = 1 / (1 + jnp.exp(-gate))
    silu = gate * share
    return d_act * up * share * (1 + gate - silu), d_act * silu, silu * up
