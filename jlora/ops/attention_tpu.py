"""Splash attention, the flash kernel of TPUs: causal, grouped-query, with segments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jlora.parallel.sharding import BATCH_AXES

# Sizes of the kernel's blocks; rows are padded to a multiple of the smallest.
_BLOCKS = (512, 256, 128)


def splash_attend(
    q: Array, k: Array, v: Array, segment_ids: Array | None, *, interpret: bool
) -> Array:
    """Returns causal attention [B, T, N, H]; see `jlora.ops.attention.attend`.

    The compiler cannot partition a kernel. So under a mesh every device runs it on its own
    rows and heads, unless the caller has split them already. `interpret` simulates the
    kernel where there is no TPU: exact, and very slow.
    """
    attend = functools.partial(_attend_locally, interpret=interpret)
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return attend(q, k, v, segment_ids)
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
    specs = (heads, heads, heads, None if segment_ids is None else rows)
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(
        q, k, v, segment_ids
    )


def _attend_locally(
    q: Array, k: Array, v: Array, segment_ids: Array | None, *, interpret: bool
) -> Array:
    """Returns the attention of one device's rows and heads."""
    # Imported here because it takes long and few runs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q.shape[1:3]
    padding = -length % _BLOCKS[-1]
    size = length + padding
    block = next(block for block in _BLOCKS if size % block == 0)
    kernel: Any = splash.make_splash_mha(
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
    # Scaled in float32, because the kernel multiplies q by k as they are.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    by_head = [
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for x in (q, k, v)
    ]
    if segment_ids is None:
        out = jax.vmap(kernel)(*by_head)
    else:
        # The padding is segment 0, like all padding: it sees only itself.
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        out = jax.vmap(kernel)(*by_head, splash.SegmentIds(q=ids, kv=ids))
    return jnp.swapaxes(out[:, :, :length], 1, 2)
