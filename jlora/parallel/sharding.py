"""Where every array lives: four mesh axes, the logical axes of arrays, and one table.

The table `RULES` says which mesh axis splits which logical axis: change the layout there.
A parameter's logical axes follow from the name of its module, those of an adapter's leaf
from its kernel's.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import MeshSizes
from jlora.errors import UsageError, listing
from jlora.parallel.described_devices import DescribedDevice

# From the outermost to the innermost, whose devices exchange most.
MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# Of a [B, T] array: rows, and the tokens of a row.
TOKEN_SPEC = PartitionSpec(BATCH_AXES, "context")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # parameters
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    # Rows as well, because parts that are rows need no further copy to be a whole matrix.
    ("rows_of_heads", ("tensor", "fsdp")),
    ("rows_of_mlp", ("tensor", "fsdp")),
    ("lora_rank", None),
    # activations; other names, so that their D is not split as a parameter's D is
    ("batch", BATCH_AXES),
    ("length", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
)

KERNEL_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("rows_of_heads", None),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("rows_of_mlp", None),
    "lm_head": ("embed", "vocab"),
    "embed_tokens": ("vocab", "embed"),  # the kernel of one-hot tokens
}
# Of these two fsdp cuts columns if they are quantised: nf4 keeps 64 rows together, and the
# blocks of their inputs need not divide.
QUANTIZED_AXES = KERNEL_AXES | {
    "o_proj": ("heads", "embed"),
    "down_proj": ("mlp", "embed"),
}
# The leaves whose axes do not depend on their module.
LEAF_AXES = {
    "scale": (None,),
    "token_ids": (None,),
    "token_rows": (None, "embed"),
    "lora_scaling": (),
    "lora_shared": (),
}


def make_mesh(config: MeshSizes, devices: list[Any] | None = None) -> Mesh:
    """Returns the mesh of `MESH_AXES` over all devices, or over the first of them.

    Only one process may leave devices unused: of several, each needs its own.

    Raises:
        UsageError: there are fewer devices, or the axes do not divide them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: n for axis, n in asdict(config).items() if axis in MESH_AXES}
    rest = [axis for axis, size in sizes.items() if not size]
    fixed = math.prod(size for size in sizes.values() if size)
    if len(rest) > 1:
        raise UsageError(
            f"mesh: only one of {listing(list(sizes))} may be 0 (the rest)"
        )
    if rest and len(devices) % fixed == 0:
        sizes[rest[0]] = len(devices) // fixed
    count = math.prod(sizes.values())
    if not rest and jax.process_count() == 1:
        devices = devices[:count]
    if count != len(devices):
        named = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        fewer = "" if jax.process_count() > 1 else "or less, "
        raise UsageError(
            f"mesh: {named} does not make {len(devices)} devices; "
            f"the product of them must, {fewer}and one may be 0 (the rest)"
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    if isinstance(devices[0], DescribedDevice):
        return Mesh(np.array(devices).reshape(shape), MESH_AXES)
    # An axis need not be one of the torus of a TPU slice.
    placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES)


def check_divisible(
    mesh: Mesh, config: LlamaConfig, batch_size: int, grad_accum_steps: int = 1
) -> None:
    """Raises UsageError, with all reasons, if the mesh does not divide batch and model."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch_size // grad_accum_steps
    problems = []
    if rows % shards:
        problems.append(
            f"mesh.data*mesh.fsdp={shards} does not divide the {rows} rows of a part of "
            f"the batch (train.batch_size={batch_size} / "
            f"train.grad_accum_steps={grad_accum_steps}); give train.batch_size a multiple "
            f"of {shards * grad_accum_steps}"
        )
    for axes, sizes in _divided(config).items():
        cuts = math.prod(mesh.shape[axis] for axis in axes)
        wrong = [f"{name}={size}" for name, size in sizes.items() if size % cuts]
        if wrong and mesh.shape[axes[0]] > 1:
            common = math.gcd(*sizes.values())
            legal = [n for n in range(1, common + 1) if common % n == 0]
            problems.append(
                f"{'*'.join(f'mesh.{axis}' for axis in axes)}={cuts} does not divide "
                f"{listing(wrong)} (legal: {listing(legal)})"
            )
    if problems:
        raise UsageError("; ".join(problems))


def check_length(mesh: Mesh, length: int) -> None:
    """Raises UsageError if the mesh does not divide the tokens of a row."""
    parts = mesh.shape["context"]
    if length % parts:
        legal = [n for n in range(1, mesh.size + 1) if length % n == 0]
        raise UsageError(
            f"mesh.context={parts} does not divide rows of {length} tokens (legal: "
            f"{listing(legal)}); their length is data.seq_len, or without packing that "
            "of the longest record, rounded up"
        )


def _divided(config: LlamaConfig) -> dict[tuple[str, ...], dict[str, int]]:
    """Returns the sizes of a model that mesh axes, or their product, must divide."""
    heads = config.num_attention_heads
    width = {"intermediate_size": config.intermediate_size}
    return {
        ("fsdp",): {"hidden_size": config.hidden_size},
        # It would cut through a head otherwise.
        ("tensor",): {
            "num_attention_heads": heads,
            "num_key_value_heads": config.num_key_value_heads,
            **width,
            "vocab_size": config.vocab_size,
        },
        # Devices exchange the tokens of a row for heads of all of them.
        ("context", "tensor"): {"num_attention_heads": heads},
        ("fsdp", "tensor"): {
            "num_attention_heads*head_dim": heads * config.head_dim,
            **width,
        },
    }


def logical_axes(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """Returns the logical axes of the parameter at `path`, one per dimension."""
    module, leaf = path[-2], path[-1].removeprefix("trained_")
    if leaf in LEAF_AXES:
        return LEAF_AXES[leaf]
    rows, columns = KERNEL_AXES[module]
    stored_rows, stored_columns = QUANTIZED_AXES[module]
    return {
        "kernel": (rows, columns),
        "embedding": (rows, columns),
        "kernel_q": (stored_rows, stored_columns),
        "kernel_scale": (stored_columns,),
        "kernel_absmax": (stored_rows, stored_columns),
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
    """Returns the sharding of every leaf of parameters, or of a state that contains some.

    A leaf has the sharding of the parameter that the dictionary keys of its path name.
    So moments live where their weights do, also those of stacked layers, whose first axis
    is not split. Scalars are replicated, and what an optimizer keeps of a row or column.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [e.key for e in path if isinstance(e, jax.tree_util.DictKey)]
        # Keys of the optimizer's state are also the labels of its partition, True and False.
        names = tuple(k for k in keys if isinstance(k, str))
        if leaf.ndim == 0 or not names or leaf.ndim < len(logical_axes(names)):
            return NamedSharding(mesh, PartitionSpec())
        spec = parameter_sharding(mesh, names).spec
        more = leaf.ndim - len(logical_axes(names))
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * more, *spec))
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:  # Adafactor keeps arrays of one element beside vectors
            return NamedSharding(mesh, PartitionSpec())
        return sharding

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where a [B, T] array lives: rows over data and fsdp, T over context."""
    return NamedSharding(mesh, TOKEN_SPEC)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Applies the model's constraints on activations to this mesh while it is traced."""
    abstract = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with abstract, nn.logical_axis_rules(RULES):
        yield
