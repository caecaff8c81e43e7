"""The optimizer of the adapter: schedule, clipping and updates; frozen leaves do not change.

`optax.partition` gives the trainable leaves to clipping and AdamW (or another rule), and
all others to `set_to_zero`. So the global norm is that of the adapter's gradients, and only
its leaves have moments. (`optax.masked` would return raw gradients as the updates of frozen
leaves.)

Every trainable leaf belongs to one of `optim_config.DECAY_GROUPS`, with a learning rate
(LoRA+) and a weight decay. The layers are stacked first: to compile updates of some hundred
small leaves took a quarter of the compile time of a step.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike
from jaxtyping import Array

from jlora.config.optim_config import DECAY_GROUPS, OptimConfig
from jlora.errors import UsageError, listing
from jlora.lora.adapter_tree import Params, map_leaves, trainable_mask
from jlora.train.adam_8bit import scale_by_adam_8bit

# Optimizers that look at one number at a time: layers may be stacked, and padded.
ELEMENTWISE = ("adamw", "lion")


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate of step 0, 1, ... total_steps - 1.

    It rises linearly from 0 over the steps of warm-up: step 0 changes nothing, as in
    Transformers. Of a run of warm-up alone the last step has the full rate.

    Source: Transformers `optimization.py`: `get_linear_schedule_with_warmup` and its
    neighbours for constant, cosine (with min_lr_rate) and inverse_sqrt, `get_wsd_schedule`.
    """
    asked = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    warmup = min(asked, total_steps - 1)
    rest = max(total_steps - warmup, 1)
    # Of wsd; of a run that is shorter than both, the warm-up stays whole.
    decay = min(math.ceil(config.decay_ratio * total_steps), rest)
    timescale = warmup or 10_000
    floor = config.min_lr_ratio

    def cosine(progress: jax.Array) -> jax.Array:
        factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return factor * (1 - floor) + floor

    def schedule(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rising, since = step / max(warmup, 1), step - warmup
        falling = {
            "constant": lambda: jnp.ones_like(step),
            "linear": lambda: jnp.clip(1 - since / rest, 0, 1),
            "cosine": lambda: cosine(since / rest),
            "wsd": lambda: cosine((since - (rest - decay)) / max(decay, 1)),
            "inverse_sqrt": lambda: jnp.sqrt(timescale / (since + timescale)),
        }[config.lr_schedule]()
        if config.lr_schedule == "wsd":
            rising = rising * (1 - floor) + floor
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


def check_groups(config: OptimConfig, params: Params) -> None:
    """Raises UsageError for a setting of a group in which nothing is trained."""
    groups = jax.tree.leaves(map_leaves(lambda path, _: group_of(path), params))
    is_trained = jax.tree.leaves(trainable_mask(params))
    there = {g for g, trained in zip(groups, is_trained, strict=True) if trained}
    given = {f"optim.group_weight_decay.{g}": g for g in config.group_weight_decay}
    if config.loraplus_lr_embedding != OptimConfig.loraplus_lr_embedding:
        given["optim.loraplus_lr_embedding"] = "embedding"
    if unused := [name for name, group in given.items() if group not in there]:
        raise UsageError(
            f"{listing(unused)} has no effect, as nothing of that group is trained; there "
            f"is {listing(sorted(there))}"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of an optimizer that may differ in a sweep: floats, or arrays under vmap.

    Attributes:
        rates: group -> learning rate, as a multiple of the schedule's.
        decays: group -> weight decay.
        max_norm: global norm to which gradients are clipped; infinity: never.
    """

    rates: dict[str, Any]
    decays: dict[str, Any]
    max_norm: Any

    @classmethod
    def of(cls, config: OptimConfig) -> "Hyperparameters":
        """Returns those of a run's settings.

        Source: PEFT `optimizers/loraplus.py` for the rates; Transformers'
        `Trainer.get_decay_parameter_names` for norms and biases, which do not decay.
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
    config: OptimConfig,
    schedule: optax.Schedule,
    hyperparameters: Hyperparameters | None = None,
) -> optax.GradientTransformation:
    """Returns the optimizer of a whole parameter tree, which updates the adapter only.

    Args:
        config: its settings.
        schedule: learning rate of each step.
        hyperparameters: used instead of those in `config`, as arrays may be.

    Source: AdamW, "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, 2019);
    "LoRA+: Efficient Low Rank Adaptation of Large Models" (Hayou et al., 2024).
    """
    given = Hyperparameters.of(config) if hyperparameters is None else hyperparameters

    def scaled(group: str) -> optax.GradientTransformation:
        rate, decay = given.rates[group], given.decays[group]
        has_decay = not (isinstance(decay, float) and decay == 0)
        return optax.chain(
            optax.add_decayed_weights(decay) if has_decay else optax.identity(),
            optax.scale_by_learning_rate(lambda count: rate * schedule(count)),
        )

    def groups(tree: Params) -> Params:
        return map_leaves(lambda path, _: group_of(path), tree)

    clips = config.max_grad_norm > 0
    adapter = optax.chain(
        optax.clip_by_global_norm(given.max_norm) if clips else optax.identity(),
        _rule(config),
        optax.partition({group: scaled(group) for group in DECAY_GROUPS}, groups),
    )
    if config.optimizer in ELEMENTWISE:
        adapter = _on_stacked_layers(adapter)
    return optax.partition({True: adapter, False: optax.set_to_zero()}, trainable_mask)


def _rule(config: OptimConfig) -> optax.GradientTransformation:
    """Returns what makes updates of gradients, before weight decay and learning rate.

    Source: Lion, "Symbolic Discovery of Optimization Algorithms" (Chen et al., 2023), with
    its betas; Adafactor as `Adafactor(scale_parameter=False, relative_step=False)` of
    Transformers; Muon, "Muon is Scalable for LLM Training" (Liu et al., 2025): updates with
    the root mean square of AdamW's, so that its learning rates and decays go with both.
    """
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
    if config.optimizer == "adafactor":
        return optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=1),
            optax.clip_by_block_rms(1.0),
        )
    if config.optimizer == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_as_matrices),
            optax.stateless(
                lambda updates, _: jax.tree.map(_as_large_as_adam, updates)
            ),
        )
        return optax.partition({True: muon, False: adam}, _is_pair)
    if config.optimizer == "adamw_8bit":
        return scale_by_adam_8bit(config.adam_b1, config.adam_b2, config.adam_eps)
    return optax.scale_by_lion(0.9, 0.99) if config.optimizer == "lion" else adam


def _as_matrices(tree: Any) -> Any:
    """Returns for each leaf that it is a matrix [in, out], as Muon asks."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)


def _as_large_as_adam(update: Array) -> Array:
    """Returns an orthogonal matrix with the root mean square of AdamW's updates, 0.2."""
    return 0.2 * math.sqrt(max(update.shape)) * update


def _is_pair(tree: Params) -> Params:
    """Returns for each leaf whether it is a matrix of a LoRA pair of a projection."""
    return map_leaves(
        lambda path, leaf: group_of(path) in ("lora_A", "lora_B") and leaf.ndim == 2,
        tree,
    )


def _on_stacked_layers(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns an optimizer that stacks the layers, applies `inner` and unstacks them.

    The updates are the same, as those of `ELEMENTWISE` are, but for the global norm.
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
        # Without it, XLA considers computing the whole update again for every layer.
        moved = jax.lax.optimization_barrier(moved)
        return _unstacked(moved, updates), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def stack_layers(tree: Params) -> Params:
    """Returns the tree with layers of the same structure as one, of leaves [layers, ...].

    It has the name of the first. Smaller ranks are padded with zeros, so that the state has
    the same structure in all members of a sweep; one layer of a much higher rank makes the
    moments of the others as large.
    """
    if "layers" not in tree:
        return tree
    layers = tree["layers"]
    stacked = {
        names[0]: jax.tree.map(stack_padded, *[layers[name] for name in names])
        for names in _same_structure(layers)
    }
    return tree | {"layers": stacked}


def _unstacked(tree: Params, like: Params) -> Params:
    """Returns the tree before `stack_layers`, with the layers and shapes of `like`."""
    if "layers" not in like:
        return tree
    layers = {
        name: jax.tree.map(
            lambda leaf, own, i=i: leaf[(i, *map(slice, own.shape))],
            tree["layers"][names[0]],
            like["layers"][name],
        )
        for names in _same_structure(like["layers"])
        for i, name in enumerate(names)
    }
    return tree | {"layers": layers}


def _same_structure(layers: Params) -> list[list[str]]:
    """Returns lists of names: each of the layers that have the same leaves."""
    names: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(jax.tree.structure(layer), []).append(name)
    return list(names.values())


def stack_padded(*arrays: Array) -> Array:
    """Returns the arrays along a new first axis, padded with zeros to the largest."""
    shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in arrays), strict=True))
    return jnp.stack(
        [
            jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])
            if x.shape != shape
            else x
            for x in arrays
        ]
    )
