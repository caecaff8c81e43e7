"""SwiGLU's activation and the log-likelihood, with gradients written by hand for a CPU.

There XLA would store and reload each array that autodiff saves. On other platforms it fuses
these operations with their neighbours, and autodiff is as fast.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gated(
    gate: Float[Array, "... F"], up: Float[Array, "... F"], platform: str
) -> Array:
    """Returns silu(gate) * up."""
    if platform == "cpu":
        return _gated(gate, up)
    return jax.nn.silu(gate) * up


def negative_log_likelihood(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], platform: str
) -> Float[Array, "..."]:
    """Returns -log softmax(logits)[target], in nats."""
    if platform == "cpu":
        return _negative_log_likelihood(logits, targets)
    return jax.nn.logsumexp(logits, axis=-1) - _target_logits(logits, targets)


@jax.custom_vjp
def _gated(gate: Array, up: Array) -> Array:
    return _gated_forward(gate, up)[0]


def _gated_forward(gate: Array, up: Array) -> tuple[Array, Any]:
    return jax.nn.silu(gate) * up, (gate, up)


def _gated_backward(residuals: Any, d_out: Array) -> tuple[Array, Array]:
    gate, up, d = (x.astype(jnp.float32) for x in (*residuals, d_out))
    share = jax.nn.sigmoid(gate)
    d_gate = d * up * share * (1 + gate * (1 - share))
    return d_gate.astype(d_out.dtype), (d * gate * share).astype(d_out.dtype)


_gated.defvjp(_gated_forward, _gated_backward)


def _target_logits(logits: Array, targets: Array) -> Array:
    """Returns each target's logit, as a sum, because V may be sharded."""
    return jnp.where(_is_target(logits, targets), logits, 0).sum(-1)


def _is_target(logits: Array, targets: Array) -> Array:
    return jnp.arange(logits.shape[-1]) == targets[..., None]


@jax.custom_vjp
def _negative_log_likelihood(logits: Array, targets: Array) -> Array:
    return _likelihood_forward(logits, targets)[0]


def _likelihood_forward(logits: Array, targets: Array) -> tuple[Array, Any]:
    top = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - top[..., None])
    total = jnp.sum(powers, axis=-1)
    losses = jnp.log(total) + top - _target_logits(logits, targets)
    return losses, (powers, total, targets)


def _likelihood_backward(residuals: Any, d_losses: Array) -> tuple[Array, None]:
    powers, total, targets = residuals
    d_target = jnp.where(_is_target(powers, targets), d_losses[..., None], 0)
    return powers * (d_losses / total)[..., None] - d_target, None


_negative_log_likelihood.defvjp(_likelihood_forward, _likelihood_backward)
