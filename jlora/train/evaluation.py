"""The loss of a model on a whole data set."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora.data.batch.batches import Dataset
from jlora.lora.adapter_tree import Params, join, split, trainable_mask
from jlora.model.llama import Llama
from jlora.model.remat.layer_runs import stacked_like
from jlora.parallel.own_program import over_rows
from jlora.parallel.sharding import batch_sharding, tree_shardings
from jlora.train.compiler_options import compiler_options
from jlora.train.device_model import but_layers_gathered, model_on
from jlora.train.prefetch import Prefetch, place_batch
from jlora.train.step import (
    Batch,
    positions_per_chunk,
    summed_loss,
)


def make_eval_step(
    model: Llama, mesh: Mesh, *, params: Params, packed: bool = True
) -> Any:
    """Returns the jitted (params, batch) -> (summed loss in nats, supervised tokens)."""
    tokens = model.compute.loss_chunk_tokens
    model, is_own = model_on(mesh, model, params)

    def loss(
        trainable: Params, frozen: Params, _: None, batch: Batch
    ) -> tuple[Array, Params]:
        chunk = positions_per_chunk(batch, model.row_shards, tokens)
        params = join(trainable, but_layers_gathered(frozen))
        return summed_loss(model, params, batch, packed=packed, chunk=chunk), {}

    summed = over_rows(loss, mesh, own_program=is_own, has_gradients=False)

    def step(params: Params, batch: Batch) -> tuple[Array, Array]:
        trainable, frozen = split(params, trainable_mask(params))
        trainable = stacked_like(trainable, frozen)
        total, _ = summed(trainable, frozen, None, batch)
        return total, jnp.sum(batch["loss_mask"])

    return jax.jit(
        step,
        compiler_options=compiler_options(mesh, params),
        in_shardings=(tree_shardings(mesh, params), batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def evaluate(
    step: Any, params: Params, dataset: Dataset, mesh: Mesh
) -> tuple[float, int]:
    """Returns (mean loss in nats per supervised token, tokens) over a whole data set."""
    total = count = 0.0
    with Prefetch(dataset, mesh, start=0, stop=dataset.steps_per_epoch) as batches:
        for batch in batches:
            summed, supervised = step(params, batch)
            total, count = total + float(summed), count + float(supervised)
    return total / count, int(count)


class Evaluator:
    """Evaluates adapters of the same shapes; its step is compiled before it is used."""

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        *,
        packed: bool,
        compiling: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Takes the arguments of `make_eval_step`, and what times and reports compiling."""
        self._model, self._mesh, self._packed = model, mesh, packed
        self._compiling = compiling
        self._step: Any = None

    def prepare(self, params: Params, dataset: Dataset) -> None:
        """Compiles the step for this tree and data, if that has not been done."""
        if self._step is None:
            batch = place_batch(dataset, 0, self._mesh)
            with self._compiling("the evaluation"):
                step = make_eval_step(
                    self._model, self._mesh, params=params, packed=self._packed
                )
                self._step = step.lower(params, batch).compile()

    def loss(self, params: Params, dataset: Dataset) -> float:
        """Returns the mean loss in nats per supervised token."""
        return evaluate(self._step, params, dataset, self._mesh)[0]
