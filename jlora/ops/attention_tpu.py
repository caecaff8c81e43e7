"""Splash attention, the flash kernel of TPUs: causal, grouped-query, with segments.

Off TPU the kernel is interpreted, which is exact and very slow: for tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from jlora.parallel.sharding import BATCH_AXES

# Rows are padded to a multiple of the narrowest block that the hardware takes.
_BLOCKS = (512, 256, 128)


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """Returns causal attention [B, T, N, H]; see `attention.attend`.

    The compiler cannot cut a kernel: under a mesh, each device runs it on its own rows
    and heads, which it may have been given already.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return _local(q, k, v, segment_ids, interpret=interpret)
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
    specs = (heads, heads, heads, None if segment_ids is None else rows)
    local = functools.partial(_local, interpret=interpret)
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(
        q, k, v, segment_ids
    )


def _local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """Returns the attention of one device's rows and heads."""
    length, heads = q.shape[1:3]
    padding = -length % _BLOCKS[-1]
    size = length + padding
    kernel = _kernel(heads, size, interpret)
    # Scaled in float32; the kernel multiplies plain q by k.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    by_head = [
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for x in (q, k, v)
    ]
    if segment_ids is None:
        out = jax.vmap(kernel)(*by_head)
    else:
        # The tail is of segment 0, as all padding: it sees itself and nothing else.
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        out = jax.vmap(kernel)(*by_head, splash.SegmentIds(q=ids, kv=ids))
    return jnp.swapaxes(out[:, :, :length], 1, 2)


def _kernel(heads: int, size: int, interpret: bool) -> Any:
    block = next(block for block in _BLOCKS if size % block == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((size, size))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
