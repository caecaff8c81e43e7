"""The products of the Hopper kernels in plain JAX, with the kernels' names and arguments.

Sums are float32, as in the kernels, and gradients are rounded once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.ops import quantized_matmul
from jlora.ops.dropout import drop_by
from jlora.ops.hopper.operands import Operands
from jlora.ops.hopper.swiglu_kernel import DownDropout, Gradients


def sum_of_products(operands: Operands, addend: Any = None) -> list[Any]:
    return [
        total + (0 if addend is None else addend)
        for total in _sums(operands, jnp.matmul)
    ]


def swiglu_forward(operands: Operands) -> list[jax.Array]:
    g, u = sum_of_products(operands)
    return [g, u, jax.nn.silu(g) * u]


def swiglu_gradients(
    operands: Operands, gate: jax.Array, up: jax.Array
) -> list[jax.Array]:
    (d_act,) = _sums(operands, dot)
    return _through_swiglu(gate, up, d_act)[1]


def quantize_rows(arrays: Any, dtype: Any, factors: Any = ()) -> Any:
    wide = [x.astype(jnp.float32) for x in arrays]
    if factors:
        wide = [x * own for x, own in zip(wide, factors, strict=True)]
    return quantized_matmul.quantize_rows(wide, dtype)


def _sums(operands: Operands, product: Any) -> list[jax.Array]:
    return [_sum(operands, i, product) for i in range(len(operands.weights))]


def _sum(operands: Operands, i: int, product: Any) -> jax.Array:
    total: Any = 0
    scales, dtype = operands.scales, operands.xs[-1].dtype
    for x, w in zip(operands.xs, operands.weights[i], strict=True):
        w = w.T if operands.transposed else w
        if x.dtype.itemsize > 1:
            total += product(x, w)
            continue
        assert scales is not None
        wide = dot(x.astype(jnp.float32), w.astype(jnp.float32))
        wide *= scales.rows[:, None]
        wide *= scales.columns[i] if scales.columns else 1
        total += wide if dtype.itemsize == 1 else wide.astype(dtype)
    return total


def swiglu_and_lora_gradients(
    gate: jax.Array,
    up: jax.Array,
    d_act: jax.Array,
    factors: Any,
    b: Any,
    dropout: DownDropout | None = None,
    *,
    rate: float = 0.0,
) -> Gradients:
    d_act = d_act.astype(jnp.float32)
    if dropout is not None:
        d_act += drop_by(dot(factors[2], dropout.a.T), dropout.seeds, rate)
    act, dys = _through_swiglu(gate, up, d_act)
    act = act.astype(gate.dtype)
    if dropout is not None:
        act = drop_by(act.astype(jnp.float32), dropout.seeds, rate)
    return Gradients(
        gate=dys[0],
        up=dys[1],
        s_gate=dot(dys[0], b[0].T),
        s_up=dot(dys[1], b[1].T),
        b_gate=dot(factors[0].T, dys[0]),
        b_up=dot(factors[1].T, dys[1]),
        a_down=dot(act.T, factors[2].astype(act.dtype)),
    )


def _through_swiglu(gate: jax.Array, up: jax.Array, d_act: Any) -> Any:
    wide = [x.astype(jnp.float32) for x in (gate, up)]
    act, back = jax.vjp(lambda g, u: jax.nn.silu(g) * u, *wide)
    return act, [y.astype(gate.dtype) for y in back(d_act)]


def dropped_x_times_a(
    x: jax.Array, factors: Any, seeds: Any, *, rate: float, width: int
) -> jax.Array:
    pairs = zip(factors, seeds, strict=True)
    made = jnp.concatenate([drop_by(x, seed, rate) @ a for a, seed in pairs], axis=1)
    return jnp.pad(made, ((0, 0), (0, width - made.shape[1])))


def dropped_x_times_a_gradients(
    x: jax.Array, ds: jax.Array, factors: Any, seeds: Any, *, rate: float
) -> tuple[jax.Array, list[jax.Array]]:
    width = sum(a.shape[1] for a in factors)
    parts = jnp.split(ds[:, :width], len(factors), axis=1)
    terms = list(zip(parts, factors, seeds, strict=True))
    through_a = [drop_by(own @ a.T, seed, rate) for own, a, seed in terms]
    sums = [drop_by(x, seed, rate).T @ own for own, _, seed in terms]
    return sum(through_a), sums  # type: ignore[return-value]


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest", preferred_element_type=jnp.float32)
