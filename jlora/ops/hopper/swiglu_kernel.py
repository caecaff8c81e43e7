"""The gradients of SwiGLU and of the adapters around it, in one pass over its arrays.

From d_act, the gradient of act = silu(gate) * up, to the gradients of gate and up there
are only elementwise steps, and the products with the adapters are small: ds = dy B^T and
dB = s^T dy of gate and up, dA = act^T ds of down. The time of all of them is that of
reading gate, up and d_act, the largest arrays of a layer, which separate products would
read five times more. Here a tile of them is turned into the gradients in shared memory,
where the tensor cores multiply it before it is written back.

With dropout on down's input, its mask is computed for each tile. What comes through down's
adapter is masked and added to d_act, and dA is computed from the masked act.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt32

from jlora.ops.dropout import axis_codes, kept, tile_mask
from jlora.ops.hopper import mosaic_gpu as plgpu
from jlora.ops.hopper.kernel_parts import (
    COPY_REGISTERS,
    DEPTH,
    MULTIPLY_REGISTERS,
    build_kernel,
    multiprocessors,
    shared_tiles,
    transposed_view,
)
from jlora.ops.hopper.product_kernels import swiglu_gradients_of_tile

# Rows and columns of a warpgroup's tile: one row of the 128-byte swizzle in bfloat16.
_SIDE = DEPTH
# Tiles of a warpgroup next to each other in a band. The sums of four would fill the
# registers.
_ACROSS = 2
# Buffers in the ring. At most one more than `_ACROSS`, or the rows of s and ds that the
# last tiles still read would be overwritten.
_STAGES = 3
# The gradients of gate and up replace them if a kernel can write to its arguments.
_IN_PLACE = jax.__version_info__ >= (0, 11)
# Columns of sums that leave at a time with dropout, as down's A needs room as well.
_CHUNK = 16


class Gradients(NamedTuple):
    """The gradients of gate and up, bfloat16, and of s, B and A, float32."""

    gate: Float[Array, "M F"]
    up: Float[Array, "M F"]
    s_gate: Float[Array, "M R"]
    s_up: Float[Array, "M R"]
    b_gate: Float[Array, "R F"]
    b_up: Float[Array, "R F"]
    a_down: Float[Array, "F R"]


class DownDropout(NamedTuple):
    """A of down's adapter, bfloat16, and the seeds of the dropout on its input."""

    a: Float[Array, "F R"]
    seeds: UInt32[Array, " words"]


# Compiled once and shared by all layers.
@functools.partial(jax.jit, static_argnames=("rate", "interpret"))
def swiglu_and_lora_gradients(
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    d_act: Float[Array, "M F"],
    factors: Sequence[Float[Array, "M R"]],
    b: Sequence[Float[Array, "R F"]],
    dropout: DownDropout | None = None,
    *,
    rate: float = 0.0,
    interpret: Any = None,
) -> Gradients:
    """Returns the gradients that follow from d_act, the gradient of silu(gate) * up.

    A thread block has a band of 256 columns and a range of rows. A row of tiles is 64
    rows of the band; each multiplying warpgroup has two tiles of it, its half:

        copying warpgroup                      each of two multiplying warpgroups
        copy B (and A) of the band
        for each row of tiles:                 for each row of tiles:
          copy its rows of s and ds              for each of its two tiles:
          for each of two slots:                   gate, up, d_act become, in place,
            copy a tile of gate, up and              the gradients dy and act
            d_act for each warpgroup               copy the two dy out
                                                   dB += dy^T s, dA += act^T ds
                                                   ds += dy B^T
                                                 add both halves of ds, copy it out
                                               copy dB and dA out

    The sums of different thread blocks are added afterwards in a fixed order, so that a
    result is the same every time.

    Args:
        gate: bfloat16, like all arrays; M is a multiple of 64, F of 256.
        up: likewise.
        d_act: if there is dropout, without what comes through down's adapter.
        factors: s of gate, s of up, and the gradient of down's s; R is a multiple of 16
            and at most `kernel_parts.MAX_RANK`.
        b: B of gate and of up, times the scaling.
        dropout: of down's adapter.
        rate: its rate.
        interpret: simulates the GPU on a CPU, for tests.
    """
    rows, columns = gate.shape
    width = b[0].shape[0]
    band = 2 * _ACROSS * _SIDE
    bands, tiles = columns // band, rows // _SIDE
    chunks = max(1, min(multiprocessors() // bands, tiles))
    at_a_time = _CHUNK if dropout else width
    mask: list[Array] = []
    if dropout is not None:
        (row_words,), (column_words,) = axis_codes([dropout.seeds], gate.shape)
        mask = [row_words, column_words, dropout.a]

    def body(*refs: Any) -> None:
        (*wide_refs, factors_ref, b_gate_ref, b_up_ref), refs = refs[:6], refs[6:]
        mask_refs, refs = refs[: len(mask)], refs[len(mask) :]
        outs, refs = refs[: -9 - len(mask)], refs[-9 - len(mask) :]
        *made_refs, ds_ref, sum_ref = outs
        made_refs = made_refs or wide_refs[:2]
        (wide, factor_tiles, b_tiles, buffers), barriers = refs[:4], refs[4:9]
        ready, factors_ready, b_ready, consumed, pair = barriers
        mask_tiles = refs[9:]
        warpgroup, at_band = lax.axis_index("warpgroup"), lax.axis_index("band")
        chunk = lax.axis_index("chunk")
        first = lax.div(chunk * tiles, chunks)
        count = lax.div((chunk + 1) * tiles, chunks) - first

        def rows_of(i: Any) -> Any:
            return pl.ds(pl.multiple_of((first + i) * _SIDE, _SIDE), _SIDE)

        def columns_of(half: Any, across: int) -> Any:
            start = at_band * band + (2 * across + half) * _SIDE
            return pl.ds(pl.multiple_of(start, _SIDE), _SIDE)

        def copy() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            pieces = [(half, across) for half in (0, 1) for across in range(_ACROSS)]
            for half, across in pieces:
                here = columns_of(half, across)
                for i, ref in enumerate((b_gate_ref, b_up_ref)):
                    tile = ref.at[:, here]
                    plgpu.copy_gmem_to_smem(tile, b_tiles.at[half, across, i], b_ready)
                for ref, place in zip(mask_refs[1:], mask_tiles[1:], strict=True):
                    tile = ref.at[here]
                    plgpu.copy_gmem_to_smem(tile, place.at[half, across], b_ready)

            def row(i: Any, _: Any) -> Any:
                for across in range(_ACROSS):
                    slot = lax.rem(i * _ACROSS + across, _STAGES)
                    plgpu.barrier_wait(consumed.at[slot])
                    if across == 0:
                        side = lax.rem(i, 2)
                        plgpu.copy_gmem_to_smem(
                            factors_ref.at[:, rows_of(i)],
                            factor_tiles.at[side],
                            factors_ready.at[side],
                        )
                        if mask:
                            plgpu.copy_gmem_to_smem(
                                mask_refs[0].at[rows_of(i)],
                                mask_tiles[0].at[side],
                                factors_ready.at[side],
                            )
                    for half in (0, 1):
                        for j, ref in enumerate(wide_refs):
                            plgpu.copy_gmem_to_smem(
                                ref.at[rows_of(i), columns_of(half, across)],
                                wide.at[slot, half, j],
                                ready.at[slot],
                            )
                return 0

            lax.fori_loop(0, count, row, 0)
            for ahead in range(_STAGES):  # every phase of a barrier must be waited for
                step = count * _ACROSS + ahead
                plgpu.barrier_wait(consumed.at[lax.rem(step, _STAGES)])

        def multiply() -> None:
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(consumed.at[slot])
            plgpu.barrier_wait(b_ready)
            half = warpgroup

            def through_mask(i: Any, across: int, ds: Any) -> tuple[Array, Array]:
                row_words, column_words, a_tiles = mask_tiles
                words = row_words[lax.rem(i, 2)], column_words[half, across]
                a = transposed_view(a_tiles.at[half, across])
                return tile_mask(*words, rate), _product(ds, a) * (1 / (1 - rate))

            def tile(i: Any, across: int, ds: Any, sums: Any, d_s: Any) -> None:
                step = i * _ACROSS + across
                slot = lax.rem(step, _STAGES)
                plgpu.barrier_wait(ready.at[slot])
                made = [wide.at[slot, half, j] for j in range(3)]
                _replace_by_gradients(
                    made, through_mask(i, across, ds) if mask else None
                )
                at = rows_of(i), columns_of(half, across)
                for values, ref in zip(made, made_refs, strict=False):
                    plgpu.copy_smem_to_gmem(values, ref.at[at])
                for j, (values, total) in enumerate(zip(made, sums, strict=True)):
                    own = factor_tiles.at[lax.rem(i, 2), pl.ds(j * width, width)]
                    over_rows = transposed_view(values)
                    plgpu.wgmma(total, over_rows, transposed_view(own))
                for j, total in enumerate(d_s):
                    own = transposed_view(b_tiles.at[half, across, j])
                    plgpu.wgmma(total, made[j], own)
                plgpu.wgmma_wait(0)
                # All copies but these two are done, so the slot before is free.
                plgpu.wait_smem_to_gmem(2, wait_read_only=True)

                @pl.when(step > 0)
                def _() -> None:
                    before = lax.rem(step + _STAGES - 1, _STAGES)
                    plgpu.barrier_arrive(consumed.at[before])

            def with_sums(*sums: Any) -> None:
                def row(i: Any, _: Any) -> Any:
                    side = lax.rem(i, 2)
                    plgpu.barrier_wait(factors_ready.at[side])
                    ds = None
                    if mask:
                        ds = _transposed_rows(
                            factor_tiles.at[side, pl.ds(2 * width, width)], interpret
                        )

                    def with_d_s(*d_s: Any) -> list[Array]:
                        for across in range(_ACROSS):
                            tile(i, across, ds, sums[3 * across : 3 * across + 3], d_s)
                        return [total[...] for total in d_s]

                    found = pl.run_scoped(with_d_s, acc, acc)
                    out = ds_ref.at[at_band, :, rows_of(i)]
                    _store_both_halves(found, out, half, buffers, pair)
                    return 0

                lax.fori_loop(0, count, row, 0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                last = lax.rem(count * _ACROSS + _STAGES - 1, _STAGES)
                plgpu.barrier_arrive(consumed.at[last])
                lax.cond(
                    half == 0,
                    lambda: plgpu.barrier_arrive(pair.at[0]),
                    lambda: plgpu.barrier_wait(pair.at[0]),
                )
                for i, total in enumerate(sums):
                    values = total[...]
                    for part in _chunks(width, at_a_time):
                        buffers[half] = values[:, part]
                        plgpu.commit_smem()
                        place = chunk, i % 3, columns_of(half, i // 3), part
                        plgpu.copy_smem_to_gmem(buffers.at[half], sum_ref.at[place])
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            acc = plgpu.ACC((_SIDE, width), jnp.float32)
            pl.run_scoped(with_sums, *[acc] * (3 * _ACROSS))

        lax.cond(warpgroup == 2, copy, multiply)

    wide_type = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    kernel = build_kernel(
        body,
        [
            *([] if _IN_PLACE else [wide_type, wide_type]),
            jax.ShapeDtypeStruct((bands, 2, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((chunks, 3, columns, width), jnp.float32),
        ],
        [
            shared_tiles(_STAGES, 2, 3, _SIDE, _SIDE),
            shared_tiles(2, 3 * width, _SIDE),
            shared_tiles(2, _ACROSS, 2, width, _SIDE),
            plgpu.SMEM((2, _SIDE, at_a_time), jnp.float32),
            plgpu.Barrier(num_arrivals=6, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2 if mask else 1, num_barriers=2),
            plgpu.Barrier(num_arrivals=(8 if mask else 4) * _ACROSS),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_barriers=2),
            *(_mask_buffers(width) if mask else []),
        ],
        grid={"band": bands, "chunk": chunks},
        warpgroups=3,
        approx_math=True,
        interpret=interpret,
    )
    joined = jnp.concatenate([x.T for x in factors])
    if _IN_PLACE:
        refs = jax.new_ref(gate), jax.new_ref(up)
        d_s, sums = kernel(*refs, d_act, joined, *b, *mask)
        d_gate, d_up = (jax.freeze(ref) for ref in refs)
    else:
        d_gate, d_up, d_s, sums = kernel(gate, up, d_act, joined, *b, *mask)
    (s_gate, s_up), (b_gate, b_up, a_down) = d_s.sum(0), sums.sum(0)
    a_down = a_down * (1 / (1 - rate)) if mask else a_down
    return Gradients(d_gate, d_up, s_gate, s_up, b_gate.T, b_up.T, a_down)


def _mask_buffers(width: int) -> list[Any]:
    """Returns shared memory for the words of rows and of columns, and for A of down."""
    return [
        plgpu.SMEM((2, _SIDE), jnp.uint32),
        plgpu.SMEM((2, _ACROSS, _SIDE), jnp.uint32),
        shared_tiles(2, _ACROSS, _SIDE, width),
    ]


def _transposed_rows(columns: Any, interpret: Any) -> Any:
    """Returns a tile that is transposed in shared memory as an operand in registers."""
    rows = transposed_view(columns)
    if interpret:  # the simulation cannot multiply operands in registers
        return rows
    rows = plgpu.layout_cast(rows[...], plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(rows, plgpu.Layout.WGMMA)


def _product(x: Any, y: Any) -> Array:
    """Returns x @ y of one tile."""

    def product(total: Any) -> Array:
        plgpu.wgmma(total, x, y)
        return total[...]

    return pl.run_scoped(product, plgpu.ACC((_SIDE, _SIDE), jnp.float32))


def _replace_by_gradients(
    tiles: list[Any], through_mask: tuple[Array, Array] | None
) -> None:
    """Turns tiles of gate, up and d_act into the gradients of gate and up, and into act.

    `through_mask` is the mask, and the gradient to add to d_act where it keeps elements.
    """
    dtype = tiles[0].dtype
    g, u, d = (
        plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA).astype(jnp.float32)
        for tile in tiles
    )
    if through_mask is not None:
        keep, sent = through_mask
        d += kept(keep, sent)
    *made, act = swiglu_gradients_of_tile(d, g, u)
    made.append(act if through_mask is None else kept(through_mask[0], act))
    for tile, values in zip(tiles, made, strict=True):
        tile[...] = values.astype(dtype)
    plgpu.commit_smem()


def _chunks(size: int, at_a_time: int) -> list[slice]:
    return [slice(i, i + at_a_time) for i in range(0, size, at_a_time)]


def _store_both_halves(
    found: list[Array], out: Any, half: Any, buffers: Any, pair: Any
) -> None:
    """Stores the sum of what both warpgroups found, through the buffers of one."""
    parts = _chunks(found[0].shape[1], buffers.shape[2])
    for part in parts:

        @pl.when(half == 1)
        def _(part: slice = part) -> None:
            plgpu.barrier_wait(pair.at[0])
            for j, values in enumerate(found):
                buffers[j] = values[:, part]
            plgpu.barrier_arrive(pair.at[1])

        @pl.when(half == 0)
        def _(part: slice = part) -> None:
            # The last row's copy is done: the tiles were copied after it, and waited for.
            if part.start > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(pair.at[0])
            plgpu.barrier_wait(pair.at[1])
            for j, values in enumerate(found):
                other = plgpu.layout_cast(buffers[j], plgpu.Layout.WGMMA)
                buffers[j] = values[:, part] + other
            plgpu.commit_smem()
            if len(parts) == 1:
                plgpu.copy_smem_to_gmem(buffers, out)
                return
            for j in range(len(found)):
                plgpu.copy_smem_to_gmem(buffers.at[j], out.at[j, :, part])
