"""Several adapters over one frozen base, trained by one vmapped step.

The base has no adapter axis, so each of its products stays one large product over the
rows of all adapters; only the products with A and B are batched. Adapters differ in what
is data to a compiled step: start values, rank (padded with zeros), scaling, dropout,
learning rates, weight decay, clipping, and the order of their batches.

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
from jaxtyping import Array, Float

from jlora.config.run_config import OptimConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import Params, is_adapter, join, map_leaves
from jlora.model.llama import Llama
from jlora.parallel.sharding import batch_sharding, tree_shardings
from jlora.train.optimizer import Numbers, make_optimizer, make_schedule
from jlora.train.step import (
    Batch,
    TrainState,
    compiler_options,
    make_train_step,
    step_function,
)
from jlora.train.sweep_file import check_same_parts


@dataclass(frozen=True)
class Member:
    """One adapter: how it is trained, and its state as a run of its own has it."""

    optim: OptimConfig
    seed: int
    lora_dropout: float
    state: TrainState
    frozen: Params


def start_member(
    optim: OptimConfig, seed: int, lora_dropout: float, params: Params, mesh: Mesh
) -> Member:
    """Returns an adapter at step 0; the base in `params` is shared, not copied."""
    # Only the structure of the optimizer's state matters here, no number in it does.
    optimizer = make_optimizer(optim, make_schedule(optim, 1))
    state, frozen = TrainState.create(params, optimizer, mesh)
    return Member(optim, seed, lora_dropout, state, frozen)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Varied:
    """What a step of one adapter takes besides its state; stacked, a leading axis k."""

    rates: Float[Array, "... steps"]
    numbers: Numbers
    key: Any
    dropout: Any


class Alone:
    """One adapter behind the interface of `Sweep`, at no cost."""

    def __init__(
        self,
        member: Member,
        model: Llama,
        mesh: Mesh,
        *,
        total_steps: int,
        packed: bool = True,
        grad_accum_steps: int = 1,
    ) -> None:
        """Makes the step of a single run; arguments as for `Sweep`."""
        self.state, self.frozen = member.state, member.frozen
        schedule = make_schedule(member.optim, total_steps)
        step = make_train_step(
            model.clone(lora_dropout=member.lora_dropout),
            make_optimizer(member.optim, schedule),
            mesh,
            state=member.state,
            frozen=member.frozen,
            packed=packed,
            grad_accum_steps=grad_accum_steps,
            seed=member.seed,
        )
        self.step = lambda state, frozen, batches: step(state, frozen, batches[0])

    def parameters(self, state: TrainState, index: int) -> Params:
        """Returns the whole tree."""
        return join(state.trainable, self.frozen)

    tuned = parameters

    def member(self, state: TrainState, index: int) -> TrainState:
        """Returns the state itself."""
        return state


class Sweep:
    """k adapters as one state.

    Attributes:
        state: every leaf with a leading axis k, ranks padded to the largest.
        frozen: the base as it is; the adapters' own frozen leaves with an axis k.
        step: (state, frozen, batches) -> (state, metrics [k]); donates the state.
    """

    def __init__(
        self,
        members: Sequence[Member],
        model: Llama,
        mesh: Mesh,
        *,
        total_steps: int,
        orders: Sequence[int],
        packed: bool = True,
        grad_accum_steps: int = 1,
    ) -> None:
        """Stacks the members and makes their step.

        Args:
            members: the adapters; their trees differ in ranks at most.
            model: the forward pass; its lora_dropout is not used.
            mesh: devices; every adapter is laid out over all of them.
            total_steps: of every schedule.
            orders: which of a step's batches each member takes.
            packed: whether rows hold several documents.
            grad_accum_steps: parts of a batch, as for a single run.

        Raises:
            UsageError: the members' trees have other leaves.
        """
        self._shapes = [jax.tree.map(jax.typeof, m.state) for m in members]
        self._frozen = [m.frozen for m in members]
        _check_same_leaves(members)
        shardings = _with_axis(mesh, tree_shardings(mesh, members[0].state))
        self.state = jax.device_put(_stack([m.state for m in members]), shardings)
        self.frozen, layout = _stack_frozen([m.frozen for m in members], mesh)
        shared = replace(
            members[0].optim, max_grad_norm=max(m.optim.max_grad_norm for m in members)
        )
        dropouts = {m.lora_dropout for m in members}
        dropout = dropouts.pop() if len(dropouts) == 1 else None

        def one(
            state: TrainState, frozen: Params, batch: Batch, varied: _Varied
        ) -> tuple[TrainState, Any]:
            rate = varied.dropout if dropout is None else dropout
            step = step_function(
                model.clone(lora_dropout=rate),
                make_optimizer(shared, lambda n: varied.rates[n], varied.numbers),
                mesh,
                packed=packed,
                grad_accum_steps=grad_accum_steps,
                chunk_tokens=max(1, model.compute.loss_chunk_tokens // len(members)),
            )
            return step(state, frozen, batch, varied.key)

        every = jax.vmap(one, in_axes=(0, layout, 0, 0))

        def step(
            state: TrainState, frozen: Params, batches: list[Batch], varied: _Varied
        ) -> tuple[TrainState, Any]:
            chosen = [batches[order] for order in orders]
            # Stacked even where all adapters see the same rows: attention's kernels take
            # an axis that all of their operands have.
            batch = jax.tree.map(lambda *parts: jnp.stack(parts), *chosen)
            return every(state, frozen, batch, varied)

        replicated = NamedSharding(mesh, PartitionSpec())
        frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.frozen)
        compiled = jax.jit(
            step,
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
            in_shardings=(
                shardings,
                frozen_shardings,
                batch_sharding(mesh),
                replicated,
            ),
            out_shardings=(shardings, replicated),
        )
        varied = jax.device_put(_varied(members, total_steps), replicated)
        self.step = lambda state, frozen, batches: compiled(
            state, frozen, batches, varied
        )

    def parameters(self, state: TrainState, index: int) -> Params:
        """Returns the whole tree of one adapter, padded, so that all have one shape."""
        own = jax.tree.map(lambda leaf: leaf[index], state.trainable)
        frozen = map_leaves(
            lambda path, leaf: leaf[index] if is_adapter(path[-1]) else leaf,
            self.frozen,
        )
        return join(own, frozen)

    def tuned(self, state: TrainState, index: int) -> Params:
        """Returns the whole tree of one adapter at its true rank."""
        return join(self.member(state, index).trainable, self._frozen[index])

    def member(self, state: TrainState, index: int) -> TrainState:
        """Returns one adapter's state at its true rank, as a run of its own has it."""
        return jax.tree.map(
            lambda leaf, like: leaf[index][tuple(map(slice, like.shape))],
            state,
            self._shapes[index],
        )


def make_trainer(
    members: Sequence[Member], model: Llama, mesh: Mesh, *, orders: Any, **settings: Any
) -> Alone | Sweep:
    """Returns the one adapter or all of them; arguments as for `Sweep`."""
    if len(members) == 1:
        return Alone(members[0], model, mesh, **settings)
    return Sweep(members, model, mesh, orders=orders, **settings)


def _varied(members: Sequence[Member], total_steps: int) -> _Varied:
    """Returns the numbers of all members, computed as a single run computes them."""
    steps = jnp.arange(total_steps)
    each = [
        _Varied(
            rates=jnp.asarray(jax.vmap(make_schedule(m.optim, total_steps))(steps)),
            numbers=Numbers.of(m.optim),
            key=jax.random.key(m.seed),
            dropout=np.float32(m.lora_dropout),
        )
        for m in members
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(list(map(_array, leaves))), *each)


def _array(leaf: Any) -> Array:
    return jnp.float32(leaf) if isinstance(leaf, float) else jnp.asarray(leaf)


def _check_same_leaves(members: Sequence[Member]) -> None:
    check_same_parts({f"{i + 1}": (m.state, m.frozen) for i, m in enumerate(members)})
    shapes = {tuple(x.shape for x in jax.tree.leaves(m.state)) for m in members}
    if len(shapes) > 1 and not members[0].optim.adam_eps:
        raise UsageError(
            "optim.adam_eps=0 divides the zeros of padded ranks by zero; give one above "
            "0, or adapters of one rank"
        )


def _stack(trees: Sequence[Any]) -> Any:
    """Returns one tree of leaves [k, ...], each padded with zeros to the largest."""

    def join(*leaves: Array) -> Array:
        shape = [max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True)]
        stacked = jnp.zeros((len(leaves), *shape), leaves[0].dtype)
        for index, leaf in enumerate(leaves):
            stacked = stacked.at[(index, *map(slice, leaf.shape))].set(leaf)
        return stacked

    return jax.tree.map(join, *trees)


def _stack_frozen(trees: Sequence[Params], mesh: Mesh) -> tuple[Params, Params]:
    """Returns (frozen leaves, 0 where one has an axis of adapters and None elsewhere)."""
    layout = map_leaves(lambda path, _: 0 if is_adapter(path[-1]) else None, trees[0])
    shardings = tree_shardings(mesh, trees[0])
    stacked = jax.tree_util.tree_map_with_path(
        lambda path, first, sharding, *others: (
            jax.device_put(_stack([first, *others]), _with_axis(mesh, sharding))
            if is_adapter(path[-1].key)
            else first
        ),
        trees[0],
        shardings,
        *trees[1:],
    )
    return stacked, layout


def _with_axis(mesh: Mesh, shardings: Any) -> Any:
    """Returns the shardings of the same leaves behind an axis of adapters."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), shardings
    )
