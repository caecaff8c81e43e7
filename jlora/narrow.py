"""Products with an adapter's narrow side, made while a large array streams past once.

Such a product does few operations per byte, so what counts is how often its large
factor is read. With dropout, every adapter of an input reads it through a mask of its own:
here all of that is done while a tile of the input is at hand.

A narrow array [M, W] holds all adapters of an input side by side, each in the columns
that `placed` gives it: a power of two, as Triton has tiles of no other size. Sums over
parts of a long axis are made apart and then added, in one order, so that a result is the
same every time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, UInt32

from jlora import hopper
from jlora.dropout import codes, is_kept, threshold

# Rows and columns of the large array that a program has at hand at a time.
_ROWS, _COLUMNS = 32, 128
# At most so many programs share a column.
_PARTS = 16
# The least side of a matrix product of the tensor cores.
_LEAST = 16


# The widest adapter: its sums stay in registers.
_MOST = 32


class Adapter(NamedTuple):
    """Of a projection: A [in, R], s B [R, out], float32; the seeds of its dropout, if any."""

    a: Array
    b: Array
    seeds: UInt32[Array, "2"] | None


# Of the projections of one input, None where one has no adapter.
Adapters = Sequence[Adapter | None]


class Dropout(NamedTuple):
    """A rate, and for every adapter of a group what `dropout.seeds` returns."""

    rate: float
    seeds: Sequence[UInt32[Array, "2"]]

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by."""
        return 1 / (1 - self.rate)


def fits(ranks: Sequence[int]) -> bool:
    """Returns whether adapters of these ranks are narrow enough."""
    return all(rank <= _MOST for rank in ranks)


def placed(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (first column, columns) of each adapter in a narrow array."""
    places, start = [], 0
    for rank in ranks:
        width = max(_LEAST, 1 << (rank - 1).bit_length()) if rank else 0
        places.append((start, width))
        start += width
    return places


def ranks(pairs: Adapters) -> list[int]:
    """Returns every adapter's rank, 0 where there is none."""
    return [0 if pair is None else pair.a.shape[1] for pair in pairs]


def wide_a(pairs: Adapters, dtype: Any) -> list[Array | None]:
    """Returns every A with zeros after it, as wide as `placed` has it."""
    return [
        None
        if pair is None
        else jnp.pad(pair.a.astype(dtype), ((0, 0), (0, width - pair.a.shape[1])))
        for pair, (_, width) in zip(pairs, placed(ranks(pairs)), strict=True)
    ]


def wide_b(pairs: Adapters, dtype: Any) -> list[Array | None]:
    """Returns every s B likewise."""
    return [
        None
        if pair is None
        else jnp.pad(pair.b.astype(dtype), ((0, width - pair.b.shape[0]), (0, 0)))
        for pair, (_, width) in zip(pairs, placed(ranks(pairs)), strict=True)
    ]


def joined_a(pairs: Adapters, dtype: Any) -> Array:
    """Returns the A of all pairs side by side: [in, multiple of 64]."""
    wide = [a for a in wide_a(pairs, dtype) if a is not None]
    return padded(jnp.concatenate(wide, axis=1))


def placed_b(pairs: Adapters, sizes: list[int], dtype: Any) -> list[Array]:
    """Returns each pair's B in the rows that its A has as columns of `joined_a`."""
    places = placed(ranks(pairs))
    total = sum(width for _, width in places)
    total += -total % hopper.DEPTH
    result = []
    for pair, size, (start, _) in zip(pairs, sizes, places, strict=True):
        b = jnp.zeros((0, size), dtype) if pair is None else pair.b.astype(dtype)
        result.append(jnp.pad(b, ((start, total - start - b.shape[0]), (0, 0))))
    return result


def padded(x: Array) -> Array:
    """Returns x with columns of zeros after it, to a multiple of what hopper takes."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % hopper.DEPTH)))


class _Masks:
    """The masks of a program's tile, for every adapter of a group."""

    def __init__(self, keys: Any, dropout: Dropout, columns: Array) -> None:
        self._keys, self._columns = keys, columns
        self._limit = threshold(dropout.rate)

    def drop(self, adapter: int, rows: Array, tile: Array) -> Array:
        """Returns the tile with what the adapter's input loses set to 0."""
        keep = is_kept(
            codes(rows, self._keys[2 * adapter])[:, None],
            codes(self._columns, self._keys[2 * adapter + 1])[None, :],
            self._limit,
        )
        return jnp.where(keep, tile, 0)


def down(
    x: Float[Array, "M K"],
    weights: Sequence[Float[Array, "K _"]],
    dropout: Dropout,
    width: int,
) -> Float[Array, "M W"]:
    """Returns drop(x) @ w for every w, each with a mask of its own, side by side.

    M is a multiple of 64, K of 128; the widths of the weights are those of `placed`, and
    zeros fill the columns up to `width`.
    """
    rows, depth = x.shape

    def body(x_ref: Any, keys: Any, *refs: Any) -> None:
        w_refs, out = refs[:-1], refs[-1]
        m = pl.program_id(0) * _ROWS
        mine = pl.ds(m, _ROWS)

        def step(k: Any, sums: Any) -> Any:
            along = pl.ds(k * _COLUMNS, _COLUMNS)
            tile = x_ref[mine, along]
            masks = _Masks(keys, dropout, k * _COLUMNS + jnp.arange(_COLUMNS))
            row = m + jnp.arange(_ROWS)
            return tuple(
                total + plt.dot(masks.drop(i, row, tile), w[along, :])
                for i, (total, w) in enumerate(zip(sums, w_refs, strict=True))
            )

        start = tuple(jnp.zeros((_ROWS, w.shape[1]), jnp.float32) for w in w_refs)
        sums = jax.lax.fori_loop(0, depth // _COLUMNS, step, start)
        column = 0
        for total in sums:
            at = pl.ds(column, total.shape[1])
            out[mine, at] = (dropout.scale * total).astype(out.dtype)
            column += total.shape[1]
        for rest in range(column, width, _LEAST):
            blank = jnp.zeros((_ROWS, _LEAST), out.dtype)
            out[mine, pl.ds(rest, _LEAST)] = blank

    return _call(
        body,
        (rows // _ROWS,),
        [((rows, width), x.dtype)],
        (x, jnp.concatenate(dropout.seeds), *weights),
    )[0]


def through_dropout(
    x: Float[Array, "M K"],
    dx: Float[Array, "M K"],
    ds: Float[Array, "M W"],
    weights: Sequence[Float[Array, "K _"]],
    dropout: Dropout,
) -> tuple[Float[Array, "M K"], list[Float[Array, "K _"]]]:
    """Returns dx with what `down`'s gradient ds adds to it, and every weight's gradient."""
    rows, depth = x.shape
    blocks, parts = _split(rows)
    widths = [w.shape[1] for w in weights]

    def body(x_ref: Any, dx_ref: Any, ds_ref: Any, keys: Any, *refs: Any) -> None:
        w_refs, (out, *sum_refs) = refs[: len(weights)], refs[len(weights) :]
        n, part = pl.program_id(0) * _COLUMNS, pl.program_id(1)
        along = pl.ds(n, _COLUMNS)
        masks = _Masks(keys, dropout, n + jnp.arange(_COLUMNS))

        def step(block: Any, sums: Any) -> Any:
            m = (part * blocks + block) * _ROWS
            mine, row = pl.ds(m, _ROWS), m + jnp.arange(_ROWS)
            tile, total = x_ref[mine, along], dx_ref[mine, along].astype(jnp.float32)
            column, found = 0, []
            for i, (w, made) in enumerate(zip(w_refs, sums, strict=True)):
                own = ds_ref[mine, pl.ds(column, widths[i])]
                sent = plt.dot(own, w[:, along])
                total += dropout.scale * masks.drop(i, row, sent)
                found.append(made + plt.dot(own.T, masks.drop(i, row, tile)))
                column += widths[i]
            out[mine, along] = total.astype(out.dtype)
            return tuple(found)

        start = tuple(jnp.zeros((n, _COLUMNS), jnp.float32) for n in widths)
        sums = jax.lax.fori_loop(0, blocks, step, start)
        for ref, total in zip(sum_refs, sums, strict=True):
            ref[part, :, along] = dropout.scale * total

    out, *sums = _call(
        body,
        (depth // _COLUMNS, parts),
        [(dx.shape, dx.dtype), *(((parts, n, depth), jnp.float32) for n in widths)],
        (x, dx, ds, jnp.concatenate(dropout.seeds), *(w.T for w in weights)),
        aliases={1: 0},
    )
    return out, [total.sum(0).T for total in sums]


def _split(rows: int) -> tuple[int, int]:
    """Returns (tiles of a part, parts) of so many rows."""
    tiles = rows // _ROWS
    parts = math.gcd(tiles, _PARTS)
    return tiles // parts, parts


def _call(
    body: Any,
    grid: tuple[int, ...],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    operands: tuple[Array, ...],
    *,
    aliases: dict[int, int] | None = None,
) -> list[Array]:
    call = pl.pallas_call(
        body,
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=jax.default_backend() != "gpu",  # simulated, for tests
    )
    return list(call(*operands))
