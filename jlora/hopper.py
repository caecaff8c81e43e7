"""Matmuls for Hopper GPUs that finish several products in one pass over the output.

A layer's x W + s B is summed in the accumulators of the tensor cores: an adapter costs
one more step of the inner loop, where a second matmul would read and write the whole
output again. The same kernel sums the input gradients of layers that share their
input, makes silu(gate) * up while both are at hand, and its gradients from the sum for it.

The scheme is the usual one of this chip: one warpgroup copies tiles into a ring of
shared-memory buffers, two multiply them, and a block of threads stays on its
multiprocessor for all its tiles. Source: CUTLASS, "Efficient GEMM in CUDA", sections
on warp specialization and persistent kernels. The file is long because its three products
share one such kernel.
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
from jaxtyping import Array, Float

from jlora.errors import UsageError

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


def transposed_view(ref: Any) -> Any:
    """Returns the view of a tile with its axes exchanged."""
    with warnings.catch_warnings():
        # jax 0.12 prefers a method that 0.10 does not have.
        warnings.simplefilter("ignore", DeprecationWarning)
        return plgpu.transpose_ref(ref, (1, 0))


# Compiled functions of their own, so that a kernel is built once for all layers.
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
        weights: per output, a w [K, N] for each x ([N, K] if transposed); N is a
            multiple of 256.
        addend: is added to the sum, where there is one output.
        transposed: multiply by w^T instead.
        interpret: simulates the GPU where there is none, for tests.
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
                _copy_to_both(tile, buffer.at[0], done)

    def store(
        made: list[Array], more: Parts, outs: Any, m: Any, n: Any, buffers: Any
    ) -> None:
        (sums,) = made
        if addend is not None:
            out = outs[0].at[m, n]
            totals = ((at, sums[:, at] + own) for at, (own,) in more)
            _store(((x.astype(out.dtype), out.at[:, at]) for at, x in totals), buffers)
            return
        for out, start, size in zip(outs, starts, sizes, strict=True):

            @pl.when((n.start >= start) & (n.start < start + size))
            def _(out: Any = out, start: int = start) -> None:
                place = out.at[m, pl.ds(n.start - start, n.size)]
                _store([(sums.astype(out.dtype), place)], buffers)

    return _launch(
        xs,
        weights,
        outputs=[(rows, size) for size in sizes],
        grid=(rows // ROWS, sum(sizes) // COLUMNS),
        load=load,
        store=store,
        more=[] if addend is None else [addend],
        pieces=1,
        transposed=transposed,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("interpret",))
def swiglu(
    xs: Sequence[Float[Array, "M _"]],
    gate: Sequence[Float[Array, "_ F"]],
    up: Sequence[Float[Array, "_ F"]],
    *,
    interpret: Any = None,
) -> list[Float[Array, "M F"]]:
    """Returns [gate, up, silu(gate) * up], gate and up as `sum_of_products` has them.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 256, each K one of 64.
        gate: a w [K, F] for each x; F is a multiple of 128.
        up: likewise.
        interpret: simulates the GPU where there is none, for tests.
    """
    rows, size = xs[0].shape[0], gate[0].shape[1]
    half = COLUMNS // 2

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        for i, group in enumerate(groups):
            along = pl.ds(pl.multiple_of(lax.div(n, 2), half), half)
            _copy_to_both(group[term].at[k, along], buffer.at[i], done)

    def store(
        sums: list[Array], _: Parts, outs: Any, m: Any, n: Any, buffers: Any
    ) -> None:
        at = pl.ds(pl.multiple_of(lax.div(n.start, 2), half), half)
        g, u = (x.astype(outs[0].dtype) for x in sums)
        wide = g.astype(jnp.float32)
        act = wide * jax.nn.sigmoid(wide) * u.astype(jnp.float32)
        made = (g, u, act.astype(g.dtype))
        places = [out.at[m, at] for out in outs]
        _store(list(zip(made, places, strict=True)), buffers)

    return _launch(
        xs,
        [gate, up],
        outputs=[(rows, size)] * 3,
        grid=(rows // ROWS, size // half),
        load=load,
        store=store,
        more=[],
        pieces=2,
        transposed=False,
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
    """Returns the gradients of gate and up, where that of silu(gate) * up is x @ w^T.

    The latter, summed over xs in float32, is not rounded in between.

    Args:
        xs: bfloat16 [M, K]; M is a multiple of 256, each K one of 64.
        weights: a w [F, K] for each x; F is a multiple of 256.
        gate: bfloat16, as `swiglu` returned it.
        up: likewise.
        interpret: simulates the GPU where there is none, for tests.
    """
    rows, size = gate.shape

    def load(groups: Any, term: int, n: Any, k: Any, buffer: Any, done: Any) -> None:
        tile = groups[0][term].at[pl.ds(pl.multiple_of(n, COLUMNS), COLUMNS), k]
        _copy_to_both(tile, buffer.at[0], done)

    def store(
        sums: list[Array], more: Parts, outs: Any, m: Any, n: Any, buffers: Any
    ) -> None:
        def pairs() -> Iterator[tuple[Array, Any]]:
            for at, (g, u) in more:
                *made, _ = through_swiglu(sums[0][:, at], g, u)
                for values, out in zip(made, outs, strict=True):
                    yield values.astype(out.dtype), out.at[m, n].at[:, at]

        _store(pairs(), buffers)

    return _launch(
        xs,
        [weights],
        outputs=[(rows, size)] * 2,
        grid=(rows // ROWS, size // COLUMNS),
        load=load,
        store=store,
        more=[gate, up],
        pieces=1,
        transposed=True,
        interpret=interpret,
    )


def _copy_to_both(tile: Any, buffer: Any, done: Any) -> None:
    """Copies a tile of the weights, a half by each of the two blocks that need it."""
    plgpu.copy_gmem_to_smem(tile, buffer, done, collective_axes="member")


def through_swiglu(d_act: Array, gate: Array, up: Array) -> tuple[Array, Array, Array]:
    """Returns the gradients of gate and up, and silu(gate) * up, of float32 tiles."""
    share = 1 / (1 + jnp.exp(-gate))
    silu = gate * share
    return d_act * up * share * (1 + gate - silu), d_act * silu, silu * up


def _launch(
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
    `store` also gets the tile's `Parts` of `more`, one array, or two where the weights
    are transposed: they come through the ring, behind the tile's last product.
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
                    # All threads have read them: they met in `_store` since then.
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


def multiprocessors() -> int:
    """Returns how many blocks of threads run at a time."""
    return getattr(jax.devices()[0], "core_count", 132)


def _parts(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    return [
        (slice(m, m + _PART), slice(n, n + _PART))
        for m in range(0, shape[0], _PART)
        for n in range(0, shape[1], _PART)
    ]


def _store(pairs: Iterable[tuple[Array, Any]], buffers: Any) -> None:
    """Copies tiles of a warpgroup to their places, through two small buffers in turn."""
    turn = 0
    for values, out in pairs:
        for part in _parts(values.shape):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            buffers[turn][...] = values[part]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers[turn], out.at[part])
            turn = 1 - turn
