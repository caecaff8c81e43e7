"""The model that a device computes, and the weights that it needs for it."""

from jax.sharding import Mesh

from jlora.lora.adapter_tree import Params
from jlora.model.llama import Llama
from jlora.parallel.own_program import gathered, own_config, runs_own_program


def model_on(mesh: Mesh, model: Llama, *params: Params) -> tuple[Llama, bool]:
    """Returns the model that a device computes, and whether by a program of its own."""
    if not runs_own_program(mesh, [tree.get("layers", {}) for tree in params]):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        return model.clone(row_shards=shards), False
    config = own_config(model.config, mesh.shape["tensor"])
    return model.clone(row_shards=1, config=config), True


def but_layers_gathered(frozen: Params) -> Params:
    """Returns frozen weights, of which a device may have its part, with whole ends.

    Embedding and head are gathered here, once for all chunks of the loss and all parts of a
    batch. A layer is gathered when it computes.
    """
    layers = {"layers": frozen["layers"]}
    ends = {name: leaves for name, leaves in frozen.items() if name not in layers}
    return gathered(ends, ("fsdp", "tensor")) | layers
