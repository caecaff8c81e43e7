"""Attention of new tokens to the keys and values of a cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attend_cached(
    q: Float[Array, "B T N H"],
    k: Float[Array, "BK S H"],
    v: Float[Array, "BK S H"],
    offset: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / sqrt(H)) v; query t of row b sees key s if s <= offset[b] + t.

    The queries of a group are rows of one product, and the cache is read as it lies.
    Scores are float32.
    """
    batch, length, _, dim = q.shape
    heads, size = k.shape[0] // batch, k.shape[1]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    rows = q.reshape(batch, length, heads, -1, dim).transpose(0, 2, 3, 1, 4)
    groups = rows.shape[2]
    scores = jnp.einsum(
        "xqh,xsh->xqs",
        rows.reshape(batch * heads, -1, dim),
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(batch, heads, groups, length, size) * dim**-0.5
    last = offset[:, None] + jnp.arange(length)  # [B, T]
    visible = last[..., None] >= jnp.arange(size)  # [B, T, S]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch * heads, -1, size)
    out = jnp.einsum("xqs,xsh->xqh", weights, v, precision=precision)
    out = out.reshape(batch, heads, groups, length, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape)
