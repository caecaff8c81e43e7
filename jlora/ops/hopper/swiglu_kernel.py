"""SwiGLU's backward pass and the adapters' products with its arrays, in one pass.

Between the gradient of down's input and those of gate and up lie only elementwise steps,
bound by memory, and so are the narrow products with them: dS = dY B^T and dB = S^T dY of
gate and up, dA of down. One by one they would read the widest arrays of a layer five
times more. Here a tile of gate, up and the gradient is turned into the results in shared
memory, and the tensor cores multiply it there before it is written back.

A block of threads owns a band of columns and a range of rows. Each of its two multiplying
warpgroups has a half of the band, whose sums of dB and dA over the rows stay in registers.
Sums over blocks are made afterwards, in one order: a result is the same every time.

With dropout, down's mask is made again for each tile: what down's adapter sends to its
input is added behind it, and dA is made of what it lets through. The file is as long as
one kernel in these two forms.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from jlora.ops.dropout import axis_codes, kept, tile_mask
from jlora.ops.hopper import matmul_kernel as hopper
from jlora.ops.hopper import product_kernels as hopper_products

# Rows and columns of a warpgroup's tile: one row of the 128-byte swizzle in bfloat16.
_SIDE = 64
# Tiles of a warpgroup beside each other in a band. With four their sums would fill the
# registers.
_ACROSS = 2
# Buffers in the ring. At most one more than `_ACROSS`: then the narrow rows of the row of
# tiles before the last one are no longer read when the next ones arrive.
_STAGES = 3
# The gradients of gate and up replace them where a kernel can write to what it is given.
_IN_PLACE = jax.__version_info__ >= (0, 11)
# The widest narrow arrays whose tiles fit in shared memory beside the ring.
WIDEST = 32
# With dropout the columns of sums that leave at a time, as down's A takes room as well.
_CHUNK = 16


class Gradients(NamedTuple):
    """What `swiglu_backward` returns: bfloat16 for gate and up, the others float32."""

    gate: Float[Array, "M F"]
    up: Float[Array, "M F"]
    s_gate: Float[Array, "M R"]
    s_up: Float[Array, "M R"]
    b_gate: Float[Array, "R F"]
    b_up: Float[Array, "R F"]
    a_down: Float[Array, "F R"]


class Dropped(NamedTuple):
    """Down's adapter behind dropout: A, bfloat16, and what `dropout.seeds` returns."""

    a: Float[Array, "F R"]
    seeds: UInt32[Array, "2"]


# A compiled function of its own, so that the kernel is built once for all layers.
@functools.partial(jax.jit, static_argnames=("rate", "interpret"))
def swiglu_backward(
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    d_act: Float[Array, "M F"],
    narrow: Sequence[Float[Array, "M R"]],
    b: Sequence[Float[Array, "R F"]],
    dropped: Dropped | None = None,
    *,
    rate: float = 0.0,
    interpret: Any = None,
) -> Gradients:
    """Returns the gradients that d_act, that of silu(gate) * up, sends back.

    Args:
        gate: bfloat16, as all arrays; M is a multiple of 64, F of 256.
        up: likewise.
        d_act: the gradient of silu(gate) * up; with `dropped`, without what comes
            through down's adapter.
        narrow: S of gate, S of up, and the gradient of down's S; R is a multiple of 16
            and at most `WIDEST`.
        b: of gate and of up, times the scaling.
        dropped: where down's adapter has dropout.
        rate: of it, static; 0 without.
        interpret: simulates the GPU where there is none, for tests.
    """
    rows, columns = gate.shape
    width = b[0].shape[0]
    band = 2 * _ACROSS * _SIDE
    bands, tiles = columns // band, rows // _SIDE
    chunks = max(1, min(hopper.multiprocessors() // bands, tiles))
    at_a_time = _CHUNK if dropped else width
    mask: list[Array] = []
    if dropped is not None:
        (row_words,), (column_words,) = axis_codes([dropped.seeds], gate.shape)
        mask = [row_words, column_words, dropped.a]

    def body(*refs: Any) -> None:
        (*wide_refs, thin_ref, b_gate_ref, b_up_ref), refs = refs[:6], refs[6:]
        mask_refs, refs = refs[: len(mask)], refs[len(mask) :]
        outs, refs = refs[: -9 - len(mask)], refs[-9 - len(mask) :]
        *made_refs, ds_ref, sum_ref = outs
        made_refs = made_refs or wide_refs[:2]
        (wide, thin, b_tiles, buffers), barriers = refs[:4], refs[4:9]
        ready, thin_ready, b_ready, consumed, pair = barriers
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
            plgpu.set_max_registers(hopper.COPY_REGISTERS, action="decrease")
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
                            thin_ref.at[:, rows_of(i)],
                            thin.at[side],
                            thin_ready.at[side],
                        )
                        if mask:
                            plgpu.copy_gmem_to_smem(
                                mask_refs[0].at[rows_of(i)],
                                mask_tiles[0].at[side],
                                thin_ready.at[side],
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
            for ahead in range(_STAGES):  # no phase of a barrier may stay unseen
                step = count * _ACROSS + ahead
                plgpu.barrier_wait(consumed.at[lax.rem(step, _STAGES)])

        def multiply() -> None:
            plgpu.set_max_registers(hopper.MULTIPLY_REGISTERS, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(consumed.at[slot])
            plgpu.barrier_wait(b_ready)
            half = warpgroup

            def through_mask(i: Any, across: int, ds: Any) -> tuple[Array, Array]:
                row_words, column_words, a_tiles = mask_tiles
                words = row_words[lax.rem(i, 2)], column_words[half, across]
                a = hopper.transposed_view(a_tiles.at[half, across])
                return tile_mask(*words, rate), _product(ds, a) * (1 / (1 - rate))

            def tile(i: Any, across: int, ds: Any, sums: Any, d_s: Any) -> None:
                step = i * _ACROSS + across
                slot = lax.rem(step, _STAGES)
                plgpu.barrier_wait(ready.at[slot])
                made = [wide.at[slot, half, j] for j in range(3)]
                _turn(made, through_mask(i, across, ds) if mask else None)
                at = rows_of(i), columns_of(half, across)
                for values, ref in zip(made, made_refs, strict=False):
                    plgpu.copy_smem_to_gmem(values, ref.at[at])
                for j, (values, total) in enumerate(zip(made, sums, strict=True)):
                    own = thin.at[lax.rem(i, 2), pl.ds(j * width, width)]
                    over_rows = hopper.transposed_view(values)
                    plgpu.wgmma(total, over_rows, hopper.transposed_view(own))
                for j, total in enumerate(d_s):
                    own = hopper.transposed_view(b_tiles.at[half, across, j])
                    plgpu.wgmma(total, made[j], own)
                plgpu.wgmma_wait(0)
                # All but these two copies, so the step before is done.
                plgpu.wait_smem_to_gmem(2, wait_read_only=True)

                @pl.when(step > 0)
                def _() -> None:
                    before = lax.rem(step + _STAGES - 1, _STAGES)
                    plgpu.barrier_arrive(consumed.at[before])

            def with_sums(*sums: Any) -> None:
                def row(i: Any, _: Any) -> Any:
                    side = lax.rem(i, 2)
                    plgpu.barrier_wait(thin_ready.at[side])
                    ds = None
                    if mask:
                        ds = _rows(thin.at[side, pl.ds(2 * width, width)], interpret)

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
                    for part in _parts(width, at_a_time):
                        buffers[half] = values[:, part]
                        plgpu.commit_smem()
                        place = chunk, i % 3, columns_of(half, i // 3), part
                        plgpu.copy_smem_to_gmem(buffers.at[half], sum_ref.at[place])
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            acc = plgpu.ACC((_SIDE, width), jnp.float32)
            pl.run_scoped(with_sums, *[acc] * (3 * _ACROSS))

        lax.cond(warpgroup == 2, copy, multiply)

    tiled = functools.partial(
        plgpu.SMEM,
        dtype=gate.dtype,
        transforms=(plgpu.TilingTransform((8, _SIDE)), plgpu.SwizzleTransform(128)),
    )
    wide_type = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    kernel = plgpu.kernel(
        body,
        out_type=[
            *([] if _IN_PLACE else [wide_type, wide_type]),
            jax.ShapeDtypeStruct((bands, 2, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((chunks, 3, columns, width), jnp.float32),
        ],
        scratch_types=[
            tiled((_STAGES, 2, 3, _SIDE, _SIDE)),
            tiled((2, 3 * width, _SIDE)),
            tiled((2, _ACROSS, 2, width, _SIDE)),
            plgpu.SMEM((2, _SIDE, at_a_time), jnp.float32),
            plgpu.Barrier(num_arrivals=6, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2 if mask else 1, num_barriers=2),
            plgpu.Barrier(num_arrivals=(8 if mask else 4) * _ACROSS),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_barriers=2),
            *(_mask_tiles(width, gate.dtype) if mask else []),
        ],
        grid=(bands, chunks),
        grid_names=("band", "chunk"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
    )
    thin = jnp.concatenate([x.T for x in narrow])
    if _IN_PLACE:
        refs = jax.new_ref(gate), jax.new_ref(up)
        d_s, sums = kernel(*refs, d_act, thin, *b, *mask)
        d_gate, d_up = (jax.freeze(ref) for ref in refs)
    else:
        d_gate, d_up, d_s, sums = kernel(gate, up, d_act, thin, *b, *mask)
    (s_gate, s_up), (b_gate, b_up, a_down) = d_s.sum(0), sums.sum(0)
    a_down = a_down * (1 / (1 - rate)) if mask else a_down
    return Gradients(d_gate, d_up, s_gate, s_up, b_gate.T, b_up.T, a_down)


def _mask_tiles(width: int, dtype: Any) -> list[Any]:
    """Returns shared memory for the words of rows and of columns and for A of down."""
    return [
        plgpu.SMEM((2, _SIDE), jnp.uint32),
        plgpu.SMEM((2, _ACROSS, _SIDE), jnp.uint32),
        plgpu.SMEM(
            (2, _ACROSS, _SIDE, width),
            dtype,
            # One product is as deep as a row of the swizzle, here `width`.
            transforms=(
                plgpu.TilingTransform((8, width)),
                plgpu.SwizzleTransform(2 * width),
            ),
        ),
    ]


def _rows(columns: Any, interpret: Any) -> Any:
    """Returns narrow rows, from columns in shared memory, as the tensor cores take them."""
    rows = hopper.transposed_view(columns)
    if interpret:  # there they take no operand from registers
        return rows
    rows = plgpu.layout_cast(rows[...], plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(rows, plgpu.Layout.WGMMA)


def _product(x: Any, y: Any) -> Array:
    """Returns x @ y of one tile."""

    def product(total: Any) -> Array:
        plgpu.wgmma(total, x, y)
        return total[...]

    return pl.run_scoped(product, plgpu.ACC((_SIDE, _SIDE), jnp.float32))


def _turn(tiles: list[Any], through_mask: tuple[Array, Array] | None) -> None:
    """Puts the gradients of gate and up and silu(gate) * up where gate, up, d_act were.

    Through a mask comes a part of d_act, and what is kept of silu(gate) * up.
    """
    dtype = tiles[0].dtype
    g, u, d = (
        plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA).astype(jnp.float32)
        for tile in tiles
    )
    if through_mask is not None:
        keep, sent = through_mask
        d += kept(keep, sent)
    *made, act = hopper_products.through_swiglu(d, g, u)
    made.append(act if through_mask is None else kept(through_mask[0], act))
    for tile, values in zip(tiles, made, strict=True):
        tile[...] = values.astype(dtype)
    plgpu.commit_smem()


def _parts(size: int, at_a_time: int) -> list[slice]:
    return [slice(i, i + at_a_time) for i in range(0, size, at_a_time)]


def _store_both_halves(
    found: list[Array], out: Any, half: Any, buffers: Any, pair: Any
) -> None:
    """Stores the sum of what the two warpgroups found, through one's buffer."""
    parts = _parts(found[0].shape[1], buffers.shape[2])
    for part in parts:

        @pl.when(half == 1)
        def _(part: slice = part) -> None:
            plgpu.barrier_wait(pair.at[0])
            for j, values in enumerate(found):
                buffers[j] = values[:, part]
            plgpu.barrier_arrive(pair.at[1])

        @pl.when(half == 0)
        def _(part: slice = part) -> None:
            # The last row's copy is done: it came before those of the tiles.
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
