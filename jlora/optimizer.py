"""The optimizer of the adapter: schedule, clipping and AdamW, all inside the optax mask.

`optax.masked` alone would hand raw gradients to the frozen leaves as their updates;
`optax.partition` with `set_to_zero` does not. Clipping inside the mask sees the adapter's
gradients only, and the state holds moments of the adapter's leaves only.

Inside the mask every trainable leaf belongs to one of `settings.DECAY_GROUPS`, which has
its learning rate (LoRA+) and its weight decay.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jlora.lora import Params, map_leaves, trainable_mask
from jlora.settings import DECAY_GROUPS, OptimConfig


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


def group_of(path: tuple[str, ...]) -> str:
    """Returns the group of the trainable leaf at `path`, one of `DECAY_GROUPS`."""
    leaf = path[-1]
    if leaf in ("lora_A", "lora_B"):
        return "embedding" if "embed_tokens" in path else leaf
    if leaf.startswith("lora_magnitude"):
        return "magnitude"
    return "norm" if leaf.endswith(("scale", "bias")) else "whole"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbers:
    """What a step multiplies with, besides the schedule: floats, or arrays under vmap.

    Attributes:
        rates: group -> learning rate over the schedule's.
        decays: group -> weight decay.
        max_norm: of the whole gradient; infinity does not clip.
    """

    rates: dict[str, Any]
    decays: dict[str, Any]
    max_norm: Any

    @classmethod
    def of(cls, config: OptimConfig) -> "Numbers":
        """Returns the numbers that the settings stand for.

        Source: PEFT `optimizers/loraplus.py` for the rates; Transformers'
        `Trainer.get_decay_parameter_names` for norms and biases, which never decay.
        """
        rates = dict.fromkeys(DECAY_GROUPS, 1.0)
        if config.loraplus_lr_ratio is not None:
            for group in ("lora_B", "magnitude", "norm"):
                rates[group] = config.loraplus_lr_ratio
            rates["embedding"] = config.loraplus_lr_embedding / config.learning_rate
        decays = {g: 0.0 if g == "norm" else config.weight_decay for g in DECAY_GROUPS}
        return cls(
            rates, decays | config.group_weight_decay, config.max_grad_norm or math.inf
        )


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, numbers: Numbers | None = None
) -> optax.GradientTransformation:
    """Returns the transformation of a whole parameter tree that moves adapters only.

    Args:
        config: of the optimizer.
        schedule: learning rate of each step.
        numbers: instead of those that `config` stands for.

    Source: AdamW, "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, 2019);
    "LoRA+: Efficient Low Rank Adaptation of Large Models" (Hayou et al., 2024).
    """
    given = Numbers.of(config) if numbers is None else numbers

    def move(group: str) -> optax.GradientTransformation:
        rate = given.rates[group]
        return optax.chain(
            optax.add_decayed_weights(given.decays[group]),
            optax.scale_by_learning_rate(lambda count: rate * schedule(count)),
        )

    def groups(tree: Params) -> Params:
        return map_leaves(lambda path, _: group_of(path), tree)

    clips = config.max_grad_norm > 0
    adapter = optax.chain(
        optax.clip_by_global_norm(given.max_norm) if clips else optax.identity(),
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.partition({group: move(group) for group in DECAY_GROUPS}, groups),
    )
    return optax.partition({True: adapter, False: optax.set_to_zero()}, trainable_mask)
