"""The matmul kernel for Hopper GPUs, and what other kernels for them share with it.

The scheme is the usual one of this chip: one warpgroup copies tiles into a ring of
shared-memory buffers, two multiply them, and a block of threads stays on its
multiprocessor for all its tiles. Source: CUTLASS, "Efficient GEMM in CUDA", sections
on warp specialization and persistent kernels. Which tiles are summed, and what is made
of a sum before it is stored, is up to `jlora.ops.hopper.product_kernels`.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# Depth of one step of the inner loop: one row of the 128-byte swizzle in bfloat16.
DEPTH = 64
# What two blocks of threads make at a time: each half of the rows. They read the same
# tile of the weights, which is sent to both. An output is a multiple of it.
ROWS, COLUMNS = 256, 256
# Tiles under each other before the next column of tiles: 132 multiprocessors then work
# on a square of the output, which reads the least.
_BAND = 8
# Buffers in the ring: as many as fit in shared memory beside the output's.
_STAGES = 4
# Columns and rows of the output that leave through shared memory at a time.
_PART = 64
# Registers of a thread that copies, and of one that multiplies.
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232

# For the columns of a tile that come at a time: a warpgroup's rows of other arrays, float32.
Parts = Iterator[tuple[slice, list[Array]]]


def transposed_view(ref: Any) -> Any:
    """Returns the view of a tile with its axes exchanged."""
    with warnings.catch_warnings():
        # jax 0.12 prefers a method that 0.10 does not have.
        warnings.simplefilter("ignore", DeprecationWarning)
        return plgpu.transpose_ref(ref, (1, 0))


def launch(
    xs: Sequence[Array],
    weights: Sequence[Sequence[Array]],
    *,
    outputs: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    load: Callable[..., None],
    store: Callable[..., None],
    more: Sequence[Array],
    pieces: int,
    transposed: bool,
    interpret: Any,
) -> list[Array]:
    """Runs the kernel: `load` copies a tile of the weights, `store` writes the sums.

    A tile's columns may come in several pieces, each with weights and sums of its own.

    Args:
        xs: bfloat16 [M, K].
        weights: for every output or piece a w for each x.
        outputs: their shapes.
        grid: tiles of 256 rows and of 256 columns.
        load: (groups of weights, index of x, first column, depth, buffer, barrier).
        store: (sums of a warpgroup, `Parts` of more, outputs, rows, columns, buffers);
            calls `store_tiles`.
        more: an array, or two where the weights are transposed, of which `store` gets
            the tile: it comes through the ring, behind the tile's last product.
        pieces: of a tile's columns.
        transposed: multiply by w^T.
        interpret: simulates the GPU where there is none, for tests.
    """
    blocks = multiprocessors() // 2
    rows = ROWS // 2
    depths = [x.shape[1] // DEPTH for x in xs]
    piece = COLUMNS // pieces
    mine = rows // 2  # rows of a warpgroup
    parts_of_more = range(0, COLUMNS if more else 0, _PART)

    def body(*refs: Any) -> None:
        x_refs, refs = refs[: len(xs)], refs[len(xs) :]
        groups = [
            refs[i : i + len(xs)] for i in range(0, len(weights) * len(xs), len(xs))
        ]
        refs, (a_ring, b_ring, parts, arrived, ready, consumed) = refs[:-6], refs[-6:]
        refs = refs[len(weights) * len(xs) :]
        more_refs, outs = refs[: len(more)], refs[len(more) :]
        warpgroup = lax.axis_index("warpgroup")
        count = (math.prod(grid) - 1 - lax.axis_index("block")) // blocks + 1

        def corner(i: Any) -> tuple[Any, Any]:
            index = lax.axis_index("block") + i * blocks
            m, n = plgpu.planar_snake(index, grid, 0, _BAND)
            return m * ROWS + lax.axis_index("member") * rows, n * COLUMNS

        def place_of_more(slot: Any, i: int) -> Any:
            return b_ring.at[slot, 0, pl.ds(0, rows)] if i else a_ring.at[slot]

        def copy() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def tile(i: Any, step: Any) -> Any:
                m, n = corner(i)
                for term, depth in enumerate(depths):

                    def fetch(k: Any, step: Any, term: int = term) -> Any:
                        slot = lax.rem(step, _STAGES)
                        along = pl.ds(k * DEPTH, DEPTH)
                        plgpu.barrier_wait(consumed.at[slot])
                        plgpu.copy_gmem_to_smem(
                            x_refs[term].at[pl.ds(m, rows), along],
                            a_ring.at[slot],
                            ready.at[slot],
                        )
                        load(groups, term, n, along, b_ring.at[slot], ready.at[slot])
                        return step + 1

                    step = lax.fori_loop(0, depth, fetch, step)
                for part in parts_of_more:
                    slot = lax.rem(step, _STAGES)
                    plgpu.barrier_wait(consumed.at[slot])
                    for i, ref in enumerate(more_refs):
                        tile = ref.at[pl.ds(m, rows), pl.ds(n + part, _PART)]
                        plgpu.copy_gmem_to_smem(
                            tile, place_of_more(slot, i), arrived.at[slot]
                        )
                    step += 1
                return step

            step = lax.fori_loop(0, count, tile, jnp.int32(0))
            for ahead in range(_STAGES):  # no phase of a barrier may stay unseen
                plgpu.barrier_wait(consumed.at[lax.rem(step + ahead, _STAGES)])

        offset = warpgroup * mine

        def product(k: Any, step: Any, accs: Any) -> Any:
            slot = lax.rem(step, _STAGES)
            plgpu.barrier_wait(ready.at[slot])
            for i, acc in enumerate(accs):
                b = b_ring.at[slot, i]
                b = transposed_view(b) if transposed else b
                plgpu.wgmma(acc, a_ring.at[slot].at[pl.ds(offset, mine)], b)
            plgpu.wgmma_wait(pieces)  # all but these, so the step before is done

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(consumed.at[lax.rem(step + _STAGES - 1, _STAGES)])

            return step + 1

        def multiply() -> None:
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(consumed.at[slot])

            buffers = [parts.at[warpgroup, i] for i in (0, 1)]

            def own_parts(step: Any) -> Parts:
                for i, part in enumerate(parts_of_more):
                    slot = lax.rem(step + i, _STAGES)
                    plgpu.barrier_wait(arrived.at[slot])
                    tiles = [
                        place_of_more(slot, j)[pl.ds(offset, mine)]
                        for j in range(len(more))
                    ]
                    at = slice(part, part + _PART)
                    yield at, [tile.astype(jnp.float32) for tile in tiles]
                    # All threads have read them: they met in `store_tiles` since then.
                    plgpu.barrier_arrive(consumed.at[slot])

            def tile(i: Any, step: Any) -> Any:
                m, n = corner(i)
                at = pl.ds(m + offset, mine), pl.ds(n, COLUMNS)

                def with_sums(*accs: Any) -> None:
                    def one(k: Any, step: Any) -> Any:
                        return product(k, step, accs)

                    end = lax.fori_loop(0, sum(depths), one, step)
                    sums = [acc[...] for acc in accs]
                    last = lax.rem(end + _STAGES - 1, _STAGES)
                    plgpu.barrier_arrive(consumed.at[last])
                    store(sums, own_parts(end), outs, *at, buffers)

                accs = [plgpu.ACC((mine, piece), jnp.float32)] * pieces
                pl.run_scoped(with_sums, *accs)
                return step + sum(depths) + len(parts_of_more)

            lax.fori_loop(0, count, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(warpgroup == 2, copy, multiply)

    dtype = xs[0].dtype
    b_shape = (piece, DEPTH) if transposed else (DEPTH, piece)
    shared = functools.partial(
        plgpu.SMEM,
        dtype=dtype,
        transforms=(plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128)),
    )
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in outputs],
        scratch_types=[
            shared((_STAGES, rows, DEPTH)),
            shared((_STAGES, pieces, *b_shape)),
            shared((2, 2, _PART, _PART)),
            plgpu.Barrier(num_arrivals=len(more) or 1, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=1 + pieces, num_barriers=_STAGES),
            plgpu.ClusterBarrier(
                collective_axes=("member",), num_arrivals=2, num_barriers=_STAGES
            ),
        ],
        grid=(blocks,),
        grid_names=("block",),
        cluster=(2,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
    )
    return list(kernel(*xs, *(w for group in weights for w in group), *more))


def copy_to_both(tile: Any, buffer: Any, done: Any) -> None:
    """Copies a tile of the weights, a half by each of the two blocks that need it."""
    plgpu.copy_gmem_to_smem(tile, buffer, done, collective_axes="member")


def multiprocessors() -> int:
    """Returns how many blocks of threads run at a time."""
    return getattr(jax.devices()[0], "core_count", 132)


def _parts(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    return [
        (slice(m, m + _PART), slice(n, n + _PART))
        for m in range(0, shape[0], _PART)
        for n in range(0, shape[1], _PART)
    ]


def store_tiles(pairs: Iterable[tuple[Array, Any]], buffers: Any) -> None:
    """Copies tiles of a warpgroup to their places, through two small buffers in turn."""
    turn = 0
    for values, out in pairs:
        for part in _parts(values.shape):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            buffers[turn][...] = values[part]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers[turn], out.at[part])
            turn = 1 - turn
