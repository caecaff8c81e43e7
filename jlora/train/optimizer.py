"""The optimizer of the adapter: schedule, clipping and AdamW, all inside the optax mask.

`optax.masked` alone would hand raw gradients to the frozen leaves as their updates;
`optax.partition` with `set_to_zero` does not. Clipping inside the mask sees the adapter's
gradients only, and the state holds moments of the adapter's leaves only.

Inside the mask every trainable leaf belongs to one of `settings.DECAY_GROUPS`, which has
its learning rate (LoRA+) and its weight decay. The layers are stacked there: updates of
some hundred small leaves took a quarter of the time that XLA compiles a step.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from jlora.config.run_config import DECAY_GROUPS, OptimConfig
from jlora.lora.adapter_tree import Params, map_leaves, trainable_mask


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
        rate, decay = given.rates[group], given.decays[group]
        stays = isinstance(decay, float) and decay == 0
        return optax.chain(
            optax.identity() if stays else optax.add_decayed_weights(decay),
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
    return optax.partition(
        {True: _across_layers(adapter), False: optax.set_to_zero()}, trainable_mask
    )


def _across_layers(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns `inner` for layers that are stacked, so that each leaf is one of them all.

    What it computes element by element, or from all elements, stays the same.
    """

    def init(params: Params) -> optax.OptState:
        return inner.init(stack_layers(params))

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        moved, state = inner.update(
            stack_layers(updates),
            state,
            None if params is None else stack_layers(params),
        )
        # Or XLA would weigh whether to make all of an update again in each of its parts.
        moved = jax.lax.optimization_barrier(moved)
        return _unstacked(moved, updates), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def stack_layers(tree: Params) -> Params:
    """Returns the tree with one layer of each kind, whose leaves are [layers, ...].

    It has the name of its first. Where ranks differ, zeros fill up the smaller ones, so
    that the state has one form in all members of a sweep; one much higher rank makes the
    moments of all its kind as large.
    """
    if "layers" not in tree:
        return tree
    layers = tree["layers"]
    kinds = {
        names[0]: jax.tree.map(_stack, *[layers[name] for name in names])
        for names in _kinds(layers)
    }
    return tree | {"layers": kinds}


def _unstacked(tree: Params, like: Params) -> Params:
    """Returns the layers of `like` from the tree that `stack_layers` made of them."""
    if "layers" not in like:
        return tree
    layers = {
        name: jax.tree.map(
            lambda leaf, own, i=i: leaf[(i, *map(slice, own.shape))],
            tree["layers"][names[0]],
            like["layers"][name],
        )
        for names in _kinds(like["layers"])
        for i, name in enumerate(names)
    }
    return tree | {"layers": layers}


def _kinds(layers: Params) -> list[list[str]]:
    """Returns the names of the layers, those with the same leaves together."""
    kinds: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        kinds.setdefault(jax.tree.structure(layer), []).append(name)
    return list(kinds.values())


def _stack(*leaves: Array) -> Array:
    shape = [max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True)]

    def grown(x: Array) -> Array:
        return jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])

    return jnp.stack([grown(x) if list(x.shape) != shape else x for x in leaves])
