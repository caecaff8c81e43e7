"""The projections of a layer that share their input, as few kernels of `product_kernels`.

The same sums as `LoRADense` makes one by one, grouped so that each large array is read
and written once: x W + (x A) s B is one product whose inner length is longer by the
rank, and the gradients that q, k and v (or gate and up) send to their common input are
one sum. The frozen kernels get no gradient here.

With dropout each adapter has a mask of its own for the common input, so that s becomes
drop(x) A and its gradient reaches x through that mask; `dropout_kernels` does both,
but for down's gradient, which `swiglu_kernel` has at hand. The file is long because
the two custom gradients, of a group and of the MLP, share all their parts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jlora.ops.hopper import dropout_kernels as hopper_dropout
from jlora.ops.hopper import low_rank as narrow
from jlora.ops.hopper import matmul_kernel as hopper
from jlora.ops.hopper import product_kernels as hopper_products
from jlora.ops.hopper import swiglu_kernel as hopper_swiglu
from jlora.ops.hopper.low_rank import Adapter, Adapters, Dropout, placed

Leaves = Mapping[str, Any]
_PLAIN = {"kernel"}
_ADAPTED = {"kernel", "lora_A", "lora_B", "lora_scaling"}
# What a recomputing backward pass keeps: x A, a few numbers per token, which would
# otherwise be one more read of x.
DOWN_NAME = "lora_down"
# And the outputs that later gradients read, those of gate and up first of all.
PRODUCT_NAME = "product"


def can_fuse(x: Array, layers: Sequence[Leaves], *, drops: bool) -> bool:
    """Returns whether these projections of x are of the form and size fused here."""
    sizes = [size for leaves in layers for size in leaves["kernel"].shape]
    ranks = [leaves["lora_A"].shape[1] for leaves in layers if "lora_A" in leaves]
    return (
        all(set(leaves) in (_PLAIN, _ADAPTED) for leaves in layers)
        and all(leaves["kernel"].dtype == x.dtype for leaves in layers)
        and x.size // x.shape[-1] % hopper.ROWS == 0
        and all(size % hopper.COLUMNS == 0 for size in sizes)
        and (not drops or narrow.fits(ranks))
    )


def project(
    x: Float[Array, "B T D"],
    layers: Sequence[Leaves],
    residual: Float[Array, "B T N"] | None = None,
    dropout: Dropout | None = None,
) -> list[Float[Array, "B T _"]]:
    """Returns x W + (x A) s B for every projection, in the dtype of x.

    A residual is added to the output, where there is one projection. Dropout has seeds
    for every layer, also for one without an adapter.
    """
    kernels = [leaves["kernel"] for leaves in layers]
    outs: Any = _project(
        _rate(dropout), _flat(x), kernels, _pairs(layers, dropout), _flat(residual)
    )
    return [out.reshape(*x.shape[:-1], -1) for out in outs]


def swiglu(
    x: Float[Array, "B T D"],
    layers: Sequence[Leaves],
    residual: Float[Array, "B T D"],
    dropout: Dropout | None = None,
) -> Float[Array, "B T D"]:
    """Returns residual + down(silu(gate(x)) * up(x)); layers: gate, up and down."""
    kernels = [leaves["kernel"] for leaves in layers]
    out: Any = _swiglu(
        _rate(dropout), _flat(x), kernels, _pairs(layers, dropout), _flat(residual)
    )
    return out.reshape(x.shape)


def _flat(x: Any) -> Any:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _rate(dropout: Dropout | None) -> float:
    return dropout.rate if dropout else 0.0


def _pairs(layers: Sequence[Leaves], dropout: Dropout | None) -> Adapters:
    # The scale is applied to B, the smallest operand, before it is rounded.
    seeds = dropout.seeds if dropout else [None] * len(layers)
    return [
        Adapter(leaves["lora_A"], leaves["lora_B"] * leaves["lora_scaling"], seed)
        if "lora_A" in leaves
        else None
        for leaves, seed in zip(layers, seeds, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(
    rate: float,
    x: Array,
    kernels: list[Array],
    pairs: Adapters,
    residual: Array | None,
) -> list[Array]:
    return _project_forward(rate, x, kernels, pairs, residual)[0]


def _project_forward(
    rate: float,
    x: Array,
    kernels: list[Array],
    pairs: Adapters,
    residual: Array | None,
) -> tuple[list[Array], Any]:
    s = _down(x, pairs, rate)
    outs = hopper_products.sum_of_products(*_terms(x, s, kernels, pairs), residual)
    return outs, (x, s, kernels, pairs, residual is not None)


def _project_backward(rate: float, residuals: Any, dys: list[Array]) -> tuple[Any, ...]:
    x, s, kernels, pairs, has_residual = residuals
    ds = _d_down(dys, pairs)
    dx, d_a = _d_input(x, dys, ds, kernels, pairs, rate)
    d_pairs = _joined_gradients(pairs, d_a, _d_b(s, dys, pairs))
    return dx, None, d_pairs, dys[0] if has_residual else None


_project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(
    rate: float, x: Array, kernels: list[Array], pairs: Adapters, residual: Array
) -> Array:
    return _swiglu_forward(rate, x, kernels, pairs, residual)[0]


def _swiglu_forward(
    rate: float, x: Array, kernels: list[Array], pairs: Adapters, residual: Array
) -> tuple[Array, Any]:
    s = _down(x, pairs[:2], rate)
    xs, (gates, ups) = _terms(x, s, kernels[:2], pairs[:2])
    gate, up, act = hopper_products.swiglu(xs, gates, ups)
    gate, up = (checkpoint_name(y, PRODUCT_NAME) for y in (gate, up))
    s_act = _down(act, pairs[2:], rate)
    terms = _terms(act, s_act, kernels[2:], pairs[2:])
    (out,) = hopper_products.sum_of_products(*terms, residual)
    return out, (x, s, gate, up, s_act, kernels, pairs)


def _swiglu_backward(rate: float, residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, s, gate, up, s_act, kernels, pairs = residuals
    first, last = pairs[:2], pairs[2:]
    ds_act = _d_down([dy], last)
    if _streams(pairs):
        # What comes through down's adapter is added where its mask is made.
        d_act = _dx([dy], None if rate else ds_act, kernels[2:], last)
        dys, ds, d_b, d_a_last = _stream(gate, up, d_act, s, ds_act, pairs, rate)
    else:
        d_a_last = None if ds_act is None else _outer(_act(gate, up), ds_act)
        terms = _back_terms([dy], ds_act, kernels[2:], last)
        dys = hopper_products.swiglu_gradients(*terms, gate, up)
        ds, d_b = _d_down(dys, first), _d_b(s, dys, first)
    d_last = _joined_gradients(last, [d_a_last], _d_b(s_act, [dy], last))
    dx, d_a = _d_input(x, dys, ds, kernels[:2], first, rate)
    d_first = _joined_gradients(first, d_a, d_b)
    return dx, None, [*d_first, *d_last], dy


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _streams(pairs: Adapters) -> bool:
    """Returns whether gate, up or down has an adapter, and none is too wide.

    With dropout none is: `can_fuse`.
    """
    return 0 < max(narrow.ranks(pairs)) <= hopper_swiglu.WIDEST


def _stream(
    gate: Array,
    up: Array,
    d_act: Array,
    s: Array | None,
    ds_act: Array | None,
    pairs: Adapters,
    rate: float,
) -> tuple[list[Array], Array | None, list[Array | None], Array | None]:
    """Returns the gradients of gate and up, of their S, of their s B, and of down's A.

    They come from one pass over the wide arrays. An adapter that is missing is zeros.
    """
    places = placed(narrow.ranks(pairs[:2]))
    width = max(width for _, width in placed(narrow.ranks(pairs)))

    def columns(x: Array | None, start: int, size: int) -> Array:
        x = jnp.zeros((gate.shape[0], 0), gate.dtype) if x is None else x
        x = x[:, start : start + size]
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))

    thin = [columns(s, *place) for place in places] + [columns(ds_act, 0, width)]
    wide_b = [
        jnp.zeros((width, gate.shape[1]), gate.dtype)
        if b is None
        else jnp.pad(b, ((0, width - b.shape[0]), (0, 0)))
        for b in narrow.wide_b(pairs[:2], gate.dtype)
    ]
    dropout, dropped = _dropout(pairs[2:], rate), None
    if dropout is not None:
        (a,) = narrow.wide_a(pairs[2:], gate.dtype)
        dropped = hopper_swiglu.Dropped(columns(a, 0, width), *dropout.seeds)
    made = hopper_swiglu.swiglu_backward(
        gate, up, d_act, thin, wide_b, dropped, rate=rate if dropped else 0.0
    )
    d_s = [
        found[:, :size].astype(gate.dtype)
        for found, (_, size) in zip((made.s_gate, made.s_up), places, strict=True)
    ]
    ds = None if s is None else narrow.padded(jnp.concatenate(d_s, axis=1))
    d_b: list[Array | None] = [made.b_gate, made.b_up]
    return [made.gate, made.up], ds, d_b, made.a_down


def _act(gate: Array, up: Array) -> Array:
    """Returns silu(gate) * up, computed in float32."""
    g, u = (x.astype(jnp.float32) for x in (gate, up))
    return (jax.nn.silu(g) * u).astype(gate.dtype)


def _dropout(pairs: Adapters, rate: float) -> Dropout | None:
    """Returns the dropout of the adapters among the pairs, if there is any."""
    seeds = [pair.seeds for pair in pairs if pair is not None]
    return Dropout(rate, seeds) if rate and seeds else None  # type: ignore[arg-type]


def _down(x: Array, pairs: Adapters, rate: float) -> Array | None:
    """Returns x A for all pairs at once, dropped before it, or None without any."""
    if not any(pairs):
        return None
    dropout = _dropout(pairs, rate)
    if dropout is None:
        s = _dot(x, narrow.joined_a(pairs, x.dtype))
    else:
        wide = [a for a in narrow.wide_a(pairs, x.dtype) if a is not None]
        width = sum(a.shape[1] for a in wide)
        width += -width % hopper.DEPTH
        s = hopper_dropout.down(x, wide, dropout.seeds, rate=dropout.rate, width=width)
    return checkpoint_name(s, DOWN_NAME)


def _terms(
    x: Array, s: Array | None, kernels: list[Array], pairs: Adapters
) -> tuple[list[Array], list[list[Array]]]:
    """Returns what to multiply: [x, x A] and per projection [W, B]."""
    if s is None:
        return [x], [[kernel] for kernel in kernels]
    b = narrow.placed_b(pairs, [kernel.shape[1] for kernel in kernels], x.dtype)
    return [x, s], [list(group) for group in zip(kernels, b, strict=True)]


def _d_down(dys: list[Array], pairs: Adapters) -> Array | None:
    """Returns the gradient of x A, as wide as it."""
    parts = [
        _dot(dy, b, transposed=True)
        for dy, b in zip(dys, narrow.wide_b(pairs, dys[0].dtype), strict=True)
        if b is not None
    ]
    return narrow.padded(jnp.concatenate(parts, axis=1)) if parts else None


def _dx(
    dys: list[Array],
    ds: Array | None,
    kernels: list[Array],
    pairs: Adapters,
    addend: Array | None = None,
) -> Array:
    xs, weights = _back_terms(dys, ds, kernels, pairs)
    return hopper_products.sum_of_products(xs, [weights], addend, transposed=True)[0]


def _back_terms(
    dys: list[Array], ds: Array | None, kernels: list[Array], pairs: Adapters
) -> tuple[list[Array], list[Array]]:
    """Returns what to multiply for the input's gradient: [dy..., dS] and [W..., A]."""
    if ds is None:
        return dys, kernels
    return [*dys, ds], [*kernels, narrow.joined_a(pairs, ds.dtype)]


def _d_input(
    x: Array,
    dys: list[Array],
    ds: Array | None,
    kernels: list[Array],
    pairs: Adapters,
    rate: float,
) -> tuple[Array, Sequence[Array | None]]:
    """Returns the gradients of x and, float32 and as wide as in s, of every A."""
    dropout = _dropout(pairs, rate)
    if ds is None:
        return _dx(dys, None, kernels, pairs), [None] * len(pairs)
    if dropout is None:
        d_a, places = _outer(x, ds), placed(narrow.ranks(pairs))
        d_as = [d_a[:, start : start + width] for start, width in places]
        return _dx(dys, ds, kernels, pairs), d_as
    wide = [a for a in narrow.wide_a(pairs, x.dtype) if a is not None]
    sent, found = hopper_dropout.through_dropout(
        x, ds, wide, dropout.seeds, rate=dropout.rate
    )
    each = iter(found)
    d_a = [None if pair is None else next(each) for pair in pairs]
    return _dx(dys, None, kernels, pairs, sent), d_a


def _d_b(s: Array | None, dys: list[Array], pairs: Adapters) -> list[Array | None]:
    """Returns the float32 gradients of every s B, with the rows of its place."""
    if s is None:
        return [None] * len(pairs)
    return [
        _outer(s, dy)[start : start + width] if pair is not None else None
        for pair, dy, (start, width) in zip(
            pairs, dys, placed(narrow.ranks(pairs)), strict=True
        )
    ]


def _joined_gradients(
    pairs: Adapters, d_a: Sequence[Array | None], d_b: Sequence[Array | None]
) -> list[Any]:
    """Returns the gradients as `_pairs` has them, without what pads them."""
    return [
        None if pair is None else Adapter(a[:, :rank], b[:rank], None)  # type: ignore[index]
        for pair, a, b, rank in zip(pairs, d_a, d_b, narrow.ranks(pairs), strict=True)
    ]


def _dot(x: Array, w: Array, *, transposed: bool = False) -> Array:
    """Returns x @ w, or x @ w^T, in the dtype of x."""
    return jnp.matmul(x, w.T if transposed else w, precision=_precision(x))


def _outer(x: Array, y: Array) -> Array:
    """Returns x^T @ y in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((0,), (0,)), ((), ())),
        precision=_precision(x),
        preferred_element_type=jnp.float32,
    )


def _precision(x: Array) -> Any:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
