"""Products with an adapter's narrow side behind dropout, while the input streams past once.

Such a product does few operations per byte, so what counts is how often its large
factor is read. With dropout, every adapter of an input reads it through a mask of its own:
here all of that is done while a tile of the input is at hand. The kernels are of the form
that `jlora.ops.hopper.matmul_kernel` describes.

Sums over parts of a long axis are made apart and then added, in one order, so that a
result is the same every time. The length of the file is that of two kernels, which share
their ring and their masks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from jlora.ops.dropout import axis_codes, kept, tile_mask
from jlora.ops.hopper import matmul_kernel as hopper

# The widest adapter: its sums stay in registers.
WIDEST = 32
# The side of the tile that a warpgroup has at hand: a row of the 128-byte swizzle.
_SIDE = hopper.DEPTH
# Warpgroups of `down`, each with rows of its own, and of `through_dropout`, each with
# columns of its own.
_DOWN_GROUPS, _BACK_GROUPS = 4, 2
# Slots of a ring; with more than 64 columns of ds, one fewer fits beside what else there is.
_SLOTS = 4
# Registers of a thread that copies, and of the others, by their warpgroups.
_COPY_REGISTERS, _REGISTERS = 24, {_DOWN_GROUPS: 112, _BACK_GROUPS: 232}
# Columns of sums that leave through shared memory at a time.
_CHUNK = 16

# Pairs of a source in global memory and a place in shared memory.
Copies = Sequence[tuple[Any, Any]]


# Compiled functions of their own, so that a kernel is built once for all layers.
@functools.partial(jax.jit, static_argnames=("rate", "width", "interpret"))
def down(
    x: Float[Array, "M K"],
    weights: Sequence[Float[Array, "K R"]],
    seeds: Sequence[UInt32[Array, "2"]],
    *,
    rate: float,
    width: int,
    interpret: Any = None,
) -> Float[Array, "M W"]:
    """Returns drop(x) @ w for every w, each with a mask of its own, side by side.

    Args:
        x: bfloat16 [M, K]; M is a multiple of 256, K of 64.
        weights: bfloat16, all as wide: 16 or 32.
        seeds: what `dropout.seeds` returns, for every weight.
        rate: of the elements, this share is dropped.
        width: columns of the result; zeros fill those after the last weight's.
        interpret: simulates the GPU where there is none, for tests.
    """
    rows, depth = x.shape
    count, size = len(weights), weights[0].shape[1]
    height = _DOWN_GROUPS * _SIDE
    steps, parts = _split(depth // _SIDE, rows // height)

    def body(*refs: Any) -> None:
        x_ref, w_ref, row_codes, column_codes, out = refs[:5]
        x_ring, w_ring, code_ring, by_row, buffers, loaded, *rest = refs[5:]
        ring, stand_in = _Ring(_SLOTS, steps, *rest[:2]), rest[2:]
        m, part = lax.axis_index("across") * height, lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(m + warpgroup * _SIDE, _SIDE)

        def fetch(step: Any, slot: Any) -> Copies:
            along = pl.ds((part * steps + step) * _SIDE, _SIDE)
            return [
                (x_ref.at[pl.ds(m, height), along], x_ring.at[slot]),
                (w_ref.at[:, along], w_ring.at[slot]),
                (column_codes.at[:, along], code_ring.at[slot]),
            ]

        def copy() -> None:
            tile = row_codes.at[:, pl.ds(m, height)]
            plgpu.copy_gmem_to_smem(tile, by_row, loaded)
            ring.fill(fetch)

        def multiply(*sums: Any) -> None:
            plgpu.barrier_wait(loaded)
            own = pl.ds(warpgroup * _SIDE, _SIDE)
            words = [by_row[i, own] for i in range(count)]

            def use(_: Any, slot: Any) -> None:
                tile = x_ring[slot, own]
                operands = []
                for i in range(count):
                    operand = kept(tile_mask(words[i], code_ring[slot, i], rate), tile)
                    if stand_in:
                        stand_in[0][warpgroup, i] = operand
                        operand = stand_in[0].at[warpgroup, i]
                    operands.append(operand)
                for i, (total, operand) in enumerate(zip(sums, operands, strict=True)):
                    w = w_ring.at[slot, pl.ds(i * size, size)]
                    plgpu.wgmma(total, operand, hopper.transposed_view(w))
                plgpu.wgmma_wait(0)

            ring.use(use)
            _store(sums, out.at[part, mine], buffers.at[warpgroup])

        _warpgroups(
            _DOWN_GROUPS,
            copy,
            lambda: pl.run_scoped(
                multiply, *[plgpu.ACC((_SIDE, size), jnp.float32)] * count
            ),
        )

    kernel = _kernel(
        body,
        jax.ShapeDtypeStruct((parts, rows, count * size), jnp.float32),
        [
            _tiles(_SLOTS, height, _SIDE),
            _tiles(_SLOTS, count * size, _SIDE),
            plgpu.SMEM((_SLOTS, count, _SIDE), jnp.uint32),
            plgpu.SMEM((count, height), jnp.uint32),
            plgpu.SMEM((_DOWN_GROUPS, _SIDE, _CHUNK), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            plgpu.Barrier(num_arrivals=_DOWN_GROUPS, num_barriers=_SLOTS),
            # The tensor cores take an operand from registers; simulated ones do not.
            *([_tiles(_DOWN_GROUPS, count, _SIDE, _SIDE)] if interpret else []),
        ],
        (rows // height, parts),
        _DOWN_GROUPS,
        interpret,
    )
    sums = kernel(
        x, jnp.concatenate([w.T for w in weights]), *axis_codes(seeds, x.shape)
    )
    made = (sums.sum(0) * (1 / (1 - rate))).astype(x.dtype)
    return jnp.pad(made, ((0, 0), (0, width - made.shape[1])))


@functools.partial(jax.jit, static_argnames=("rate", "interpret"))
def through_dropout(
    x: Float[Array, "M K"],
    ds: Float[Array, "M W"],
    weights: Sequence[Float[Array, "K R"]],
    seeds: Sequence[UInt32[Array, "2"]],
    *,
    rate: float,
    interpret: Any = None,
) -> tuple[Float[Array, "M K"], list[Float[Array, "K R"]]]:
    """Returns what the gradient ds of `down` sends to x, and to every weight, float32.

    Args:
        x: as in `down`; K is a multiple of 128.
        ds: bfloat16; W is a multiple of 64.
        weights: as in `down`.
        seeds: likewise.
        rate: likewise.
        interpret: likewise.
    """
    rows, depth = x.shape
    count, size = len(weights), weights[0].shape[1]
    across = _BACK_GROUPS * _SIDE
    steps, parts = _split(rows // _SIDE, depth // across)
    slots = _SLOTS if ds.shape[1] == _SIDE else _SLOTS - 1

    def body(*refs: Any) -> None:
        x_ref, ds_ref, w_ref, row_codes, column_codes, out, sum_ref = refs[:7]
        x_ring, ds_ring, code_ring, w_tiles, by_column, *rest = refs[7:]
        dropped, sent_tiles, buffers, loaded, *barriers = rest
        ring = _Ring(slots, steps, *barriers)
        n, part = lax.axis_index("across") * across, lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(n + warpgroup * _SIDE, _SIDE)

        def rows_of(step: Any) -> Any:
            return pl.ds((part * steps + step) * _SIDE, _SIDE)

        def fetch(step: Any, slot: Any) -> Copies:
            here = rows_of(step)
            tiles = [
                (x_ref.at[here, pl.ds(n + i * _SIDE, _SIDE)], x_ring.at[slot, i])
                for i in range(_BACK_GROUPS)
            ]
            narrow = ds_ref.at[:, here], ds_ring.at[slot]
            return [*tiles, narrow, (row_codes.at[:, here], code_ring.at[slot])]

        def copy() -> None:
            for i in range(count):
                tile = w_ref.at[i, pl.ds(n, across)]
                plgpu.copy_gmem_to_smem(tile, w_tiles.at[i], loaded)
            words = column_codes.at[:, pl.ds(n, across)]
            plgpu.copy_gmem_to_smem(words, by_column, loaded)
            ring.fill(fetch)

        def multiply(*sums: Any) -> None:
            plgpu.barrier_wait(loaded)
            own = pl.ds(warpgroup * _SIDE, _SIDE)
            words = [by_column[i, own] for i in range(count)]

            def use(step: Any, slot: Any) -> None:
                def with_sent(*sent: Any) -> None:
                    for i, acc in enumerate(sent):
                        group = pl.ds(i * size // _SIDE * _SIDE, _SIDE)
                        w = w_tiles.at[i, own]
                        plgpu.wgmma(
                            acc,
                            hopper.transposed_view(ds_ring.at[slot, group]),
                            hopper.transposed_view(w),
                        )
                    tile = x_ring[slot, warpgroup]
                    total = jnp.zeros((_SIDE, _SIDE), jnp.float32)
                    for i, acc in enumerate(sent):
                        keep = tile_mask(code_ring[slot, i], words[i], rate)
                        values = acc[...]
                        total += kept(keep, values)
                        dropped[warpgroup, i] = kept(keep, tile)
                    plgpu.commit_smem()
                    for i, acc in enumerate(sums):
                        narrow = ds_ring.at[slot, pl.ds(i * size, size)]
                        plgpu.wgmma(
                            acc,
                            hopper.transposed_view(dropped.at[warpgroup, i]),
                            hopper.transposed_view(narrow),
                        )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    sent_tiles[warpgroup] = (total * (1 / (1 - rate))).astype(x.dtype)
                    plgpu.commit_smem()
                    place = out.at[rows_of(step), mine]
                    plgpu.copy_smem_to_gmem(sent_tiles.at[warpgroup], place)
                    plgpu.wgmma_wait(0)

                accs = [plgpu.ACC((_SIDE, _SIDE), jnp.float32)] * count
                pl.run_scoped(with_sent, *accs)

            ring.use(use)
            _store(sums, sum_ref.at[part, mine], buffers.at[warpgroup])

        _warpgroups(
            _BACK_GROUPS,
            copy,
            lambda: pl.run_scoped(
                multiply, *[plgpu.ACC((_SIDE, size), jnp.float32)] * count
            ),
        )

    kernel = _kernel(
        body,
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((parts, depth, count * size), jnp.float32),
        ],
        [
            _tiles(slots, _BACK_GROUPS, _SIDE, _SIDE),
            _tiles(slots, ds.shape[1], _SIDE),
            plgpu.SMEM((slots, count, _SIDE), jnp.uint32),
            _tiles(count, across, _SIDE),
            plgpu.SMEM((count, across), jnp.uint32),
            _tiles(_BACK_GROUPS, count, _SIDE, _SIDE),
            _tiles(_BACK_GROUPS, _SIDE, _SIDE),
            plgpu.SMEM((_BACK_GROUPS, _SIDE, _CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=count + 1),
            plgpu.Barrier(num_arrivals=_BACK_GROUPS + 2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=_BACK_GROUPS, num_barriers=slots),
        ],
        (depth // across, parts),
        _BACK_GROUPS,
        interpret,
    )
    sent, sums = kernel(x, ds.T, _in_groups(weights), *axis_codes(seeds, x.shape))
    return sent, jnp.split(sums.sum(0) * (1 / (1 - rate)), count, axis=1)


def _in_groups(weights: Sequence[Array]) -> Array:
    """Returns every weight in its columns among 64, with zeros beside it."""
    size = weights[0].shape[1]
    starts = [i * size % _SIDE for i in range(len(weights))]
    return jnp.stack(
        [
            jnp.pad(w, ((0, 0), (start, _SIDE - start - size)))
            for w, start in zip(weights, starts, strict=True)
        ]
    )


def _split(tiles: int, blocks: int) -> tuple[int, int]:
    """Returns (tiles of a part, parts), so that with so many blocks all have one."""
    most = max(1, hopper.multiprocessors() // blocks)
    parts = max(n for n in range(1, most + 1) if tiles % n == 0)
    return tiles // parts, parts


def _warpgroups(
    count: int, copy: Callable[[], None], multiply: Callable[[], None]
) -> None:
    """Has one warpgroup copy and the others multiply, with registers for that."""

    def copies() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy()

    def multiplies() -> None:
        plgpu.set_max_registers(_REGISTERS[count], action="increase")
        multiply()

    lax.cond(lax.axis_index("warpgroup") == count, copies, multiplies)


class _Ring(NamedTuple):
    """Slots of shared memory that one warpgroup fills and the others use, in turn."""

    slots: int
    steps: int
    ready: Any
    consumed: Any

    def fill(self, fetch: Callable[[Any, Any], Copies]) -> None:
        """Copies what `fetch(step, slot)` returns, for each step once its slot is free."""

        def step(i: Any, _: None) -> None:
            slot = lax.rem(i, self.slots)
            plgpu.barrier_wait(self.consumed.at[slot])
            for source, place in fetch(i, slot):
                plgpu.copy_gmem_to_smem(source, place, self.ready.at[slot])

        lax.fori_loop(0, self.steps, step, None)
        for ahead in range(self.slots):  # no phase of a barrier may stay unseen
            plgpu.barrier_wait(self.consumed.at[(self.steps + ahead) % self.slots])

    def use(self, use: Callable[[Any, Any], None]) -> None:
        """Runs `use(step, slot)` for all steps, each as soon as its slot is filled."""
        for slot in range(self.slots):
            plgpu.barrier_arrive(self.consumed.at[slot])

        def step(i: Any, _: None) -> None:
            slot = lax.rem(i, self.slots)
            plgpu.barrier_wait(self.ready.at[slot])
            use(i, slot)
            plgpu.barrier_arrive(self.consumed.at[slot])

        lax.fori_loop(0, self.steps, step, None)


def _store(sums: Sequence[Any], out: Any, buffer: Any) -> None:
    """Copies the sums to `out`, side by side, through a small buffer."""
    for i, total in enumerate(sums):
        values = total[...]
        size = values.shape[1]
        for start in range(0, size, _CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = values[:, start : start + _CHUNK]
            plgpu.commit_smem()
            place = out.at[:, pl.ds(i * size + start, _CHUNK)]
            plgpu.copy_smem_to_gmem(buffer, place)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _tiles(*shape: int) -> Any:
    """Returns shared memory for tiles that the tensor cores multiply."""
    transforms = plgpu.TilingTransform((8, _SIDE)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _kernel(
    body: Callable[..., None],
    outputs: Any,
    scratch: Sequence[Any],
    grid: tuple[int, int],
    groups: int,
    interpret: Any,
) -> Callable[..., Any]:
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("across", "part"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
