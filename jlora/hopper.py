"""Matmuls for Hopper GPUs that finish several products in one pass over the output.

A layer's x W + s B is summed in the accumulators of the tensor cores: an adapter costs
one more step of the inner loop, where a second matmul would read and write the whole
output again. The same kernel sums the input gradients of layers that share their
input, and makes silu(gate) * up while both are at hand.

The scheme is the usual one of this chip: one warpgroup copies tiles into a ring of
shared-memory buffers, two multiply them, and a block of threads stays on its
multiprocessor for all its tiles. Source: CUTLASS, "Efficient GEMM in CUDA", sections
on warp specialization and persistent kernels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jlora.errors import UsageError

# Depth of one step of the inner loop: one row of the 128-byte swizzle in bfloat16.
DEPTH = 64
# What the numbers of rows and columns of an output must be multiples of.
ROWS, COLUMNS = 128, 256
# Buffers in the ring: as many as fit in shared memory beside the output's.
_STAGES = 4
# Columns and rows of the output that leave through shared memory at a time.
_PART = 64
# Registers of a thread that copies, and of one that multiplies.
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232


def choose_kernels(wanted: str, *, dtype: Any, devices: Sequence[Any]) -> str:
    """Returns the kernels that `auto` stands for on these devices: xla or hopper.

    Sizes that the kernels do not take fall to xla layer by layer, `fused.can_fuse`.

    Raises:
        UsageError: hopper is wanted where it cannot run.
    """
    capability = getattr(devices[0], "compute_capability", "")
    hopper = devices[0].platform == "gpu" and capability == "9.0"
    if wanted == "hopper" and not (hopper and dtype == jnp.bfloat16):
        raise UsageError(
            "compute.kernels=hopper needs an H100 or H200 and compute.dtype bfloat16, "
            f"and this is {devices[0].device_kind} with {jnp.dtype(dtype).name}; use "
            "auto or xla"
        )
    if wanted == "hopper" and len(devices) > 1:
        raise UsageError(
            f"compute.kernels=hopper runs on one device, and the mesh has {len(devices)};"
            " use auto or xla"
        )
    if wanted != "auto":
        return wanted
    fits = hopper and dtype == jnp.bfloat16 and len(devices) == 1
    return "hopper" if fits else "xla"


@dataclass(frozen=True)
class Schedule:
    """How the output is cut into tiles, and their order (for the L2 cache)."""

    rows: int = 128
    """Rows of a tile."""
    columns: int = 256
    """Columns of a tile."""
    split_rows: bool = True
    """The two multiplying warpgroups share a tile by rows, or else by columns."""
    minor: int = 0
    """Axis along which tiles follow each other: 0 rows, 1 columns."""
    width: int = 8
    """Tiles along the minor axis before the major one moves on."""
    delay: int = 1
    """Products still under way when the next is issued."""


# Compiled functions of their own, so that a kernel is built once for all layers.
@functools.partial(jax.jit, static_argnames=("transposed", "schedule", "interpret"))
def sum_of_products(
    xs: Sequence[Float[Array, "M _"]],
    weights: Sequence[Sequence[Array]],
    *,
    transposed: bool = False,
    schedule: Schedule = Schedule(),
    interpret: Any = None,
) -> list[Float[Array, "M _"]]:
    """Returns for every list of weights the sum of x @ w over xs, summed in float32.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 128, each K one of 64.
        weights: per output, a w [K, N] for each x ([N, K] if transposed); N is a
            multiple of 256.
        transposed: multiply by w^T instead.
        schedule: of the tiles.
        interpret: simulates the GPU where there is none, for tests.
    """
    rows = xs[0].shape[0]
    sizes = [group[0].shape[0 if transposed else 1] for group in weights]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    width = schedule.columns

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        for group, start, size in zip(groups, starts, sizes, strict=True):

            @pl.when((n >= start) & (n < start + size))
            def _(w: Any = group[term], start: int = start) -> None:
                along = pl.ds(pl.multiple_of(n - start, width), width)
                block = w.at[along, k] if transposed else w.at[k, along]
                plgpu.copy_gmem_to_smem(block, buffer.at[0], done)

    def store(
        made: list[Array], outs: Any, m: Any, n: Any, offset: Any, parts: Any
    ) -> None:
        (sums,) = made
        for out, start, size in zip(outs, starts, sizes, strict=True):

            @pl.when((n >= start) & (n < start + size))
            def _(out: Any = out, start: int = start) -> None:
                at = n - start + offset
                _store([(sums, out.at[m, pl.ds(at, sums.shape[1])])], parts)

    return _launch(
        xs,
        weights,
        outputs=[(rows, size) for size in sizes],
        grid=(rows // schedule.rows, sum(sizes) // width),
        load=load,
        store=store,
        pieces=1,
        transposed=transposed,
        schedule=schedule,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("schedule", "interpret"))
def swiglu(
    xs: Sequence[Float[Array, "M _"]],
    gate: Sequence[Float[Array, "_ F"]],
    up: Sequence[Float[Array, "_ F"]],
    *,
    schedule: Schedule = Schedule(),
    interpret: Any = None,
) -> list[Float[Array, "M F"]]:
    """Returns [gate, up, silu(gate) * up], gate and up as `sum_of_products` has them.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 128, each K one of 64.
        gate: a w [K, F] for each x; F is a multiple of 128.
        up: likewise.
        schedule: of the tiles; by rows.
        interpret: simulates the GPU where there is none, for tests.
    """
    rows, size = xs[0].shape[0], gate[0].shape[1]
    half = schedule.columns // 2

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        for i, group in enumerate(groups):
            along = pl.ds(pl.multiple_of(lax.div(n, 2), half), half)
            plgpu.copy_gmem_to_smem(group[term].at[k, along], buffer.at[i], done)

    def store(
        sums: list[Array], outs: Any, m: Any, n: Any, offset: Any, parts: Any
    ) -> None:
        at = pl.ds(pl.multiple_of(lax.div(n, 2), half), half)
        g, u = sums
        wide = g.astype(jnp.float32)
        act = wide * jax.nn.sigmoid(wide) * u.astype(jnp.float32)
        made = (g, u, act.astype(g.dtype))
        _store([(x, out.at[m, at]) for x, out in zip(made, outs, strict=True)], parts)

    return _launch(
        xs,
        [gate, up],
        outputs=[(rows, size)] * 3,
        grid=(rows // schedule.rows, size // half),
        load=load,
        store=store,
        pieces=2,
        transposed=False,
        schedule=schedule,
        interpret=interpret,
    )


def _launch(
    xs: Sequence[Array],
    weights: Sequence[Sequence[Array]],
    *,
    outputs: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    load: Callable[..., None],
    store: Callable[..., None],
    pieces: int,
    transposed: bool,
    schedule: Schedule,
    interpret: Any,
) -> list[Array]:
    """Runs the kernel: `load` copies a tile of the weights, `store` writes the sums.

    A tile's columns may come in several pieces, each with weights and sums of its own.
    """
    blocks = _multiprocessors()
    rows, columns, by_rows = schedule.rows, schedule.columns, schedule.split_rows
    depths = [x.shape[1] // DEPTH for x in xs]
    piece = columns // pieces
    mine = (rows // 2, piece) if by_rows else (rows, piece // 2)

    def body(*refs: Any) -> None:
        x_refs, refs = refs[: len(xs)], refs[len(xs) :]
        groups = [
            refs[i : i + len(xs)] for i in range(0, len(weights) * len(xs), len(xs))
        ]
        refs = refs[len(weights) * len(xs) :]
        outs, (a_ring, b_ring, parts, ready, consumed) = refs[:-5], refs[-5:]
        warpgroup = lax.axis_index("warpgroup")
        count = (math.prod(grid) - 1 - lax.axis_index("block")) // blocks + 1

        def corner(i: Any) -> tuple[Any, Any]:
            index = lax.axis_index("block") + i * blocks
            m, n = plgpu.planar_snake(index, grid, schedule.minor, schedule.width)
            return m * rows, n * columns

        def copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

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
                return step

            step = lax.fori_loop(0, count, tile, jnp.int32(0))
            for ahead in range(_STAGES):  # no phase of a barrier may stay unseen
                plgpu.barrier_wait(consumed.at[lax.rem(step + ahead, _STAGES)])

        offset = warpgroup * (mine[0] if by_rows else mine[1])
        my_rows = pl.ds(offset, mine[0]) if by_rows else slice(None)
        my_columns = slice(None) if by_rows else pl.ds(offset, mine[1])

        def product(k: Any, step: Any, accs: Any) -> Any:
            slot = lax.rem(step, _STAGES)
            plgpu.barrier_wait(ready.at[slot])
            for i, acc in enumerate(accs):
                b = b_ring.at[slot, i]
                if transposed:
                    b = plgpu.transpose_ref(b.at[my_columns], (1, 0))
                else:
                    b = b.at[:, my_columns]
                plgpu.wgmma(acc, a_ring.at[slot].at[my_rows], b)
            plgpu.wgmma_wait(schedule.delay * pieces)

            @pl.when(k >= schedule.delay)
            def _() -> None:
                free = lax.rem(step + _STAGES - schedule.delay, _STAGES)
                plgpu.barrier_arrive(consumed.at[free])

            return step + 1

        def multiply() -> None:
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(consumed.at[slot])

            def tile(i: Any, step: Any) -> Any:
                m, n = corner(i)

                def with_sums(*accs: Any) -> None:
                    def one(k: Any, step: Any) -> Any:
                        return product(k, step, accs)

                    end = lax.fori_loop(0, sum(depths), one, step)
                    sums = [acc[...].astype(xs[0].dtype) for acc in accs]
                    for behind in range(schedule.delay, 0, -1):
                        free = lax.rem(end + _STAGES - behind, _STAGES)
                        plgpu.barrier_arrive(consumed.at[free])
                    at = pl.ds(m + offset, mine[0]) if by_rows else pl.ds(m, mine[0])
                    column = 0 if by_rows else offset
                    store(sums, outs, at, n, column, parts.at[warpgroup])

                accs = [plgpu.ACC(mine, jnp.float32)] * pieces
                pl.run_scoped(with_sums, *accs)
                return step + sum(depths)

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
            plgpu.Barrier(num_arrivals=1 + pieces, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    return list(kernel(*xs, *(w for group in weights for w in group)))


def _multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)


def _store(pairs: Sequence[tuple[Array, Any]], parts: Any) -> None:
    """Copies tiles of a warpgroup to their places, through two small buffers in turn."""
    turn = 0
    for values, out in pairs:
        for m in range(0, values.shape[0], _PART):
            for n in range(0, values.shape[1], _PART):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                parts[turn] = values[m : m + _PART, n : n + _PART]
                plgpu.commit_smem()
                place = out.at[m : m + _PART, n : n + _PART]
                plgpu.copy_smem_to_gmem(parts.at[turn], place)
                turn = 1 - turn
