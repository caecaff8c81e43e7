"""Linear head and cross-entropy in one, by chunks of positions.

The logits of one chunk exist at a time, never [B, T, V]. The gradient is formed in the
forward pass, while a chunk's logits are there, so no logits are computed twice; and only
for the hidden states and the head's adapter, never for the frozen table.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.lora import TRAINABLE_LEAVES, matmul

Params = dict[str, Any]


def head_parameters(params: Params) -> Params:
    """Returns the head's leaves: those of `lm_head`, or the embedding if it is tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Params,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Returns the weighted sum of -log p(target) over all positions, float32, in nats.

    Args:
        hidden: final states; their dtype is that of the head's products.
        head: `kernel` [D, V] with or without an adapter, or `embedding` [V, D].
        targets: next tokens; any valid id where the weight is 0.
        weights: 1 where the target counts, 0 elsewhere.
        chunk: positions whose logits exist at one time, per row.
    """
    trainable = {k: v for k, v in head.items() if k in TRAINABLE_LEAVES}
    frozen = {k: v for k, v in head.items() if k not in TRAINABLE_LEAVES}
    length = hidden.shape[1]
    count = -(-length // min(chunk, length))
    size = -(-length // count)

    def to_chunks(x: Array) -> Array:
        fill = [(0, 0)] * x.ndim
        fill[1] = (0, count * size - length)
        x = jnp.pad(x, fill).reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(
            x, 1, 0
        )  # [chunks, B, size, ...]: rows stay on their device

    return _summed(*map(to_chunks, (hidden, targets, weights)), trainable, frozen)


def _chunk_loss(
    hidden: Array, trainable: Params, frozen: Params, targets: Array, weights: Array
) -> Array:
    # Before the head, not on its losses: an infinity at a position that does not count
    # would still make the gradient NaN (0 times infinity).
    hidden = jnp.where(weights[..., None] > 0, hidden, 0)
    logits = _head(hidden, {**trainable, **frozen}).astype(jnp.float32)  # [B, size, V]
    columns = jnp.arange(logits.shape[-1])
    chosen = jnp.where(columns == targets[..., None], logits, 0).sum(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(losses * weights)


def _head(hidden: Array, head: Params) -> Array:
    dtype = hidden.dtype
    if "embedding" in head:
        return matmul(hidden, head["embedding"].T, dtype)
    logits = matmul(hidden, head["kernel"], dtype)
    if "lora_A" in head:
        b = head["lora_B"] * head["lora_scaling"]
        logits = logits + matmul(matmul(hidden, head["lora_A"], dtype), b, dtype)
    return logits


@jax.custom_vjp
def _summed(
    hidden: Array, targets: Array, weights: Array, trainable: Params, frozen: Params
) -> Array:
    def body(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, t, w = chunk
        return total + _chunk_loss(h, trainable, frozen, t, w), None

    return jax.lax.scan(body, jnp.float32(0), (hidden, targets, weights))[0]


def _summed_forward(
    hidden: Array, targets: Array, weights: Array, trainable: Params, frozen: Params
) -> tuple[Array, tuple[Array, Params]]:
    gradient = jax.value_and_grad(_chunk_loss, argnums=(0, 1))

    def body(carry: Any, chunk: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        total, sums = carry
        h, t, w = chunk
        loss, (d_hidden, d_trainable) = gradient(h, trainable, frozen, t, w)
        return (total + loss, jax.tree.map(jnp.add, sums, d_trainable)), d_hidden

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    (total, sums), d_hidden = jax.lax.scan(body, start, (hidden, targets, weights))
    return total, (d_hidden, sums)


def _summed_backward(residuals: tuple[Array, Params], g: Array) -> tuple[Any, ...]:
    d_hidden, d_trainable = residuals
    scaled = jax.tree.map(lambda x: x * g.astype(x.dtype), d_trainable)
    return d_hidden * g.astype(d_hidden.dtype), None, None, scaled, None


_summed.defvjp(_summed_forward, _summed_backward)
