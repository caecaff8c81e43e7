"""A step as one program that each device runs, on its own rows and its part of the weights.

`over_rows` runs it. Inside, weights that fsdp splits are gathered before use. Of a layer that
tensor splits, a device has some heads and some of the MLP: the projections into them have
whole inputs, and the outputs of those out of them are summed. Embedding and head are gathered
over both axes, and each device of a tensor axis computes the loss of its own positions.
Of a row that context splits, a device has some tokens; see `jlora.parallel.context`.

Source of the split layers: "Megatron-LM" (Shoeybi et al., 2019), section 3.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UsageError
from jlora.parallel.sharding import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    TOKEN_SPEC,
    logical_axes,
    tree_shardings,
    use_mesh,
)

# Leaves of layers that a tensor axis may split here. A bias of a sum, or DoRA's norms, would
# need sums of their own.
_SPLIT_LEAVES = {
    *("kernel", "kernel_q", "kernel_scale", "kernel_absmax", "trained_kernel"),
    *("lora_A", "lora_B", "lora_scaling", "lora_A0", "lora_B0"),
    *("scale", "trained_scale"),
}


def runs_own_program(mesh: Mesh, layers: Any) -> bool:
    """Returns whether each device computes its rows by a program of its own.

    `layers` are the parameters of some or all. If not, the compiler partitions the step.

    Raises:
        UsageError: the compiler would have to partition attention over the tokens of a row.
    """
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    is_plain = all(path[-1].key in _SPLIT_LEAVES for path, _ in leaves)
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    if tensor > 1 and context > 1 and not is_plain:
        raise UsageError(
            f"mesh.context={context} with mesh.tensor={tensor} takes no layers with biases "
            "or DoRA; use mesh.fsdp in the place of one of them"
        )
    return tensor == 1 or is_plain


def own_config(config: LlamaConfig, tensor: int) -> LlamaConfig:
    """Returns the model of which a device computes the layers, of so many that split them."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // tensor,
        num_key_value_heads=config.num_key_value_heads // tensor,
        intermediate_size=config.intermediate_size // tensor,
    )


def over_rows(
    function: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    mesh: Mesh,
    *,
    own_program: bool,
    has_gradients: bool = True,
) -> Any:
    """Returns a function of (trainable, frozen, rest, batch): sums of `function` over all rows.

    `function` returns a number, and gradients with the structure of `trainable`, or {}.

    With an own program, each device runs `function` on its own rows or tokens only, so that it
    may use kernels which the compiler cannot partition. There `rest` is complete on
    every device. `frozen`, a tree of parameters, is the device's part of it, which
    `gathered` completes, and `trainable` is split by tensor only. The results are summed
    once, in their own dtype; the compiler would sum bfloat16 gradients before they are cast to
    float32, and again for every part of an accumulated batch.
    Otherwise the compiler partitions `function` as the mesh says.
    """

    def partitioned(*args: Any) -> Any:
        with use_mesh(mesh):
            return function(*args)

    if mesh.size == 1 or not own_program:
        return partitioned

    def summed(*args: Any) -> Any:
        number, gradients = function(*args)
        return lax.psum(number, MESH_AXES), jax.tree_util.tree_map_with_path(
            lambda path, x: lax.psum(x, _summed_axes(path)), gradients
        )

    def mapped(trainable: Any, frozen: Any, rest: Any, batch: Any) -> Any:
        whole = jax.tree_util.tree_map_with_path(_without_fsdp, trainable)
        parts = jax.tree.map(lambda x: x.spec, tree_shardings(mesh, frozen))
        return jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(whole, parts, PartitionSpec(), TOKEN_SPEC),
            out_specs=(PartitionSpec(), whole if has_gradients else {}),
            check_vma=False,  # the kernels do not declare over which axes they vary
        )(trainable, frozen, rest, batch)

    return mapped


def _axes(path: tuple[Any, ...]) -> list[Any]:
    """Returns the rule of every axis of the parameter at a path."""
    rules = {None: None, **dict(RULES)}
    return [rules[axis] for axis in logical_axes(tuple(entry.key for entry in path))]


def _without_fsdp(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    """Returns how a trainable parameter is split in `over_rows`: only in layers, by tensor.

    The first axis of stacked layers is not split.
    """
    if path[0].key != "layers":
        return PartitionSpec()
    axes = ["tensor" if "tensor" in (rule or ()) else None for rule in _axes(path)]
    return PartitionSpec(*[None] * (leaf.ndim - len(axes)), *axes)


def _summed_axes(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns over which devices the gradient of a trainable parameter is summed.

    A factor of an adapter that a tensor axis does not split meets a part of the other.
    """
    is_factor = path[0].key == "layers" and path[-1].key in ("lora_A", "lora_B")
    is_split = any("tensor" in (rule or ()) for rule in _axes(path))
    return MESH_AXES if is_factor and not is_split else (*BATCH_AXES, "context")


def own_size(axis: str) -> int:
    """Returns the devices of a mesh axis inside `over_rows`, elsewhere 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def holds_parts() -> bool:
    """Returns whether fsdp splits the frozen weights here, inside `over_rows`."""
    return own_size("fsdp") > 1


def gathered(tree: Any, axes: tuple[str, ...] = ("fsdp",)) -> Any:
    """Returns parameters of which `axes` split nothing more; those outside as they are.

    They are gathered as they are stored, so quantised ones as their bytes.
    """
    axes = tuple(axis for axis in axes if own_size(axis) > 1)

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        for dimension, rule in enumerate(_axes(path)):
            for axis in axes:
                if axis in (rule or ()):
                    leaf = lax.all_gather(leaf, axis, axis=dimension, tiled=True)
        return leaf

    return jax.tree_util.tree_map_with_path(whole, tree) if axes else tree


def splits_layers() -> bool:
    """Returns whether a device has a part of each layer here, inside `over_rows`."""
    return own_size("tensor") > 1


def into_split(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the input of split projections, whose gradient is the sum of the devices'."""
    return _into(x) if splits_layers() else x


def out_of_split(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the sum of what the devices computed, whose gradient all of them get."""
    return _out_of(x) if splits_layers() else x


def first_column(size: int) -> Array:
    """Returns the number of a device's first column, of `size`, of a split activation."""
    index = lax.axis_index("tensor") if splits_layers() else 0
    return jnp.uint32(index * size)


def own_positions(x: Array) -> Array:
    """Returns the device's positions of a [B, T, ...] array that a tensor axis has whole.

    They are padded with zeros to the same number for each device.
    """
    count = own_size("tensor")
    if count == 1:
        return x
    size = -(-x.shape[1] // count)
    fill = [(0, 0), (0, size * count - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    first = lax.axis_index("tensor") * size
    return lax.dynamic_slice_in_dim(jnp.pad(x, fill), first, size, axis=1)


# Defined here, because JAX's rule for the gradient of a sum does not know that all devices
# hold the same.
@jax.custom_vjp
def _into(x: Array) -> Array:
    return x


@jax.custom_vjp
def _out_of(x: Array) -> Array:
    return lax.psum(x, "tensor")


_into.defvjp(lambda x: (x, None), lambda _, dx: (lax.psum(dx, "tensor"),))
_out_of.defvjp(lambda x: (lax.psum(x, "tensor"), None), lambda _, dx: (dx,))
