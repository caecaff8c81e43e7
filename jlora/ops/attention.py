"""Causal grouped-query attention, dense or within the documents of packed rows.

`xla` is the reference: scores in float32, on every platform (on a CPU in the order of
`attention_cpu`). `cudnn` is the flash kernel of NVIDIA GPUs, `splash` that of TPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.errors import UsageError
from jlora.ops.attention_cpu import attend_on_cpu
from jlora.ops.attention_tpu import splash_attend
from jlora.ops.compute_choices import Compute


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    compute: Compute,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / sqrt(H)) v over the keys that each query may see.

    Query t sees key s if s <= t and both have the same segment id.

    Args:
        q: queries.
        k: keys, of the same dtype.
        v: values, likewise.
        compute: its platform, attention and max_segments.
        segment_ids: 1, 2, ... along a row, without gaps; 0 for padding at its end.

    Raises:
        UsageError: cudnn in float32, or with segments but no max_segments.
    """
    if compute.attention == "xla":
        if compute.platform == "cpu":
            return attend_on_cpu(q, k, v, segment_ids)
        return _reference(q, k, v, segment_ids)
    if compute.attention == "splash":
        interpret = compute.platform != "tpu"
        return splash_attend(q, k, v, segment_ids, interpret=interpret)
    if q.dtype == jnp.float32:
        raise UsageError(
            "compute.attention=cudnn needs compute.dtype bfloat16, found float32"
        )
    length = q.shape[1]
    if length % 2:  # cuDNN's gradient takes even lengths only
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, 1)))
    return _cudnn(q, k, v, segment_ids, compute.max_segments)[:, :length]


def _cudnn(
    q: Array, k: Array, v: Array, segment_ids: Array | None, max_segments: int
) -> Array:
    if segment_ids is None:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    if max_segments < 1:
        raise UsageError("cudnn attention of packed rows needs max_segments")
    return _packed_cudnn(q, k, v, segment_ids, max_segments)


def _packed_cudnn(
    q: Array, k: Array, v: Array, segment_ids: Array, max_segments: int
) -> Array:
    """Returns cuDNN's causal attention within each segment.

    The padding at the end of a row becomes a segment, too. Otherwise cuDNN would not write
    its gradients, and they would be uninitialised memory.
    """
    # The public function of jax.nn has no segments.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    last = jnp.max(segment_ids, axis=1, keepdims=True) + 1
    segment_ids = jnp.where(segment_ids == 0, last, segment_ids)
    numbers = jnp.arange(1, max_segments + 2)
    counts = jnp.sum(segment_ids[:, :, None] == numbers, axis=1)  # [B, M]
    begins = jnp.cumsum(counts, axis=1) - counts
    # Only where segments begin, then -1: the end of one would shift all later rows.
    offsets = jnp.pad(
        jnp.where(counts > 0, begins, -1), ((0, 0), (0, 1)), constant_values=-1
    ).astype(jnp.int32)
    lengths = jnp.where(counts > 0, counts, -1).astype(jnp.int32)
    out: Any = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
    return out


def _reference(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    batch, length, _, dim = q.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    visible = jnp.arange(length)[:, None] >= jnp.arange(k.shape[1])[None, :]  # [T, S]
    visible = visible[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, S]
    grouped = q.reshape(batch, length, k.shape[2], -1, dim)  # [B, T, K, G, H]
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
    return out.reshape(q.shape)
