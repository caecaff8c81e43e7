"""The reference's attention in the order that XLA makes fastest on a CPU.

Heads come first, so that a group of queries is one product and no scores are copied, and
blocks of queries skip the keys after them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Queries per block, at least, and blocks per row, at most: each is compiled by itself.
_QUERIES, _BLOCKS = 128, 4


def block_attend(
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
    size = max(_QUERIES, -(-length // _BLOCKS))
    outs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        visible = visible[None]  # [1, T, S]
        if segment_ids is not None:
            own = segment_ids[:, start:stop, None]
            visible &= own == segment_ids[:, None, :stop]  # [B, T, S]
        seen = k[:, :, :stop], v[:, :, :stop]
        outs.append(_attend(q[:, :, :, start:stop], *seen, visible))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim)


@jax.custom_vjp
def _attend(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Array,
) -> Float[Array, "B K G T H"]:
    return _forward(q, k, v, visible)[0]


def _forward(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Any]:
    """Returns the block's output and what its gradient reads.

    The sums divide outputs [T, H], not weights [T, S], which is the longer pass.
    """
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, K, G T, H]
    scores = _product("bkth,bksh->bkts", rows, k)
    scores = scores.reshape(*q.shape[:4], -1) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights.reshape(*rows.shape[:3], -1)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = (_product("bkts,bksh->bkth", weights, v) / sums).astype(q.dtype)
    return out.reshape(q.shape), (rows, k, v, weights, sums, out)


def _backward(kept: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Returns the gradients by one pass over the scores, as flash attention does.

    Source: "FlashAttention-2" (Dao, 2023), equation of dS.
    """
    rows, k, v, weights, sums, out = kept
    shape, d_out = d_out.shape, d_out.reshape(rows.shape).astype(jnp.float32)
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True)  # of dP under the weights
    d_out = d_out / sums
    mean = mean / sums
    d_out = d_out.astype(out.dtype)
    d_v = _product("bkts,bkth->bksh", weights, d_out)
    d_weights = _product("bkth,bksh->bkts", d_out, v)
    d_scores = weights * (d_weights - mean) * rows.shape[-1] ** -0.5
    d_scores = d_scores.astype(rows.dtype)
    d_q = _product("bkts,bksh->bkth", d_scores, k).astype(rows.dtype)
    d_k = _product("bkts,bkth->bksh", d_scores, rows)
    return d_q.reshape(shape), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _product(axes: str, x: Array, y: Array) -> Array:
    """Returns a float32 einsum, which is the form that is fast; see `jlora.ops.matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        axes, x, y, precision=precision, preferred_element_type=jnp.float32
    )
