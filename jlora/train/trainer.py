"""What the loop steps: one adapter, or several that share a base and one compiled step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from jlora.config.optim_config import OptimConfig
from jlora.lora.adapter_tree import Params, join
from jlora.model.llama import Llama
from jlora.train.device_model import frozen_for_steps
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import Batch, Metrics, TrainState, make_train_step


@dataclass(frozen=True)
class TrainedAdapter:
    """One adapter: how it is trained, its state, and the frozen weights it belongs to."""

    optim: OptimConfig
    seed: int
    lora_dropout: float
    state: TrainState
    frozen: Params

    @classmethod
    def create(
        cls,
        params: Params,
        optim: OptimConfig,
        mesh: Mesh,
        *,
        seed: int,
        lora_dropout: float,
    ) -> "TrainedAdapter":
        """Returns the adapter of `params` at step 0; the base is shared, not copied."""
        # The schedule's length does not matter: only the structure of the state does.
        optimizer = make_optimizer(optim, make_schedule(optim, 1))
        state, frozen = TrainState.create(params, optimizer, mesh)
        return cls(optim, seed, lora_dropout, state, frozen)


@dataclass(frozen=True)
class Trainer:
    """A train step and its state, of one adapter or of several.

    Attributes:
        state: where training begins; of several adapters every leaf has a leading axis.
        jitted: the step, which donates the state, of `arguments`.
        arguments: (state, batches) -> what the step takes; see `step`.
        parameters: (state, index) -> the whole tree of one adapter, to evaluate it. In a
            sweep all have the same shapes, so that the evaluation is compiled once.
        frozen: the weights that are not trained, as the step takes them.
        adapter_state: (state, index) -> the state of one adapter as a run of its own has it.
    """

    state: TrainState
    jitted: Any
    arguments: Callable[[TrainState, list[Batch]], tuple[Any, ...]]
    parameters: Callable[[TrainState, int], Params]
    frozen: Params
    adapter_state: Callable[[TrainState, int], TrainState]

    def step(
        self, state: TrainState, batches: list[Batch]
    ) -> tuple[TrainState, Metrics]:
        """Returns the next state, and metrics, with an axis of adapters if there are several.

        Args:
            state: is donated.
            batches: one per order of the data.
        """
        return self.jitted(*self.arguments(state, batches))

    def compiled(self, state: TrainState, batches: list[Batch]) -> "Trainer":
        """Returns the trainer with its step compiled for such arguments, and no others."""
        lowered = self.jitted.lower(*self.arguments(state, batches))
        return replace(self, jitted=lowered.compile())


def make_trainer(
    adapter: TrainedAdapter,
    model: Llama,
    mesh: Mesh,
    *,
    total_steps: int,
    packed: bool = True,
    grad_accum_steps: int = 1,
) -> Trainer:
    """Returns the trainer of one adapter; `jlora.train.sweep` has that of several.

    Args:
        adapter: what to train.
        model: the forward pass; it gets the adapter's dropout rate.
        mesh: devices.
        total_steps: length of the learning rate schedule.
        packed: whether rows hold several documents.
        grad_accum_steps: parts of a batch, see `make_train_step`.
    """
    frozen = frozen_for_steps(adapter.state.trainable, adapter.frozen, mesh)
    step: Any = make_train_step(
        model.clone(lora_dropout=adapter.lora_dropout),
        make_optimizer(adapter.optim, make_schedule(adapter.optim, total_steps)),
        mesh,
        state=adapter.state,
        frozen=frozen,
        packed=packed,
        grad_accum_steps=grad_accum_steps,
        seed=adapter.seed,
    )
    return Trainer(
        state=adapter.state,
        jitted=step,
        arguments=lambda state, batches: (state, frozen, batches[0]),
        parameters=lambda state, _: join(state.trainable, frozen),
        frozen=frozen,
        adapter_state=lambda state, _: state,
    )
