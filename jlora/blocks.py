"""The reference's attention in the order that XLA makes fastest on a CPU.

Heads come first, so that a group of queries is one product and no scores are copied, and
blocks of queries skip the keys after them.
"""

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


def _attend(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Array,
) -> Float[Array, "B K G T H"]:
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, K, G T, H]
    scores = jnp.einsum(
        "bkth,bksh->bkts",
        rows,
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(*q.shape[:4], -1) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(*rows.shape[:3], -1)
    out = jnp.einsum("bkts,bksh->bkth", weights, v, precision=precision)
    return out.reshape(q.shape)
