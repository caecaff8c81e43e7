"""The projections of a layer that share their input, as few kernels of `jlora.hopper`.

The same sums as `LoRADense` makes one by one, grouped so that each large array is read
and written once: x W + (x A) s B is one product whose inner length is longer by the
rank, and the gradients that q, k and v (or gate and up) send to their common input are
one sum. The frozen kernels get no gradient here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jlora import hopper

Leaves = Mapping[str, Any]
# (A [in, R], s B [R, out]) of a projection, float32, or None where it has no adapter.
Pair = tuple[Array, Array] | None
_PLAIN = {"kernel"}
_ADAPTED = {"kernel", "lora_A", "lora_B", "lora_scaling"}
# What a recomputing backward pass keeps: x A, a few numbers per token, which would
# otherwise be one more read of x.
DOWN_NAME = "lora_down"
# And the outputs that later gradients read, those of gate and up first of all.
PRODUCT_NAME = "product"


def can_fuse(x: Array, layers: Sequence[Leaves]) -> bool:
    """Returns whether these projections of x are of the form and size fused here."""
    sizes = [size for leaves in layers for size in leaves["kernel"].shape]
    return (
        all(set(leaves) in (_PLAIN, _ADAPTED) for leaves in layers)
        and all(leaves["kernel"].dtype == x.dtype for leaves in layers)
        and x.size // x.shape[-1] % hopper.ROWS == 0
        and all(size % hopper.COLUMNS == 0 for size in sizes)
    )


def project(
    x: Float[Array, "B T D"],
    layers: Sequence[Leaves],
    residual: Float[Array, "B T N"] | None = None,
) -> list[Float[Array, "B T _"]]:
    """Returns x W + (x A) s B for every projection, in the dtype of x.

    A residual is added to the output, where there is one projection.
    """
    kernels = [leaves["kernel"] for leaves in layers]
    outs = _project(_flat(x), kernels, _pairs(layers), _flat(residual))
    return [out.reshape(*x.shape[:-1], -1) for out in outs]


def swiglu(
    x: Float[Array, "B T D"],
    layers: Sequence[Leaves],
    residual: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    """Returns residual + down(silu(gate(x)) * up(x)); layers: gate, up and down."""
    kernels = [leaves["kernel"] for leaves in layers]
    out = _swiglu(_flat(x), kernels, _pairs(layers), _flat(residual))
    return out.reshape(x.shape)


def _flat(x: Any) -> Any:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _pairs(layers: Sequence[Leaves]) -> list[Pair]:
    # The scale is applied to B, the smallest operand, before it is rounded.
    return [
        (leaves["lora_A"], leaves["lora_B"] * leaves["lora_scaling"])
        if "lora_A" in leaves
        else None
        for leaves in layers
    ]


@jax.custom_vjp
def _project(
    x: Array, kernels: list[Array], pairs: list[Pair], residual: Array | None
) -> list[Array]:
    return _project_forward(x, kernels, pairs, residual)[0]


def _project_forward(
    x: Array, kernels: list[Array], pairs: list[Pair], residual: Array | None
) -> tuple[list[Array], Any]:
    s = _down(x, pairs)
    outs = hopper.sum_of_products(*_terms(x, s, kernels, pairs), residual)
    return outs, (x, s, kernels, pairs, residual is not None)


def _project_backward(residuals: Any, dys: list[Array]) -> tuple[Any, ...]:
    x, s, kernels, pairs, has_residual = residuals
    ds = _d_down(dys, pairs)
    dx = _dx(dys, ds, kernels, pairs)
    d_pairs = _d_pairs(x, s, dys, ds, pairs)
    return dx, None, d_pairs, dys[0] if has_residual else None


_project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def _swiglu(
    x: Array, kernels: list[Array], pairs: list[Pair], residual: Array
) -> Array:
    return _swiglu_forward(x, kernels, pairs, residual)[0]


def _swiglu_forward(
    x: Array, kernels: list[Array], pairs: list[Pair], residual: Array
) -> tuple[Array, Any]:
    s = _down(x, pairs[:2])
    xs, (gates, ups) = _terms(x, s, kernels[:2], pairs[:2])
    gate, up, act = hopper.swiglu(xs, gates, ups)
    gate, up = (checkpoint_name(y, PRODUCT_NAME) for y in (gate, up))
    s_act = _down(act, pairs[2:])
    terms = _terms(act, s_act, kernels[2:], pairs[2:])
    (out,) = hopper.sum_of_products(*terms, residual)
    return out, (x, s, gate, up, s_act, kernels, pairs)


def _swiglu_backward(residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, s, gate, up, s_act, kernels, pairs = residuals
    ds_act = _d_down([dy], pairs[2:])
    d_act = _dx([dy], ds_act, kernels[2:], pairs[2:])
    act, d_gate, d_up = _swiglu_gradients(gate, up, d_act)
    d_last = _d_pairs(act, s_act, [dy], ds_act, pairs[2:])
    ds = _d_down([d_gate, d_up], pairs[:2])
    dx = _dx([d_gate, d_up], ds, kernels[:2], pairs[:2])
    d_first = _d_pairs(x, s, [d_gate, d_up], ds, pairs[:2])
    return dx, None, [*d_first, *d_last], dy


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _swiglu_gradients(gate: Array, up: Array, d_act: Array) -> tuple[Array, ...]:
    """Returns silu(gate) * up and the gradients of gate and up, summed in float32."""
    g, u, d = (x.astype(jnp.float32) for x in (gate, up, d_act))
    share = jax.nn.sigmoid(g)
    d_gate = d * u * share * (1 + g * (1 - share))
    results = (g * share * u, d_gate, d * g * share)
    return tuple(x.astype(gate.dtype) for x in results)


def _ranks(pairs: list[Pair]) -> list[int]:
    return [0 if pair is None else pair[0].shape[1] for pair in pairs]


def _joined_a(pairs: list[Pair], dtype: Any) -> Array:
    """Returns the A of all pairs side by side, zeros after them: [in, multiple of 64]."""
    a = jnp.concatenate([pair[0].astype(dtype) for pair in pairs if pair], axis=1)
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % hopper.DEPTH)))


def _placed_b(pairs: list[Pair], sizes: list[int], dtype: Any) -> list[Array]:
    """Returns each pair's B in the rows that its A has as columns of `_joined_a`."""
    ranks = _ranks(pairs)
    total = sum(ranks) + -sum(ranks) % hopper.DEPTH
    placed = []
    for i, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
        b = jnp.zeros((0, size), dtype) if pair is None else pair[1].astype(dtype)
        before = sum(ranks[:i])
        placed.append(jnp.pad(b, ((before, total - before - ranks[i]), (0, 0))))
    return placed


def _down(x: Array, pairs: list[Pair]) -> Array | None:
    """Returns x A for all pairs at once, or None without any."""
    if not any(pairs):
        return None
    return checkpoint_name(_dot(x, _joined_a(pairs, x.dtype)), DOWN_NAME)


def _terms(
    x: Array, s: Array | None, kernels: list[Array], pairs: list[Pair]
) -> tuple[list[Array], list[list[Array]]]:
    """Returns what to multiply: [x, x A] and per projection [W, B]."""
    if s is None:
        return [x], [[kernel] for kernel in kernels]
    placed = _placed_b(pairs, [kernel.shape[1] for kernel in kernels], x.dtype)
    return [x, s], [list(group) for group in zip(kernels, placed, strict=True)]


def _d_down(dys: list[Array], pairs: list[Pair]) -> Array | None:
    """Returns the gradient of x A, as wide as it."""
    parts = [
        _dot(dy, pair[1].astype(dy.dtype), transposed=True)
        for dy, pair in zip(dys, pairs, strict=True)
        if pair is not None
    ]
    if not parts:
        return None
    ds = jnp.concatenate(parts, axis=1)
    return jnp.pad(ds, ((0, 0), (0, -ds.shape[1] % hopper.DEPTH)))


def _dx(
    dys: list[Array], ds: Array | None, kernels: list[Array], pairs: list[Pair]
) -> Array:
    xs, weights = list(dys), list(kernels)
    if ds is not None:
        xs.append(ds)
        weights.append(_joined_a(pairs, ds.dtype))
    return hopper.sum_of_products(xs, [weights], transposed=True)[0]


def _d_pairs(
    x: Array, s: Array | None, dys: list[Array], ds: Array | None, pairs: list[Pair]
) -> list[Pair]:
    """Returns the float32 gradients of every A and s B."""
    if s is None or ds is None:
        return [None] * len(pairs)
    d_a = _outer(x, ds)
    ranks = _ranks(pairs)
    found: list[Pair] = []
    for i, (dy, rank) in enumerate(zip(dys, ranks, strict=True)):
        mine = slice(sum(ranks[:i]), sum(ranks[:i]) + rank)
        found.append((d_a[:, mine], _outer(s, dy)[mine]) if rank else None)
    return found


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
