"""Causal attention on a CPU: the reference's sums, in the order that XLA makes fastest.

Heads come before positions, so that a group of queries is one product and no scores are
copied. Blocks of queries skip the keys after them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Every block is compiled by itself, so blocks are large and few.
_LEAST_QUERIES, _MOST_BLOCKS = 128, 4


def attend_on_cpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Returns causal attention within segments, with float32 scores."""
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, length, -1, groups, dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    outs = []
    for begin, end in _blocks(length):
        visible = jnp.arange(begin, end)[:, None] >= jnp.arange(end)[None, :]
        visible = visible[None]  # [1, T, S]
        if segment_ids is not None:
            own = segment_ids[:, begin:end, None]
            visible &= own == segment_ids[:, None, :end]  # [B, T, S]
        seen = k[:, :, :end], v[:, :, :end]
        outs.append(_attend_block(q[:, :, :, begin:end], *seen, visible))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Returns the first position of each block of queries, and the one after its last."""
    size = max(_LEAST_QUERIES, -(-length // _MOST_BLOCKS))
    return [(i, min(i + size, length)) for i in range(0, length, size)]


def mean_keys(length: int) -> float:
    """Returns for how many keys a query has scores, on average over a row's blocks."""
    return sum((end - begin) * end for begin, end in _blocks(length)) / length


@jax.custom_vjp
def _attend_block(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Array,
) -> Float[Array, "B K G T H"]:
    return _block_forward(q, k, v, visible)[0]


def _block_forward(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Any]:
    """Returns the block's output, and what the backward pass needs.

    The outputs [T, H] are divided by the sums, because the weights [T, S] are larger.
    """
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, K, G T, H]
    scores = _einsum("bkth,bksh->bkts", rows, k)
    scores = scores.reshape(*q.shape[:4], -1) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights.reshape(*rows.shape[:3], -1)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = (_einsum("bkts,bksh->bkth", weights, v) / sums).astype(q.dtype)
    return out.reshape(q.shape), (rows, k, v, weights, sums, out)


def _block_backward(residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Returns the gradients, by one pass over the scores.

    Source: "FlashAttention-2" (Dao, 2023), equation of dS.
    """
    rows, k, v, weights, sums, out = residuals
    shape, d_out = d_out.shape, d_out.reshape(rows.shape).astype(jnp.float32)
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True)  # of dP under the weights
    d_out, mean = d_out / sums, mean / sums
    d_out = d_out.astype(out.dtype)
    d_v = _einsum("bkts,bkth->bksh", weights, d_out)
    d_weights = _einsum("bkth,bksh->bkts", d_out, v)
    d_scores = weights * (d_weights - mean) * rows.shape[-1] ** -0.5
    d_scores = d_scores.astype(rows.dtype)
    d_q = _einsum("bkts,bksh->bkth", d_scores, k).astype(rows.dtype)
    d_k = _einsum("bkts,bkth->bksh", d_scores, rows)
    return d_q.reshape(shape), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend_block.defvjp(_block_forward, _block_backward)


def _einsum(axes: str, x: Array, y: Array) -> Array:
    """Returns a float32 einsum: the form that is fast, as in `jlora.ops.matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        axes, x, y, precision=precision, preferred_element_type=jnp.float32
    )
