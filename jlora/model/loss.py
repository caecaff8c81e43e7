"""Cross-entropy from the final states, without ever holding all logits [B, T, V].

The logits exist for one chunk of positions at a time. The forward pass also computes the
chunk's gradients, so that no logits are computed twice: those of the final states and of the
head's adapter, never of the frozen head.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.lora.adapter_tree import Params, is_trainable
from jlora.lora.embedding_and_head import head_logits
from jlora.ops.compute_choices import Compute
from jlora.ops.elementwise import negative_log_likelihood


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Params,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    compute: Compute,
    *,
    chunk: int,
    dropped: Float[Array, "B T D"] | None = None,
) -> Float[Array, ""]:
    """Returns the weighted sum of -log p(target) over all positions, float32, in nats.

    Args:
        hidden: final states.
        head: what `jlora.lora.embedding_and_head.head_parameters` returns.
        targets: next tokens; any valid id where the weight is 0.
        weights: 1 where the target counts, 0 elsewhere.
        compute: how to make the head's products.
        chunk: positions whose logits exist at one time, per row.
        dropped: hidden after dropout, for the head's adapter in training.
    """
    trainable = {k: v for k, v in head.items() if is_trainable(k)}
    frozen = {k: v for k, v in head.items() if not is_trainable(k)}
    length = hidden.shape[1]
    count = -(-length // min(chunk, length))
    size = -(-length // count)

    def to_chunks(x: Array) -> Array:
        fill = [(0, 0)] * x.ndim
        fill[1] = (0, count * size - length)
        x = jnp.pad(x, fill).reshape(x.shape[0], count, size, *x.shape[2:])
        # [chunks, B, size, ...], so that rows stay on their device.
        return jnp.moveaxis(x, 1, 0)

    states = (to_chunks(hidden), None if dropped is None else to_chunks(dropped))
    return _summed(
        compute, states, to_chunks(targets), to_chunks(weights), trainable, frozen
    )


States = tuple[Array, Array | None]


def _chunk_loss(
    compute: Compute,
    states: States,
    trainable: Params,
    frozen: Params,
    targets: Array,
    weights: Array,
) -> Array:
    # The states and not the losses are set to 0, because an infinity at a position that
    # does not count would still make the gradient NaN (0 times infinity).
    counted = weights[..., None] > 0
    hidden, dropped = jax.tree.map(lambda x: jnp.where(counted, x, 0), states)
    head = {**trainable, **frozen}
    logits = head_logits(hidden, head, compute, dropped=dropped)
    logits = logits.astype(jnp.float32)  # [B, size, V]
    return jnp.sum(negative_log_likelihood(logits, targets, compute.platform) * weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    compute: Compute,
    states: States,
    targets: Array,
    weights: Array,
    trainable: Params,
    frozen: Params,
) -> Array:
    def body(total: Array, chunk: tuple[States, Array, Array]) -> tuple[Array, None]:
        x, t, w = chunk
        return total + _chunk_loss(compute, x, trainable, frozen, t, w), None

    return jax.lax.scan(body, jnp.float32(0), (states, targets, weights))[0]


def _summed_forward(
    compute: Compute,
    states: States,
    targets: Array,
    weights: Array,
    trainable: Params,
    frozen: Params,
) -> tuple[Array, tuple[States, Params]]:
    gradient = jax.value_and_grad(_chunk_loss, argnums=(1, 2))

    def body(carry: Any, chunk: tuple[States, Array, Array]) -> tuple[Any, States]:
        total, sums = carry
        x, t, w = chunk
        loss, (d_states, d_trainable) = gradient(compute, x, trainable, frozen, t, w)
        return (total + loss, jax.tree.map(jnp.add, sums, d_trainable)), d_states

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    (total, sums), d_states = jax.lax.scan(body, zeros, (states, targets, weights))
    return total, (d_states, sums)


def _summed_backward(
    _: Compute, residuals: tuple[States, Params], g: Array
) -> tuple[Any, ...]:
    d_states, d_trainable = jax.tree.map(lambda x: x * g.astype(x.dtype), residuals)
    return d_states, None, None, d_trainable, None


_summed.defvjp(_summed_forward, _summed_backward)
