"""The optimizer of the adapter: schedule, clipping and AdamW, all inside the optax mask.

`optax.masked` alone would hand raw gradients to the frozen leaves as their updates;
`optax.partition` with `set_to_zero` does not. Clipping inside the mask sees the adapter's
gradients only, and the state holds moments of the adapter's leaves only.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jlora.lora import trainable_mask
from jlora.settings import OptimConfig


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate of step 0, 1, ... total_steps - 1.

    It rises linearly over ceil(warmup_ratio * total_steps) steps, starting above 0 so
    that the first step learns, then stays, or falls to 0 after the last step.
    """
    warmup = -int(-config.warmup_ratio * total_steps // 1)
    rest = max(total_steps - warmup, 1)

    def schedule(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rising = (step + 1) / (warmup + 1)
        progress = jnp.clip((step - warmup) / rest, 0, 1)
        falling = {
            "constant": jnp.ones_like(progress),
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        }[config.lr_schedule]
        return config.learning_rate * jnp.where(step < warmup, rising, falling)

    return schedule


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the transformation of a whole parameter tree that moves adapters only.

    Source: AdamW, "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, 2019).
    """
    adamw = optax.adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    if config.max_grad_norm:
        adamw = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
    return optax.partition({True: adamw, False: optax.set_to_zero()}, trainable_mask)
