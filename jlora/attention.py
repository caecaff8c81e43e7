"""Causal grouped-query attention behind one function, with segment ids throughout.

`xla` is the reference, with float32 scores, and runs everywhere. `cudnn` is the flash
kernel on NVIDIA GPUs; it takes no segment ids, and asking it to is an error.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.errors import UsageError


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    offset: Int[Array, ""] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / sqrt(H)) v over the keys each query may see.

    Query t sees key s if s <= t (+ `offset`, the number of tokens before this call in a
    cache) and, given `segment_ids`, both lie in the same segment.

    Raises:
        UsageError: cudnn with segment ids or in float32.
    """
    if implementation == "cudnn" and offset is None:
        if segment_ids is not None:
            raise UsageError(
                "compute.attention=cudnn does not take packed rows; "
                "use xla or auto, or turn data.packing off"
            )
        if q.dtype == jnp.float32:
            raise UsageError(
                "compute.attention=cudnn needs compute.dtype bfloat16, found float32"
            )
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    return _reference(q, k, v, segment_ids, offset)


def choose_attention(wanted: str, *, packed: bool, dtype: Any) -> str:
    """Returns the implementation that `auto` stands for here.

    Raises:
        UsageError: cudnn is wanted where it cannot run.
    """
    gpu = jax.default_backend() == "gpu"
    if wanted == "cudnn" and not gpu:
        raise UsageError(
            "compute.attention=cudnn needs an NVIDIA GPU; "
            f"this is {jax.default_backend()}. Use auto or xla"
        )
    if wanted != "auto":
        return wanted
    return "cudnn" if gpu and not packed and dtype == jnp.bfloat16 else "xla"


def _reference(
    q: Array, k: Array, v: Array, segment_ids: Array | None, offset: Array | None
) -> Array:
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    query_index = jnp.arange(length) + (0 if offset is None else offset)
    visible = query_index[:, None] >= jnp.arange(k.shape[1])[None, :]  # [T, S]
    visible = visible[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, S]
    grouped = q.reshape(batch, length, k.shape[2], groups, dim)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped,
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = scores * dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision)
    return out.reshape(batch, length, heads, dim)
