"""What a training takes on a CPU, where the compiler decides what is kept.

There XLA merges what a layer computes again with what it computed before, so every remat
keeps the same. It also puts the adapters' gradients off until the end, with the
gradients of the outputs that they need.
"""

import math

import jax
import jax.numpy as jnp

from jlora.lora.adapter_tree import (
    EMBEDDING,
    HEAD,
    Params,
    is_adapter,
    modules,
    split,
    trainable_mask,
)
from jlora.ops.attention_cpu import mean_keys
from jlora.ops.quantize import kernel_shape, stored_format
from jlora.train.memory_estimate import Workload, moments_bytes

# Measured with two models (docs/performance.md): Python, its libraries and the compiler; and for
# each layer the compiled code and what the compiler needs for it.
_PROCESS, _PROGRAM_OF_LAYER = 0.3 * 2**30, 0.017 * 2**30
# Bytes for each number that a layer keeps, and each logit: many are float32 in bfloat16, too.
_KEPT = {4: 4.0, 2: 3.3}
_LOGIT = {4: 8, 2: 12}


def cpu_memory_bytes(params: Params, work: Workload) -> dict[str, int]:
    """Returns the estimated bytes of each part of the process's peak, or {}.

    There is no estimate for quantised bases, DoRA, adapters of embedding and head, several
    adapters, or several devices of one process.
    """
    found = modules(params)
    adapted = {name: x for name, x in found.items() if any(map(is_adapter, x))}
    is_plain = all(
        "lora_A" in x and "lora_magnitude" not in x for x in adapted.values()
    )
    unusual = adapted.keys() & {EMBEDDING, HEAD} or stored_format(params)
    if not is_plain or unusual or work.adapters > 1 or work.devices > 1:
        return {}
    c, size = work.config, jnp.dtype(work.compute.dtype).itemsize
    tokens, layers = work.rows * work.length, c.num_hidden_layers
    queries, keys = (
        n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)
    )
    kept = 4 * c.hidden_size + 2 * queries + 2 * keys + 3 * c.intermediate_size
    gradients = sum(kernel_shape(x)[1] for x in adapted.values()) // layers
    scores = c.num_attention_heads * mean_keys(work.length) * size
    saved = layers * tokens * ((kept + gradients) * _KEPT[size] + scores)
    logits = _LOGIT[size] * min(tokens, work.compute.loss_chunk_tokens) * c.vocab_size
    trainable, frozen = split(params, trainable_mask(params))
    trained = _bytes(trainable)
    return {
        "process, compiled code": int(_PROCESS + layers * _PROGRAM_OF_LAYER),
        "frozen weights": _bytes(frozen),
        "adapter": trained,
        "optimizer and gradients": trained + moments_bytes(trainable, work),
        "saved activations": int(saved),
        "one layer and logits": int(logits + 6 * tokens * c.hidden_size * size),
    }


def _bytes(tree: Params) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
