"""Several adapters over one frozen base, trained by one vmapped step.

The base has no adapter axis, so each of its products stays one large product over the
rows of all adapters; only the products with A and B are batched. Adapters may differ in
what is data to a compiled step: initial values, rank (padded with zeros), scaling,
dropout, learning rates, weight decay, clipping, and the order of their batches.

Padding stays zero by itself: the gradient of a padded column of A is a product with a
zero row of B and the other way round, and AdamW moves no zero with zero moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora.lora.adapter_tree import Params, is_adapter, join, map_leaves
from jlora.model.llama import Llama
from jlora.parallel.sharding import batch_sharding, tree_shardings
from jlora.train.compiler_options import compiler_options
from jlora.train.device_model import frozen_for_steps
from jlora.train.optimizer import (
    Hyperparameters,
    make_optimizer,
    make_schedule,
    stack_padded,
)
from jlora.train.step import (
    Batch,
    TrainState,
    step_function,
)
from jlora.train.sweep_file import check_same_leaves
from jlora.train.trainer import TrainedAdapter, Trainer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Varied:
    """What a step of one adapter takes besides its state; stacked, a leading axis k.

    `rates` are float32 [steps], `key` is the data of a key, because JAX places no key on the
    devices of other processes. No field is typed as an array: while a step is compiled, a
    tree of this form describes its arguments.
    """

    rates: Any
    numbers: Hyperparameters
    key: Any
    dropout: Any


def make_sweep_trainer(
    adapters: Sequence[TrainedAdapter],
    model: Llama,
    mesh: Mesh,
    *,
    total_steps: int,
    orders: Sequence[int],
    packed: bool = True,
    grad_accum_steps: int = 1,
) -> Trainer:
    """Returns the trainer of k adapters: their states as one, ranks padded to the largest.

    Args:
        adapters: what to train; their trees may differ in ranks only.
        model: the forward pass; its lora_dropout is not used.
        mesh: devices; every adapter is laid out over all of them.
        total_steps: length of every schedule.
        orders: which of a step's batches each adapter takes.
        packed: whether rows hold several documents.
        grad_accum_steps: parts of a batch, as for a single run.

    Raises:
        UsageError: the adapters' trees have other leaves.
    """
    check_same_leaves({f"{i + 1}": (a.state, a.frozen) for i, a in enumerate(adapters)})
    shapes = [jax.tree.map(jax.typeof, adapter.state) for adapter in adapters]
    shardings = _with_axis(mesh, tree_shardings(mesh, adapters[0].state))
    stacked = jax.tree.map(stack_padded, *(a.state for a in adapters))
    state = jax.device_put(stacked, shardings)
    frozen = frozen_for_steps(
        state.trainable,
        _stack_frozen([a.frozen for a in adapters], mesh),
        mesh,
        adapter_axis=1,
    )
    axes = map_leaves(lambda path, _: 0 if is_adapter(path[-1]) else None, frozen)
    step_of_all = jax.vmap(
        _step_of_one(adapters, model, mesh, packed, grad_accum_steps),
        in_axes=(0, axes, 0, 0),
    )

    def step(
        state: TrainState, frozen: Params, batches: list[Batch], varied: _Varied
    ) -> tuple[TrainState, Any]:
        chosen = [batches[order] for order in orders]
        # Stacked even where all adapters see the same rows: the attention kernels need
        # the new axis in all of their operands.
        batch = jax.tree.map(lambda *parts: jnp.stack(parts), *chosen)
        return step_of_all(state, frozen, batch, varied)

    replicated = NamedSharding(mesh, PartitionSpec())
    jitted: Any = jax.jit(
        step,
        donate_argnums=0,
        compiler_options=compiler_options(mesh, frozen),
        in_shardings=(
            shardings,
            jax.tree.map(lambda leaf: leaf.sharding, frozen),
            batch_sharding(mesh),
            replicated,
        ),
        out_shardings=(shardings, replicated),
    )
    varied = jax.device_put(_varied(adapters, total_steps), replicated)

    def parameters(state: TrainState, index: int) -> Params:
        own = jax.tree.map(lambda leaf: leaf[index], state.trainable)
        own_frozen = map_leaves(
            lambda path, leaf: leaf[index] if is_adapter(path[-1]) else leaf, frozen
        )
        return join(own, own_frozen)

    def adapter_state(state: TrainState, index: int) -> TrainState:
        return jax.tree.map(
            lambda leaf, like: leaf[index][tuple(map(slice, like.shape))],
            state,
            shapes[index],
        )

    return Trainer(
        state=state,
        jitted=jitted,
        arguments=lambda state, batches: (state, frozen, batches, varied),
        parameters=parameters,
        frozen=frozen,
        adapter_state=adapter_state,
    )


def _step_of_one(
    adapters: Sequence[TrainedAdapter],
    model: Llama,
    mesh: Mesh,
    packed: bool,
    grad_accum_steps: int,
) -> Any:
    """Returns the step of one adapter, whose numbers are arguments of it."""
    # `step` may not refer to `adapters`, which would keep their states in memory.
    chunk_tokens = max(1, model.compute.loss_chunk_tokens // len(adapters))
    largest_norm = max(adapter.optim.max_grad_norm for adapter in adapters)
    optim = replace(adapters[0].optim, max_grad_norm=largest_norm)
    rates = {adapter.lora_dropout for adapter in adapters}
    # One rate for all stays a constant of the program: 0 then costs nothing.
    shared_rate = rates.pop() if len(rates) == 1 else None

    def step(
        state: TrainState, frozen: Params, batch: Batch, varied: _Varied
    ) -> tuple[TrainState, Any]:
        function = step_function(
            model.clone(
                lora_dropout=varied.dropout if shared_rate is None else shared_rate
            ),
            make_optimizer(optim, lambda n: varied.rates[n], varied.numbers),
            mesh,
            packed=packed,
            grad_accum_steps=grad_accum_steps,
            chunk_tokens=chunk_tokens,
        )
        return function(state, frozen, batch, jax.random.wrap_key_data(varied.key))

    return step


def _varied(adapters: Sequence[TrainedAdapter], total_steps: int) -> _Varied:
    """Returns the numbers of all adapters, computed as a single run computes them."""
    steps = jnp.arange(total_steps)
    each = [
        _Varied(
            rates=jnp.asarray(jax.vmap(make_schedule(m.optim, total_steps))(steps)),
            numbers=Hyperparameters.of(m.optim),
            key=jax.random.key_data(jax.random.key(m.seed)),
            dropout=np.float32(m.lora_dropout),
        )
        for m in adapters
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(list(map(_array, leaves))), *each)


def _array(leaf: Any) -> Array:
    return jnp.float32(leaf) if isinstance(leaf, float) else jnp.asarray(leaf)


def _stack_frozen(trees: Sequence[Params], mesh: Mesh) -> Params:
    """Returns the frozen leaves; those of adapters have an axis of adapters."""
    shardings = tree_shardings(mesh, trees[0])
    return jax.tree_util.tree_map_with_path(
        lambda path, first, sharding, *others: (
            jax.device_put(stack_padded(first, *others), _with_axis(mesh, sharding))
            if is_adapter(path[-1].key)
            else first
        ),
        trees[0],
        shardings,
        *trees[1:],
    )


def _with_axis(mesh: Mesh, shardings: Any) -> Any:
    """Returns the shardings of the same leaves behind an axis of adapters."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), shardings
    )
