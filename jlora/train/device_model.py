"""The model that a device computes, and the weights that it needs for it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.errors import warn
from jlora.lora.adapter_tree import Params, is_adapter, join
from jlora.model.llama import Llama
from jlora.model.remat.layer_runs import equal_runs, stacked
from jlora.parallel.own_program import gathered, own_config, runs_own_program

# Where steps compute layers in a loop, because the compiler takes a minute for each. On
# others a step is faster without.
LOOPING_PLATFORMS = ("tpu",)


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


def loops_over_layers(mesh: Mesh) -> bool:
    """Returns whether steps on this mesh take frozen weights as `frozen_for_steps` does."""
    return mesh.devices.flat[0].platform in LOOPING_PLATFORMS


def frozen_for_steps(
    trainable: Params, frozen: Params, mesh: Mesh, *, adapter_axis: int = 0
) -> Params:
    """Returns frozen weights as steps take them: on some platforms as runs of equal layers.

    Those are new arrays, so the caller is to let go of the given ones.

    Args:
        trainable: of one adapter, or of several.
        frozen: placed on the mesh.
        mesh: of the devices that compute.
        adapter_axis: the new axis in an adapter's leaves: 1 behind that of several adapters.
    """
    if not loops_over_layers(mesh):
        return frozen

    def stack(path: tuple[Any, ...], *leaves: Any) -> jax.Array:
        axis = adapter_axis if is_adapter(path[-1].key) else 0
        spec = list(leaves[0].sharding.spec)
        spec.insert(axis, None)
        whole = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.jit(lambda *x: jnp.stack(x, axis), out_shardings=whole)(*leaves)

    runs = equal_runs(join(trainable, frozen)["layers"])
    if len(runs) > 1:
        warn(
            f"layers differ: the step loops over {len(runs)} runs of equal ones, which takes "
            "longer to compile than one"
        )
    return stacked(frozen, runs, stack)
