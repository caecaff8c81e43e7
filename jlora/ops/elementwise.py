"""Elementwise operations whose gradients are written by hand, and why each is.

SwiGLU's activation and the log-likelihood on a CPU: there XLA would store and reload each
array that autodiff saves. On other platforms it fuses these operations with their
neighbours, and autodiff is as fast.

Products and sums with a trained vector, everywhere: autodiff would sum the vector's gradient
over all tokens in the dtype of the activations. In bfloat16 that is wrong by a percent.
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
def times_trained(x: Float[Array, "... D"], scale: Float[Array, " D"]) -> Array:
    """Returns x * scale in the dtype of x; scale's gradient is summed in float32."""
    return x * scale.astype(x.dtype)


def _times_forward(x: Array, scale: Array) -> tuple[Array, Any]:
    return times_trained(x, scale), (x, scale)


def _times_backward(residuals: Any, d_out: Array) -> tuple[Array, Array]:
    x, scale = residuals
    product = x.astype(jnp.float32) * d_out.astype(jnp.float32)
    return d_out * scale.astype(x.dtype), _sum_over_tokens(product, scale.dtype)


times_trained.defvjp(_times_forward, _times_backward)


@jax.custom_vjp
def plus_trained(x: Float[Array, "... D"], bias: Float[Array, " D"]) -> Array:
    """Returns x + bias in the dtype of x; bias' gradient is summed in float32."""
    return x + bias.astype(x.dtype)


def _plus_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return plus_trained(x, bias), bias


def _plus_backward(bias: Array, d_out: Array) -> tuple[Array, Array]:
    return d_out, _sum_over_tokens(d_out.astype(jnp.float32), bias.dtype)


plus_trained.defvjp(_plus_forward, _plus_backward)


def _sum_over_tokens(x: Array, dtype: Any) -> Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1))).astype(dtype)


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
