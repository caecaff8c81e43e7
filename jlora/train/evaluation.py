"""The loss of a model on a whole data set."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora.data.batch.batches import Dataset
from jlora.lora.adapter_tree import Params
from jlora.model.llama import Llama
from jlora.parallel.sharding import (
    batch_sharding,
    over_rows,
    row_shards,
    tree_shardings,
)
from jlora.train.prefetch import Prefetch
from jlora.train.step import (
    Batch,
    compiler_options,
    positions_per_chunk,
    summed_loss,
)


def make_eval_step(
    model: Llama, mesh: Mesh, *, params: Params, packed: bool = True
) -> Any:
    """Returns the jitted (params, batch) -> (summed loss in nats, supervised tokens)."""
    model = model.clone(row_shards=row_shards(mesh))
    tokens = model.compute.loss_chunk_tokens

    def loss(params: Params, batch: Batch) -> Array:
        chunk = positions_per_chunk(batch, model.row_shards, tokens)
        return summed_loss(model, params, batch, packed=packed, chunk=chunk)

    def step(params: Params, batch: Batch) -> tuple[Array, Array]:
        return over_rows(loss, mesh)(params, batch), jnp.sum(batch["loss_mask"])

    return jax.jit(
        step,
        compiler_options=compiler_options(mesh),
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
