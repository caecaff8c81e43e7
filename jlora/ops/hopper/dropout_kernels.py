"""x A with dropout on x, and its gradients, while x is read once.

Such a product does few operations for each byte of x, so its time is that of reading x.
Every adapter of an input has its own dropout mask; here all masks are computed for a tile
of x while it is in shared memory. The two kernels have the form that
`jlora.ops.hopper.matmul_kernel` describes, with one ring of buffers and one kind of mask.

A long sum is split among thread blocks, and the parts are added afterwards in a fixed
order, so that a result is the same every time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt32

from jlora.ops.dropout import axis_codes, kept, tile_mask
from jlora.ops.hopper import mosaic_gpu as plgpu
from jlora.ops.hopper.kernel_parts import (
    DEPTH,
    build_kernel,
    multiprocessors,
    shared_tiles,
    transposed_view,
)

# Rows and columns of the tile that a warpgroup works on: a row of the 128-byte swizzle.
_SIDE = DEPTH
# Multiplying warpgroups: of x A each has its own rows, of the gradients its own columns.
_FORWARD_GROUPS, _BACKWARD_GROUPS = 4, 2
# Buffers of the ring; if ds has more than 64 columns, one fewer fits in shared memory.
_SLOTS = 4
# Registers of a thread that copies, and of the others by the number of warpgroups.
_COPY_REGISTERS, _REGISTERS = 24, {_FORWARD_GROUPS: 112, _BACKWARD_GROUPS: 232}
# Columns of sums that leave through shared memory at a time.
_CHUNK = 16

# Pairs of a source in global memory and a place in shared memory.
Copies = Sequence[tuple[Any, Any]]


# Each function is compiled once and shared by all layers.
@functools.partial(jax.jit, static_argnames=("rate", "width", "interpret"))
def dropped_x_times_a(
    x: Float[Array, "M K"],
    factors: Sequence[Float[Array, "K R"]],
    seeds: Sequence[UInt32[Array, " words"]],
    *,
    rate: float,
    width: int,
    interpret: Any = None,
) -> Float[Array, "M W"]:
    """Returns drop(x) @ A of every adapter side by side, each with its own mask.

    A thread block has 256 rows and a part of the columns of x:

        copying warpgroup                      each of four multiplying warpgroups
        copy the dropout words of its rows
        for each 64 columns of x:              for each 64 columns of x:
          copy x, A^T and the words of           for each adapter: mask the tile of x,
            these columns to a slot                sums[adapter] += masked tile @ A
                                               copy the sums out

    Args:
        x: bfloat16 [M, K]; M is a multiple of 256, K of 64.
        factors: every A, bfloat16, all of 16 or all of 32 columns.
        seeds: what `dropout.seeds` returns, for every adapter.
        rate: the share of elements that is dropped.
        width: columns of the result; zeros fill those after the last adapter's.
        interpret: simulates the GPU on a CPU, for tests.
    """
    rows, depth = x.shape
    count, size = len(factors), factors[0].shape[1]
    height = _FORWARD_GROUPS * _SIDE
    steps, parts = _split(depth // _SIDE, rows // height)

    def body(*refs: Any) -> None:
        x_ref, a_ref, row_codes, column_codes, out = refs[:5]
        x_ring, a_ring, code_ring, by_row, buffers, loaded, *rest = refs[5:]
        ring, stand_in = _Ring(_SLOTS, steps, *rest[:2]), rest[2:]
        m, part = lax.axis_index("across") * height, lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(m + warpgroup * _SIDE, _SIDE)

        def fetch(step: Any, slot: Any) -> Copies:
            along = pl.ds((part * steps + step) * _SIDE, _SIDE)
            return [
                (x_ref.at[pl.ds(m, height), along], x_ring.at[slot]),
                (a_ref.at[:, along], a_ring.at[slot]),
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
                    a = a_ring.at[slot, pl.ds(i * size, size)]
                    plgpu.wgmma(total, operand, transposed_view(a))
                plgpu.wgmma_wait(0)

            ring.use(use)
            _store(sums, out.at[part, mine], buffers.at[warpgroup])

        _warpgroups(
            _FORWARD_GROUPS,
            copy,
            multiply,
            [plgpu.ACC((_SIDE, size), jnp.float32)] * count,
        )

    kernel = build_kernel(
        body,
        jax.ShapeDtypeStruct((parts, rows, count * size), jnp.float32),
        [
            shared_tiles(_SLOTS, height, _SIDE),
            shared_tiles(_SLOTS, count * size, _SIDE),
            plgpu.SMEM((_SLOTS, count, _SIDE), jnp.uint32),
            plgpu.SMEM((count, height), jnp.uint32),
            plgpu.SMEM((_FORWARD_GROUPS, _SIDE, _CHUNK), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            plgpu.Barrier(num_arrivals=_FORWARD_GROUPS, num_barriers=_SLOTS),
            # Only the simulation cannot multiply operands in registers.
            *(
                [shared_tiles(_FORWARD_GROUPS, count, _SIDE, _SIDE)]
                if interpret
                else []
            ),
        ],
        grid={"across": rows // height, "part": parts},
        warpgroups=_FORWARD_GROUPS + 1,
        interpret=interpret,
    )
    joined = jnp.concatenate([a.T for a in factors])
    sums = kernel(x, joined, *axis_codes(seeds, x.shape))
    made = (sums.sum(0) * (1 / (1 - rate))).astype(x.dtype)
    return jnp.pad(made, ((0, 0), (0, width - made.shape[1])))


@functools.partial(jax.jit, static_argnames=("rate", "interpret"))
def dropped_x_times_a_gradients(
    x: Float[Array, "M K"],
    ds: Float[Array, "M W"],
    factors: Sequence[Float[Array, "K R"]],
    seeds: Sequence[UInt32[Array, " words"]],
    *,
    rate: float,
    interpret: Any = None,
) -> tuple[Float[Array, "M K"], list[Float[Array, "K R"]]]:
    """Returns the gradients of x, and of every A in float32, of `dropped_x_times_a`.

    A thread block has 128 columns and a part of the rows of x:

        copying warpgroup                      each of two multiplying warpgroups
        copy A and the words of its columns
        for each 64 rows of x:                 for each 64 rows of x:
          copy x, ds^T and the words of          for each adapter: sent = ds @ A^T
            these rows to a slot                 add up all sent, masked; copy them out
                                                 for each adapter: mask the tile of x,
                                                   sums[adapter] += masked tile^T @ ds
                                               copy the sums out

    Args:
        x: as in `dropped_x_times_a`; K is a multiple of 128.
        ds: the gradient of its result, bfloat16; W is a multiple of 64.
        factors: as there.
        seeds: as there.
        rate: as there.
        interpret: as there.
    """
    rows, depth = x.shape
    count, size = len(factors), factors[0].shape[1]
    across = _BACKWARD_GROUPS * _SIDE
    steps, parts = _split(rows // _SIDE, depth // across)
    slots = _SLOTS if ds.shape[1] == _SIDE else _SLOTS - 1

    def body(*refs: Any) -> None:
        x_ref, ds_ref, a_ref, row_codes, column_codes, out, sum_ref = refs[:7]
        x_ring, ds_ring, code_ring, a_tiles, by_column, *rest = refs[7:]
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
                for i in range(_BACKWARD_GROUPS)
            ]
            own_ds = ds_ref.at[:, here], ds_ring.at[slot]
            return [*tiles, own_ds, (row_codes.at[:, here], code_ring.at[slot])]

        def copy() -> None:
            for i in range(count):
                tile = a_ref.at[i, pl.ds(n, across)]
                plgpu.copy_gmem_to_smem(tile, a_tiles.at[i], loaded)
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
                        block = pl.ds(i * size // _SIDE * _SIDE, _SIDE)
                        plgpu.wgmma(
                            acc,
                            transposed_view(ds_ring.at[slot, block]),
                            transposed_view(a_tiles.at[i, own]),
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
                        own_ds = ds_ring.at[slot, pl.ds(i * size, size)]
                        plgpu.wgmma(
                            acc,
                            transposed_view(dropped.at[warpgroup, i]),
                            transposed_view(own_ds),
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
            _BACKWARD_GROUPS,
            copy,
            multiply,
            [plgpu.ACC((_SIDE, size), jnp.float32)] * count,
        )

    kernel = build_kernel(
        body,
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((parts, depth, count * size), jnp.float32),
        ],
        [
            shared_tiles(slots, _BACKWARD_GROUPS, _SIDE, _SIDE),
            shared_tiles(slots, ds.shape[1], _SIDE),
            plgpu.SMEM((slots, count, _SIDE), jnp.uint32),
            shared_tiles(count, across, _SIDE),
            plgpu.SMEM((count, across), jnp.uint32),
            shared_tiles(_BACKWARD_GROUPS, count, _SIDE, _SIDE),
            shared_tiles(_BACKWARD_GROUPS, _SIDE, _SIDE),
            plgpu.SMEM((_BACKWARD_GROUPS, _SIDE, _CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=count + 1),
            plgpu.Barrier(num_arrivals=_BACKWARD_GROUPS + 2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=_BACKWARD_GROUPS, num_barriers=slots),
        ],
        grid={"across": depth // across, "part": parts},
        warpgroups=_BACKWARD_GROUPS + 1,
        interpret=interpret,
    )
    sent, sums = kernel(x, ds.T, _in_blocks(factors), *axis_codes(seeds, x.shape))
    return sent, jnp.split(sums.sum(0) * (1 / (1 - rate)), count, axis=1)


def _in_blocks(factors: Sequence[Array]) -> Array:
    """Returns every A where it stands among 64 columns, with zeros beside it."""
    size = factors[0].shape[1]
    starts = [i * size % _SIDE for i in range(len(factors))]
    return jnp.stack(
        [
            jnp.pad(a, ((0, 0), (start, _SIDE - start - size)))
            for a, start in zip(factors, starts, strict=True)
        ]
    )


def _split(tiles: int, blocks: int) -> tuple[int, int]:
    """Returns (tiles of a part, parts): as many parts as the GPU runs at once."""
    most = max(1, multiprocessors() // blocks)
    parts = max(n for n in range(1, most + 1) if tiles % n == 0)
    return tiles // parts, parts


def _warpgroups(
    groups: int,
    copy: Callable[[], None],
    multiply: Callable[..., None],
    sums: Sequence[Any],
) -> None:
    """Runs `copy` in the last warpgroup and `multiply(*sums)` in the others."""

    def run_copy() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy()

    def run_multiply() -> None:
        plgpu.set_max_registers(_REGISTERS[groups], action="increase")
        pl.run_scoped(multiply, *sums)

    lax.cond(lax.axis_index("warpgroup") == groups, run_copy, run_multiply)


class _Ring(NamedTuple):
    """Buffers in shared memory that one warpgroup fills and the others use, in turn."""

    slots: int
    steps: int
    ready: Any
    consumed: Any

    def fill(self, fetch: Callable[[Any, Any], Copies]) -> None:
        """Copies what `fetch(step, slot)` names, at each step once the slot is free."""

        def step(i: Any, _: None) -> None:
            slot = lax.rem(i, self.slots)
            plgpu.barrier_wait(self.consumed.at[slot])
            for source, place in fetch(i, slot):
                plgpu.copy_gmem_to_smem(source, place, self.ready.at[slot])

        lax.fori_loop(0, self.steps, step, None)
        for ahead in range(self.slots):  # every phase of a barrier must be waited for
            plgpu.barrier_wait(self.consumed.at[(self.steps + ahead) % self.slots])

    def use(self, use: Callable[[Any, Any], None]) -> None:
        """Runs `use(step, slot)` at each step, as soon as the slot is filled."""
        for slot in range(self.slots):
            plgpu.barrier_arrive(self.consumed.at[slot])

        def step(i: Any, _: None) -> None:
            slot = lax.rem(i, self.slots)
            plgpu.barrier_wait(self.ready.at[slot])
            use(i, slot)
            plgpu.barrier_arrive(self.consumed.at[slot])

        lax.fori_loop(0, self.steps, step, None)


def _store(sums: Sequence[Any], out: Any, buffer: Any) -> None:
    """Copies the sums to `out` side by side, through a small buffer."""
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
