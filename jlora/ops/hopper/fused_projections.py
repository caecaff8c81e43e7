"""Projections that share an input, and the MLP, as few kernels that read each array once.

The results are those of `LoRADense`, one projection at a time. Here [x, s] @ [[W], [B]]
is a single product, where s = x A and B holds the scaling, and the gradients that q, k
and v, or gate and up, send to their input are a single sum. W gets no gradient.

With dropout every adapter has its own mask: s = drop(x) A, and the gradient of s goes
back to x through the same mask.

In the names below ds is the gradient of s, and d_act that of act = silu(gate) * up.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jlora.ops.hopper import (
    dropout_kernels,
    lora_factors,
    matmul_kernel,
    product_kernels,
    swiglu_kernel,
)
from jlora.ops.hopper.kernel_parts import DEPTH, MAX_RANK
from jlora.ops.hopper.lora_factors import Adapter, Adapters, Dropout
from jlora.ops.hopper.operands import (
    Mode,
    Weights,
    backward_operands,
    forward_operands,
)
from jlora.ops.quantize import QUANTIZED_LEAVES, is_quantized, kernel_shape

Leaves = Mapping[str, Any]
_WEIGHTS = {"kernel", *QUANTIZED_LEAVES}
_ADAPTER = {"lora_A", "lora_B", "lora_scaling"}
# Saved for the backward pass when layers are recomputed: s is small, and computing it
# again would read all of x.
DOWN_NAME = "lora_down"
# Also saved: the outputs that later gradients need, above all those of gate and up.
PRODUCT_NAME = "product"


def takes_weights(leaves: Leaves, dtype: Any) -> bool:
    """Returns whether the kernels support a layer with these leaves (or their shapes)."""
    return (
        set(leaves) - _WEIGHTS in (set(), _ADAPTER)
        and (is_quantized(leaves) or leaves["kernel"].dtype == dtype)
        and all(size % matmul_kernel.COLUMNS == 0 for size in kernel_shape(leaves))
    )


def can_fuse(x: Array, layers: Sequence[Leaves], *, drops: bool) -> bool:
    """Returns whether the kernels support these projections of x."""
    ranks = [leaves["lora_A"].shape[1] for leaves in layers if "lora_A" in leaves]
    return (
        all(takes_weights(leaves, x.dtype) for leaves in layers)
        and x.size // x.shape[-1] % matmul_kernel.ROWS == 0
        and (not drops or max(ranks, default=0) <= MAX_RANK)
    )


def fused_linear(
    x: Float[Array, "B T D"],
    layers: Sequence[Leaves],
    residual: Float[Array, "B T N"] | None = None,
    dropout: Dropout | None = None,
    *,
    codes: bool = False,
) -> list[Float[Array, "B T _"]]:
    """Returns x W + (x A) B * scaling of every projection, in the dtype of x.

    With a residual there is one projection, to which it is added. `dropout` has seeds
    for every layer, also for those without an adapter. With `codes` all weights have one
    quantised format, in which they are multiplied (see `jlora.ops.quantized_matmul`).
    """
    outs: Any = _linear(
        Mode(dropout.rate if dropout else 0.0, codes),
        _rows(x),
        _weights(layers),
        _adapters(layers, dropout),
        _rows(residual),
    )
    return [out.reshape(*x.shape[:-1], -1) for out in outs]


def fused_mlp(
    x: Float[Array, "B T D"],
    layers: Sequence[Leaves],
    residual: Float[Array, "B T D"] | None,
    dropout: Dropout | None = None,
    *,
    codes: bool = False,
) -> Float[Array, "B T D"]:
    """Returns down(silu(gate(x)) * up(x)), added to a residual; layers: gate, up and down.

    `dropout` and `codes` are as for `fused_linear`.
    """
    out: Any = _mlp(
        Mode(dropout.rate if dropout else 0.0, codes),
        _rows(x),
        _weights(layers),
        _adapters(layers, dropout),
        _rows(residual),
    )
    return out.reshape(x.shape)


def _rows(x: Any) -> Any:
    """Returns x with all axes but the last as one."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _weights(layers: Sequence[Leaves]) -> list[Weights]:
    return [{k: leaves[k] for k in leaves if k in _WEIGHTS} for leaves in layers]


def _stored_again(
    weights: list[Weights], dys: list[Array]
) -> tuple[list[Weights], list[Array]]:
    """Returns both unchanged, for the backward pass.

    Without the barrier XLA would use the dequantised kernels of the forward pass, and so
    keep them.
    """
    if any(is_quantized(own) for own in weights):
        weights, dys = jax.lax.optimization_barrier((weights, dys))
    return weights, dys


def _adapters(layers: Sequence[Leaves], dropout: Dropout | None) -> Adapters:
    seeds = dropout.seeds if dropout else [None] * len(layers)
    return [
        # B is the smallest operand to scale, and still float32 here.
        Adapter(leaves["lora_A"], leaves["lora_B"] * leaves["lora_scaling"], seed)
        if "lora_A" in leaves
        else None
        for leaves, seed in zip(layers, seeds, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(*args: Any) -> list[Array]:
    return _linear_forward(*args)[0]


def _linear_forward(
    mode: Mode,
    x: Array,
    weights: list[Weights],
    adapters: Adapters,
    residual: Array | None,
) -> tuple[list[Array], Any]:
    s = _x_times_a(x, adapters, mode.rate)
    outs = product_kernels.sum_of_products(
        forward_operands(x, s, weights, adapters, mode), residual
    )
    return outs, (x, s, weights, adapters, residual is not None)


def _linear_backward(mode: Mode, saved: Any, dys: list[Array]) -> tuple[Any, ...]:
    x, s, weights, adapters, has_residual = saved
    weights, dys = _stored_again(weights, dys)
    ds = _s_gradient(dys, adapters)
    dx, d_a = _x_and_a_gradients(x, dys, ds, weights, adapters, mode)
    gradients = _without_padding(adapters, d_a, _b_gradients(s, dys, adapters))
    return dx, None, gradients, dys[0] if has_residual else None


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(*args: Any) -> Array:
    return _mlp_forward(*args)[0]


def _mlp_forward(
    mode: Mode,
    x: Array,
    weights: list[Weights],
    adapters: Adapters,
    residual: Array | None,
) -> tuple[Array, Any]:
    s = _x_times_a(x, adapters[:2], mode.rate)
    operands = forward_operands(x, s, weights[:2], adapters[:2], mode)
    gate, up, act = product_kernels.swiglu_forward(operands)
    gate, up = (checkpoint_name(y, PRODUCT_NAME) for y in (gate, up))
    s_act = _x_times_a(act, adapters[2:], mode.rate)
    operands = forward_operands(act, s_act, weights[2:], adapters[2:], mode)
    (out,) = product_kernels.sum_of_products(operands, residual)
    return out, (x, s, gate, up, s_act, weights, adapters, residual is not None)


def _mlp_backward(mode: Mode, saved: Any, dy: Array) -> tuple[Any, ...]:
    x, s, gate, up, s_act, weights, adapters, has_residual = saved
    weights, (dy,) = _stored_again(weights, [dy])
    first, last = adapters[:2], adapters[2:]
    ds_act = _s_gradient([dy], last)
    # With dropout the ranks are small enough, as `can_fuse` makes sure.
    if 0 < max(lora_factors.ranks(adapters)) <= MAX_RANK:
        # With dropout the kernel adds what goes through down's adapter to d_act itself.
        through_a = None if mode.rate else ds_act
        d_act = _x_gradient([dy], through_a, weights[2:], last, mode)
        dys, ds, d_b, d_a_last = _gradients_in_one_pass(
            gate, up, d_act, s, ds_act, adapters, mode.rate
        )
    else:
        d_a_last = None if ds_act is None else _outer(_act(gate, up), ds_act)
        operands = backward_operands([dy], ds_act, weights[2:], last, mode)
        dys = product_kernels.swiglu_gradients(operands, gate, up)
        ds, d_b = _s_gradient(dys, first), _b_gradients(s, dys, first)
    d_last = _without_padding(last, [d_a_last], _b_gradients(s_act, [dy], last))
    dx, d_a = _x_and_a_gradients(x, dys, ds, weights[:2], first, mode)
    d_first = _without_padding(first, d_a, d_b)
    return dx, None, [*d_first, *d_last], dy if has_residual else None


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _gradients_in_one_pass(
    gate: Array,
    up: Array,
    d_act: Array,
    s: Array | None,
    ds_act: Array | None,
    adapters: Adapters,
    rate: float,
) -> tuple[list[Array], Array | None, list[Array | None], Array | None]:
    """Returns the gradients of [gate, up], of their s, of their [B, B] and of down's A.

    One kernel reads gate, up and d_act once. It gets zeros for a missing adapter.
    """
    first, last = adapters[:2], adapters[2:]
    dtype, slices = gate.dtype, lora_factors.column_slices(first)
    width = lora_factors.padded_rank(adapters)

    def columns(x: Array | None, place: slice) -> Array:
        x = jnp.zeros((gate.shape[0], 0), dtype) if x is None else x
        return lora_factors.pad_columns(x[:, place], width)

    factors = [*(columns(s, place) for place in slices), columns(ds_act, slice(width))]
    b = [
        jnp.zeros((width, gate.shape[1]), dtype)
        if own is None
        else lora_factors.pad_rows(own, width)
        for own in lora_factors.padded_b(first, dtype)
    ]
    dropout, down_dropout = _dropout(last, rate), None
    if dropout is not None:
        (a,) = lora_factors.padded_a(last, dtype)
        a = columns(a, slice(width))
        down_dropout = swiglu_kernel.DownDropout(a, *dropout.seeds)
    made = swiglu_kernel.swiglu_and_lora_gradients(
        gate, up, d_act, factors, b, down_dropout, rate=rate if dropout else 0.0
    )
    ds = [
        found[:, : place.stop - place.start].astype(dtype)
        for found, place in zip((made.s_gate, made.s_up), slices, strict=True)
    ]
    joined = None
    if s is not None:
        joined = lora_factors.pad_to_depth(jnp.concatenate(ds, axis=1))
    return [made.gate, made.up], joined, [made.b_gate, made.b_up], made.a_down


def _act(gate: Array, up: Array) -> Array:
    """Returns silu(gate) * up, computed in float32."""
    g, u = (x.astype(jnp.float32) for x in (gate, up))
    return (jax.nn.silu(g) * u).astype(gate.dtype)


def _dropout(adapters: Adapters, rate: float) -> Dropout | None:
    """Returns the rate and the seeds of the adapters that exist, None without dropout."""
    seeds = [own.seeds for own in adapters if own is not None]
    return Dropout(rate, seeds) if rate and seeds else None  # type: ignore[arg-type]


def _x_times_a(x: Array, adapters: Adapters, rate: float) -> Array | None:
    """Returns s = x A of all adapters side by side; None if there are none."""
    if not any(adapters):
        return None
    dropout = _dropout(adapters, rate)
    if dropout is None:
        a = lora_factors.concatenated_a(adapters, x.dtype)
        s = x @ a
    else:
        factors = lora_factors.padded_a(adapters, x.dtype)
        width = sum(a.shape[1] for a in factors)
        width += -width % DEPTH
        s = dropout_kernels.dropped_x_times_a(
            x, factors, dropout.seeds, rate=rate, width=width
        )
    return checkpoint_name(s, DOWN_NAME)


def _s_gradient(dys: list[Array], adapters: Adapters) -> Array | None:
    """Returns ds = dy B^T of all adapters side by side, as wide as s."""
    parts = [
        dy @ b.T
        for dy, b in zip(
            dys, lora_factors.padded_b(adapters, dys[0].dtype), strict=True
        )
        if b is not None
    ]
    return lora_factors.pad_to_depth(jnp.concatenate(parts, axis=1)) if parts else None


def _x_gradient(
    dys: list[Array],
    ds: Array | None,
    weights: list[Weights],
    adapters: Adapters,
    mode: Mode,
    addend: Array | None = None,
) -> Array:
    operands = backward_operands(dys, ds, weights, adapters, mode)
    return product_kernels.sum_of_products(operands, addend)[0]


def _x_and_a_gradients(
    x: Array,
    dys: list[Array],
    ds: Array | None,
    weights: list[Weights],
    adapters: Adapters,
    mode: Mode,
) -> tuple[Array, Sequence[Array | None]]:
    """Returns the gradient of x, and those of every A, float32 and still padded."""
    if ds is None:
        dx = _x_gradient(dys, None, weights, adapters, mode)
        return dx, [None] * len(adapters)
    dropout = _dropout(adapters, mode.rate)
    if dropout is None:
        d_a = _outer(x, ds)
        d_as = [d_a[:, place] for place in lora_factors.column_slices(adapters)]
        return _x_gradient(dys, ds, weights, adapters, mode), d_as
    factors = lora_factors.padded_a(adapters, x.dtype)
    through_a, found = dropout_kernels.dropped_x_times_a_gradients(
        x, ds, factors, dropout.seeds, rate=mode.rate
    )
    remaining = iter(found)
    d_as = [None if own is None else next(remaining) for own in adapters]
    return _x_gradient(dys, None, weights, adapters, mode, through_a), d_as


def _b_gradients(
    s: Array | None, dys: list[Array], adapters: Adapters
) -> list[Array | None]:
    """Returns the gradients of every B, float32 and still padded."""
    if s is None:
        return [None] * len(adapters)
    slices = lora_factors.column_slices(adapters)
    return [
        None if own is None else _outer(s, dy)[place]
        for own, dy, place in zip(adapters, dys, slices, strict=True)
    ]


def _without_padding(
    adapters: Adapters, d_a: Sequence[Array | None], d_b: Sequence[Array | None]
) -> list[Any]:
    """Returns the gradients in the form of `adapters`, cut to the ranks."""
    ranks = lora_factors.ranks(adapters)
    return [
        None if own is None else Adapter(a[:, :rank], b[:rank], None)  # type: ignore[index]
        for own, a, b, rank in zip(adapters, d_a, d_b, ranks, strict=True)
    ]


def _outer(x: Array, y: Array) -> Array:
    """Returns x^T @ y in float32."""
    axes = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
