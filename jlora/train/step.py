"""The train step: gradients of the adapter only, and one loss over the global batch.

Frozen weights are protected twice. Only the trainable part of the tree is differentiated,
so no gradient of a frozen weight is computed; and the optimizer's updates of them are zero.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jlora.lora.adapter_tree import (
    Params,
    is_trainable,
    join,
    split,
    trainable_mask,
)
from jlora.lora.embedding_and_head import head_parameters
from jlora.model.llama import Llama
from jlora.model.loss import cross_entropy
from jlora.model.remat.layer_runs import stacked_like, unstacked
from jlora.ops.dropout import drop
from jlora.parallel.own_program import (
    into_split,
    over_rows,
    own_positions,
)
from jlora.parallel.sharding import batch_sharding, tree_shardings
from jlora.train.compiler_options import compiler_options
from jlora.train.device_model import but_layers_gathered, model_on
from jlora.train.optimizer import stack_layers

Batch = dict[str, Any]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes: the adapter, its optimizer state, and counters.

    The fields are not typed as arrays, because a tree of this form may hold the
    shardings or shapes of arrays instead.

    Attributes:
        step: int32 [], optimizer steps done, skipped ones included.
        trainable: the leaves under `trainable_mask`, float32.
        opt_state: of the adapter's leaves only.
        skipped: int32 [], steps not applied: loss or gradient were not finite, or the
            batch had no supervised token.
        skipped_in_a_row: int32 [], how many of them came after the last good step.
    """

    step: Any
    trainable: Params
    opt_state: optax.OptState
    skipped: Any
    skipped_in_a_row: Any

    @classmethod
    def create(
        cls, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
    ) -> tuple["TrainState", Params]:
        """Returns (state at step 0, frozen parameters), placed on the mesh.

        The adapter's leaves are copied, because a step donates its state.
        """
        trainable, frozen = split(params, trainable_mask(params))
        trainable = jax.tree.map(jnp.copy, trainable)
        state = cls(
            step=jnp.int32(0),
            trainable=trainable,
            opt_state=optimizer.init(params),
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
        )
        placed = jax.device_put(state, tree_shardings(mesh, state))
        return placed, jax.device_put(frozen, tree_shardings(mesh, frozen))


def summed_loss(
    model: Llama,
    params: Params,
    batch: Batch,
    *,
    packed: bool,
    chunk: int,
    dropout_key: Array | None = None,
) -> Float[Array, ""]:
    """Returns the sum of the supervised tokens' losses, float32, in nats.

    Unpacked rows need no segment ids: padding lies at the end, where causal attention
    keeps it from every real token. Where a tensor axis splits the layers, it is the sum of the
    device's positions.
    """
    hidden = model.apply(
        {"params": params},
        batch["tokens"],
        segment_ids=batch["segment_ids"] if packed else None,
        positions=batch["positions"],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="hidden_states",
    )
    head, dropped = head_parameters(params), None
    if "lora_A" in head and dropout_key is not None:
        # Flax folds names into a module's key, so a number is nobody else's.
        key = jax.random.fold_in(dropout_key, 0)
        dropped = drop(hidden, key, model.lora_dropout)  # type: ignore[arg-type]
    head |= {k: into_split(leaf) for k, leaf in head.items() if is_trainable(k)}
    hidden, dropped = jax.tree.map(into_split, (hidden, dropped))
    states = hidden, batch["targets"], batch["loss_mask"], dropped
    hidden, targets, weights, dropped = jax.tree.map(own_positions, states)
    return cross_entropy(
        hidden, head, targets, weights, model.compute, chunk=chunk, dropped=dropped
    )


def step_function(
    model: Llama,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    packed: bool,
    grad_accum_steps: int,
    chunk_tokens: int | None = None,
) -> Any:
    """Returns the step (state, frozen, batch, key) -> (state, metrics), not yet jitted.

    Arguments and results are those of `make_train_step`; the key is dropout's, from which
    each step derives its own. `chunk_tokens`: tokens per device whose logits exist at one
    time; by default `model.compute.loss_chunk_tokens`.
    """
    chunk_tokens = chunk_tokens or model.compute.loss_chunk_tokens
    # In a sweep the rate may be an array; a constant 0 needs no random numbers.
    drops = not isinstance(model.lora_dropout, float) or model.lora_dropout > 0

    def gradient(
        model: Llama, trainable: Params, frozen: Params, key: Array, batch: Batch
    ) -> tuple[Array, Params]:
        frozen = but_layers_gathered(frozen)

        def loss(trainable: Params, part: Batch, index: Array | int) -> Array:
            return summed_loss(
                model,
                join(trainable, frozen),
                part,
                packed=packed,
                chunk=positions_per_chunk(part, model.row_shards, chunk_tokens),
                dropout_key=jax.random.fold_in(key, index) if drops else None,
            )

        with_gradient = jax.value_and_grad(loss)
        if grad_accum_steps == 1:
            return with_gradient(trainable, batch, 0)

        def accumulate(carry: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, with_gradient(trainable, *part)), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
        parts = jax.tree.map(lambda x: _split_rows(x, grad_accum_steps), batch)
        return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(grad_accum_steps)))[0]

    def step(
        state: TrainState, frozen: Params, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        trainable = stacked_like(state.trainable, frozen)
        own_model, is_own = model_on(mesh, model, trainable, frozen)
        sums = over_rows(partial(gradient, own_model), mesh, own_program=is_own)
        total, gradients = sums(trainable, frozen, key, batch)
        frozen, gradients = unstacked(frozen), unstacked(gradients)
        supervised = jnp.sum(batch["loss_mask"])
        share = 1 / jnp.maximum(supervised, 1)
        gradients = jax.tree.map(lambda g: g * share, gradients)
        # What follows reads them several times.
        gradients = jax.lax.optimization_barrier(gradients)
        metrics = {
            "loss": total * share,
            # Of the same arrays as the optimizer's clipping, so that it is made once.
            "grad_norm": optax.tree.norm(stack_layers(gradients)),
            "supervised_tokens": supervised.astype(jnp.int32),
            "tokens": jnp.sum(batch["segment_ids"] > 0).astype(jnp.int32),
        }
        after = _advance(optimizer, state, frozen, gradients, metrics)
        counters = {"skipped": after.skipped, "in_a_row": after.skipped_in_a_row}
        return after, {**metrics, **counters}

    return step


def make_train_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    state: TrainState,
    frozen: Params,
    packed: bool = True,
    grad_accum_steps: int = 1,
    seed: int = 0,
) -> Any:
    """Returns the jitted, sharded step (state, frozen, batch) -> (state, metrics).

    The state is donated. Loss and gradient are sums over the global batch divided by its
    supervised tokens, whatever the mesh and the number of accumulation steps. A step
    whose loss or gradient norm is not finite, or whose batch has no supervised token,
    changes nothing but its counters.
    Metrics: loss (nats per supervised token), grad_norm (before clipping),
    supervised_tokens, tokens, and the counters skipped and in_a_row.

    Args:
        model: the forward pass.
        optimizer: of the whole tree; see `jlora.train.optimizer`.
        mesh: devices; see `jlora.parallel.sharding`.
        state: arrays or shapes, for their structure only.
        frozen: likewise.
        packed: whether rows hold several documents.
        grad_accum_steps: parts of a batch whose activations exist one at a time; the rows
            of each divide among the devices, see `jlora.parallel.sharding.check_divisible`.
        seed: of dropout; the key of a step follows from (seed, step).
    """
    function = step_function(
        model, optimizer, mesh, packed=packed, grad_accum_steps=grad_accum_steps
    )

    def step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return function(state, frozen, batch, jax.random.key(seed))

    state_shardings = tree_shardings(mesh, state)
    return jax.jit(
        step,
        donate_argnums=0,
        compiler_options=compiler_options(mesh, frozen),
        in_shardings=(
            state_shardings,
            tree_shardings(mesh, frozen),
            batch_sharding(mesh),
        ),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
    )


def positions_per_chunk(batch: Batch, shards: int, tokens: int) -> int:
    """Returns the positions per row that make so many tokens on one device."""
    return max(1, tokens * shards // batch["tokens"].shape[0])


def _split_rows(x: Array, parts: int) -> Array:
    """Returns [parts, B / parts, T]; every part takes rows from every device."""
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def _advance(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Params,
    gradients: Params,
    metrics: Metrics,
) -> TrainState:
    """Returns the next state; a skipped step is counted and not applied."""
    # The zeros of the frozen leaves are never read: the optimizer and XLA drop them.
    updates: Any
    updates, opt_state = optimizer.update(
        join(gradients, jax.tree.map(jnp.zeros_like, frozen)),
        state.opt_state,
        join(state.trainable, frozen),
    )
    moved, _ = split(updates, trainable_mask(updates))
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    good &= metrics["supervised_tokens"] > 0

    def keep_unless_good(new: Array, old: Array) -> Array:
        return jnp.where(good, new, old)

    trainable = optax.apply_updates(state.trainable, moved)
    skip = 1 - good.astype(jnp.int32)
    return TrainState(
        step=state.step + 1,
        trainable=jax.tree.map(keep_unless_good, trainable, state.trainable),
        opt_state=jax.tree.map(keep_unless_good, opt_state, state.opt_state),
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
    )
