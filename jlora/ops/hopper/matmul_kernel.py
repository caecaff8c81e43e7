"""The matmul kernel for Hopper GPUs.

The scheme is the usual one of this chip. One warpgroup of a thread block copies tiles
into a ring of buffers in shared memory and two multiply them. A thread block stays on
its multiprocessor and computes many tiles of the output, one after another. Source:
CUTLASS, "Efficient GEMM in CUDA", sections on warp specialization and persistent
kernels. `jlora.ops.hopper.product_kernels` says which products a tile sums, and what is
done with the sums before they are stored.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jlora.ops.hopper import mosaic_gpu as plgpu
from jlora.ops.hopper.kernel_parts import (
    COPY_REGISTERS,
    MULTIPLY_REGISTERS,
    build_kernel,
    depth_of,
    from_global,
    multiprocessors,
    shared_tiles,
    transposed_view,
)
from jlora.ops.hopper.operands import Operands

# The tile of the output that two thread blocks compute together, half of the rows each.
# Both need the same weights, which are sent to both. Outputs are multiples of the tile.
ROWS, COLUMNS = 256, 256
# Tiles below each other before the next column of tiles: the 132 multiprocessors then
# work on a square of the output, which reads the least.
_BAND = 8
# Buffers in the ring: as many as fit in shared memory beside those of the output.
_STAGES = 4
# Rows and columns of the output that leave through shared memory at a time.
_PART = 64

# For 64 columns of a tile at a time: the columns, and a warpgroup's rows of the extra
# arrays as float32.
Extras = Iterator[tuple[slice, list[Array]]]


def launch_matmul(
    operands: Operands,
    *,
    outputs: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    load: Callable[..., None],
    store: Callable[..., None],
    extras: Sequence[Array] = (),
    sums_per_tile: int = 1,
    interpret: Any,
) -> list[Array]:
    """Sums products x @ w tile by tile and lets `store` turn the sums into outputs.

    A thread block does this for every tile it computes; a slot is a buffer of the ring:

        copying warpgroup                     two multiplying warpgroups, 64 rows each
        for each 64 columns of each x:        for each 64 columns of each x:
          wait for consumed[slot]               wait for ready[slot]
          copy x and load w to the slot         sums += x in the slot @ w in the slot
            (both signal ready[slot])           signal consumed[the slot before]
        for each 64 columns of the extras:    store: for each 64 columns of the extras:
          wait for consumed[slot]               wait for arrived[slot]
          copy the extras to the slot           combine sums and extras, copy out
            (signals arrived[slot])             signal consumed[slot]

    Args:
        operands: of each output, or each sum of a tile.
        outputs: shapes of the outputs.
        grid: number of tiles of 256 rows, and of 256 columns.
        load: called with (weights, index of x, first column, depth, buffer, barrier).
        store: called with (sums of a warpgroup, `Extras`, outputs, rows, columns,
            buffers); calls `store_tiles`.
        extras: one array, or two where the weights are transposed, of which `store`
            gets the tile.
        sums_per_tile: a tile's columns are split evenly among so many sums, each with
            weights of its own.
        interpret: simulates the GPU on a CPU, for tests.
    """
    xs, weights, scales = operands.xs, operands.weights, operands.scales
    transposed = operands.transposed
    blocks = multiprocessors() // 2
    rows = ROWS // 2  # of a thread block
    steps = [x.shape[1] // depth_of(x.dtype) for x in xs]
    dtypes = list(dict.fromkeys([*(x.dtype for x in xs), *(y.dtype for y in extras)]))
    width = COLUMNS // sums_per_tile
    mine = rows // 2  # rows of a warpgroup
    extra_columns = range(0, COLUMNS if extras else 0, _PART)
    # Neighbouring terms of one dtype are one loop.
    merged_steps = [
        (dtype, sum(count for _, count in group))
        for dtype, group in itertools.groupby(
            zip((x.dtype for x in xs), steps, strict=True), key=lambda pair: pair[0]
        )
    ]
    factors = [] if scales is None else [scales.rows, *scales.columns]
    if scales and sums_per_tile == 1 and scales.columns:
        factors = [scales.rows, jnp.concatenate(scales.columns)]

    def body(*refs: Any) -> None:
        x_refs, refs = refs[: len(xs)], refs[len(xs) :]
        groups = [
            refs[i : i + len(xs)] for i in range(0, len(weights) * len(xs), len(xs))
        ]
        refs, (rings, parts, arrived, ready, consumed) = refs[:-5], refs[-5:]
        refs = refs[len(weights) * len(xs) :]
        extra_refs, refs = refs[: len(extras)], refs[len(extras) :]
        scale_refs, outs = refs[: len(factors)], refs[len(factors) :]
        ring_of = dict(zip(dtypes, rings if len(dtypes) > 1 else [rings], strict=True))
        warpgroup = lax.axis_index("warpgroup")
        count = (math.prod(grid) - 1 - lax.axis_index("block")) // blocks + 1

        def corner(i: Any) -> tuple[Any, Any]:
            """Returns the first row and column of the i-th tile of this block."""
            index = lax.axis_index("block") + i * blocks
            m, n = plgpu.planar_snake(index, grid, 0, _BAND)
            return m * ROWS + lax.axis_index("member") * rows, n * COLUMNS

        def extra_buffer(slot: Any, i: int) -> Any:
            a_ring, b_ring = ring_of[extras[0].dtype]
            return b_ring.at[slot, 0, pl.ds(0, rows)] if i else a_ring.at[slot]

        def copy() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def tile(i: Any, step: Any) -> Any:
                m, n = corner(i)
                for term, number in enumerate(steps):

                    def fetch(k: Any, step: Any, term: int = term) -> Any:
                        slot = lax.rem(step, _STAGES)
                        a_ring, b_ring = ring_of[xs[term].dtype]
                        depth = depth_of(xs[term].dtype)
                        along = pl.ds(k * depth, depth)
                        plgpu.barrier_wait(consumed.at[slot])
                        plgpu.copy_gmem_to_smem(
                            x_refs[term].at[pl.ds(m, rows), along],
                            a_ring.at[slot],
                            ready.at[slot],
                        )
                        load(groups, term, n, along, b_ring.at[slot], ready.at[slot])
                        return step + 1

                    step = lax.fori_loop(0, number, fetch, step)
                for first in extra_columns:
                    slot = lax.rem(step, _STAGES)
                    plgpu.barrier_wait(consumed.at[slot])
                    for i, ref in enumerate(extra_refs):
                        tile = ref.at[pl.ds(m, rows), pl.ds(n + first, _PART)]
                        plgpu.copy_gmem_to_smem(
                            tile, extra_buffer(slot, i), arrived.at[slot]
                        )
                    step += 1
                return step

            step = lax.fori_loop(0, count, tile, jnp.int32(0))
            for ahead in range(_STAGES):  # every phase of a barrier must be waited for
                plgpu.barrier_wait(consumed.at[lax.rem(step + ahead, _STAGES)])

        offset = warpgroup * mine

        def scaled(sums: Any, m: Any, n: Any) -> list[Array]:
            """Returns sums of products of codes as float32 sums of what they stand for."""
            of_rows = from_global(scale_refs[0], m)
            start = lax.div(n.start, sums_per_tile)
            found = []
            for i, acc in enumerate(sums):
                wide = acc.astype(jnp.float32)
                wide *= lax.broadcast_in_dim(of_rows, acc.shape, (0,))
                if len(scale_refs) > 1:
                    of_columns = from_global(scale_refs[1 + i], pl.ds(start, width))
                    wide *= lax.broadcast_in_dim(of_columns, acc.shape, (1,))
                found.append(wide)
            return found

        def product(is_first: Any, step: Any, sums: Any, ring: Any) -> Any:
            slot = lax.rem(step, _STAGES)
            a_ring, b_ring = ring
            plgpu.barrier_wait(ready.at[slot])
            for i, acc in enumerate(sums):
                b = b_ring.at[slot, i]
                b = transposed_view(b) if transposed else b
                plgpu.wgmma(acc, a_ring.at[slot].at[pl.ds(offset, mine)], b)
            # All products but these are done, so the slot of the step before is free.
            plgpu.wgmma_wait(sums_per_tile)

            @pl.when(jnp.logical_not(is_first))
            def _() -> None:
                plgpu.barrier_arrive(consumed.at[lax.rem(step + _STAGES - 1, _STAGES)])

            return step + 1

        def multiply() -> None:
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(consumed.at[slot])

            buffers = [parts.at[warpgroup, i] for i in (0, 1)]

            def own_extras(step: Any) -> Extras:
                for i, first in enumerate(extra_columns):
                    slot = lax.rem(step + i, _STAGES)
                    plgpu.barrier_wait(arrived.at[slot])
                    tiles = [
                        extra_buffer(slot, j)[pl.ds(offset, mine)]
                        for j in range(len(extras))
                    ]
                    columns = slice(first, first + _PART)
                    yield columns, [tile.astype(jnp.float32) for tile in tiles]
                    # All threads have read them: they met in `store_tiles` since then.
                    plgpu.barrier_arrive(consumed.at[slot])

            def tile(i: Any, step: Any) -> Any:
                m, n = corner(i)
                place = pl.ds(m + offset, mine), pl.ds(n, COLUMNS)

                def add_products(dtype: Any, number: int, at: Any, sums: Any) -> Any:
                    def add_to(accs: Any) -> None:
                        def one(_: Any, at: Any) -> Any:
                            return product(at == step, at, accs, ring_of[dtype])

                        lax.fori_loop(0, number, one, at)

                    def from_zero(*accs: Any) -> list[Array]:
                        add_to(accs)
                        return [acc[...] for acc in accs]

                    # The simulation has no accumulators that begin with a value.
                    if sums and not interpret:
                        return pl.run_state(add_to)([plgpu.ACC.init(x) for x in sums])
                    zero = plgpu.ACC((mine, width), _sum_dtype(dtype))
                    made = pl.run_scoped(from_zero, *[zero] * sums_per_tile)
                    return (
                        [a + b for a, b in zip(sums, made, strict=True)]
                        if sums
                        else made
                    )

                end, sums = step, []
                for dtype, number in merged_steps:
                    sums = add_products(dtype, number, end, sums)
                    if dtype.itemsize == 1:
                        sums = scaled(sums, *place)
                    end += number
                last = lax.rem(end + _STAGES - 1, _STAGES)
                plgpu.barrier_arrive(consumed.at[last])
                store(sums, own_extras(end), outs, *place, buffers)
                return step + sum(steps) + len(extra_columns)

            lax.fori_loop(0, count, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(warpgroup == 2, copy, multiply)

    rings = [_ring(dtype, rows, sums_per_tile, transposed) for dtype in dtypes]
    kernel = build_kernel(
        body,
        [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in outputs],
        [
            rings[0] if len(rings) == 1 else plgpu.RefUnion(*rings),
            shared_tiles(2, 2, _PART, _PART),
            plgpu.Barrier(num_arrivals=len(extras) or 1, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=1 + sums_per_tile, num_barriers=_STAGES),
            plgpu.ClusterBarrier(
                collective_axes=("member",), num_arrivals=2, num_barriers=_STAGES
            ),
        ],
        grid={"block": blocks},
        cluster={"member": 2},
        warpgroups=3,
        approx_math=True,
        interpret=interpret,
    )
    flat = (w for group in weights for w in group)
    return list(kernel(*xs, *flat, *extras, *factors))


def _sum_dtype(dtype: Any) -> Any:
    return jnp.int32 if dtype == jnp.int8 else jnp.float32


def _ring(dtype: Any, rows: int, sums_per_tile: int, transposed: bool) -> list[Any]:
    """Returns the buffers of x and of the weights."""
    depth, width = depth_of(dtype), COLUMNS // sums_per_tile
    tile = (width, depth) if transposed else (depth, width)
    return [
        shared_tiles(_STAGES, rows, depth, dtype=dtype),
        shared_tiles(_STAGES, sums_per_tile, *tile, dtype=dtype),
    ]


def copy_to_both_blocks(tile: Any, buffer: Any, done: Any) -> None:
    """Copies a tile of the weights to the two blocks that need it; each reads one half."""
    plgpu.copy_gmem_to_smem(tile, buffer, done, collective_axes="member")


def store_tiles(pairs: Iterable[tuple[Array, Any]], buffers: Any) -> None:
    """Copies a warpgroup's (values, place in the output), through two buffers in turn."""
    turn = 0
    for values, out in pairs:
        for m in range(0, values.shape[0], _PART):
            for n in range(0, values.shape[1], _PART):
                part = slice(m, m + _PART), slice(n, n + _PART)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                buffers[turn][...] = values[part]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffers[turn], out.at[part])
                turn = 1 - turn
