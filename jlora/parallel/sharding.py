"""Where every array lives: three mesh axes, one table of logical axes, one of rules.

A parameter's logical axes follow from its module's name, and an adapter's from its
kernel's. Change the layout by changing `RULES`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import MeshConfig
from jlora.errors import UsageError, listing

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # parameters
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("lora_rank", None),
    # activations: other names, so that a [B, T, D] never looks like a parameter's D
    ("batch", BATCH_AXES),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
)

KERNEL_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
    "embed_tokens": ("vocab", "embed"),  # the kernel of one-hot tokens
}
SCALARS = ("lora_scaling", "lora_shared")


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Returns the (data, fsdp, tensor) mesh over all devices.

    Raises:
        UsageError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size)
    if sizes.count(0) > 1:
        raise UsageError("mesh: only one of data, fsdp and tensor may be 0 (the rest)")
    if 0 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(0)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        named = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise UsageError(
            f"mesh: {named} does not make {len(devices)} devices; "
            "the product of the three must, and one of them may be 0 (the rest)"
        )
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def check_divisible(
    mesh: Mesh, config: LlamaConfig, batch_size: int, grad_accum_steps: int = 1
) -> None:
    """Raises UsageError, listing all of it, where the mesh cuts through something whole."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch_size // grad_accum_steps
    problems = []
    if rows % shards:
        problems.append(
            f"mesh.data*mesh.fsdp={shards} does not divide the {rows} rows of a part of "
            f"the batch (train.batch_size={batch_size} / "
            f"train.grad_accum_steps={grad_accum_steps})"
        )
    for axis, names in (
        ("fsdp", ("hidden_size",)),
        (
            "tensor",
            (
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
            ),
        ),
    ):
        values = [getattr(config, name) for name in names]
        wrong = [
            f"{n}={v}"
            for n, v in zip(names, values, strict=True)
            if v % mesh.shape[axis]
        ]
        if wrong:
            common = math.gcd(*values)
            legal = [n for n in range(1, common + 1) if common % n == 0]
            problems.append(
                f"mesh.{axis}={mesh.shape[axis]} does not divide {listing(wrong)} "
                f"(legal: {listing(legal)})"
            )
    if problems:
        raise UsageError("; ".join(problems))


def logical_axes(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """Returns the logical axes of the parameter at `path`, one per dimension."""
    module, leaf = path[-2], path[-1].removeprefix("trained_")
    if leaf in SCALARS:
        return ()
    if leaf in ("scale", "token_ids"):
        return (None,)
    if leaf == "token_rows":
        return (None, "embed")
    rows, columns = KERNEL_AXES[module]
    return {
        "kernel": (rows, columns),
        "embedding": (rows, columns),
        "kernel_q": (rows, columns),
        "kernel_scale": (columns,),
        "kernel_absmax": (rows, columns),
        "bias": (columns,),
        "lora_A": (rows, "lora_rank"),
        "lora_B": ("lora_rank", columns),
        "lora_A0": (rows, "lora_rank"),
        "lora_B0": ("lora_rank", columns),
        "lora_magnitude": (columns,),
        "lora_norm_squared": (columns,),
    }[leaf]


def parameter_sharding(mesh: Mesh, path: tuple[str, ...]) -> NamedSharding:
    """Returns where the parameter at `path` lives."""
    rules = dict(RULES)
    axes = [None if axis is None else rules[axis] for axis in logical_axes(path)]
    return NamedSharding(mesh, PartitionSpec(*axes))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of every leaf of parameters, or of a state that holds some.

    A leaf belongs to the parameter that the dictionary keys of its path name, so moments
    live beside their weights, also those of several layers along a first axis; scalars
    are replicated.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        keys = [e.key for e in path if isinstance(e, jax.tree_util.DictKey)]
        # The optimizer's state has the labels of its partition, True and False, as keys.
        names = tuple(k for k in keys if isinstance(k, str))
        spec = parameter_sharding(mesh, names).spec
        more = leaf.ndim - len(logical_axes(names))
        return NamedSharding(mesh, PartitionSpec(*[None] * more, *spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where a [B, T] array lives: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes the model's activation constraints mean this mesh while a step is traced."""
    abstract = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with abstract, nn.logical_axis_rules(RULES):
        yield


def has_all_weights(mesh: Mesh) -> bool:
    """Returns whether every device has all weights, so that only rows are split."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def row_shards(mesh: Mesh) -> int:
    """Returns among how many devices the rows are split that `over_rows` shows."""
    return 1 if has_all_weights(mesh) else mesh.shape["data"] * mesh.shape["fsdp"]


def over_rows(function: Callable[[Any, Any], Any], mesh: Mesh) -> Any:
    """Returns (whole, batch) -> the function's sums over all rows of the batch.

    Where several devices have all weights, each runs the function on its own rows, as if
    it were alone. So it may call kernels that the compiler cannot cut, and there is one
    sum, in the dtype of the results: the compiler by itself would add bfloat16 gradients
    before they become float32, and those of every part of a batch. Elsewhere the compiler
    cuts the function, as the mesh says.
    """
    if mesh.size == 1 or not has_all_weights(mesh):

        def cut(whole: Any, batch: Any) -> Any:
            with use_mesh(mesh):
                return function(whole, batch)

        return cut

    def summed(whole: Any, batch: Any) -> Any:
        return jax.lax.psum(function(whole, batch), BATCH_AXES)

    return jax.shard_map(
        summed,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(BATCH_AXES)),
        out_specs=PartitionSpec(),
        check_vma=False,  # the kernels do not say over which axes they vary
    )
