"""Loads the params of an opened model onto the devices, one tensor at a time."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from jlora.errors import UsageError, listing
from jlora.formats.array_blocks import Index, aligned_copy, as_box, whole
from jlora.formats.model_source import Dtype, ModelSource, read_leaves, resulting_format
from jlora.formats.safetensors_file import Spec
from jlora.formats.tensor_names import set_leaf
from jlora.lora.adapter_tree import Params
from jlora.ops.quantize import BLOCK, Format

BaseDtype = Dtype | Literal["fp8", "int8", "nf4"]
BASE_DTYPES = tuple(name for part in get_args(BaseDtype) for name in get_args(part))
ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_params(
    source: ModelSource,
    *,
    dtype: BaseDtype = "keep",
    sharding: ShardingOf | None = None,
) -> Params:
    """Returns the params as JAX arrays; host memory holds two tensors at most.

    Args:
        source: the model.
        dtype: of every leaf. "keep" loads what is stored, bit for bit; fp8, int8 and nf4
            quantise the projections and keep the other leaves. Any other dtype
            dequantises a quantised model.
        sharding: (path, shape) -> sharding. Each process reads its own slices only.

    Raises:
        UsageError: the model is quantised in another format, or the mesh does not divide
            a tensor evenly.
    """
    params: Params = {}
    plain, quantize = _split_dtype(source, dtype)
    wanted = {path: source.specs(path, plain, quantize) for path in source.tensors}
    if sharding is not None:
        _check_shards(wanted, sharding)
    sent: list[jax.Array] = []
    for path, specs in wanted.items():
        places = {
            leaf: None if sharding is None else sharding(leaf, spec.shape)
            for leaf, spec in specs.items()
        }
        boxes = {leaf: _own_box(places[leaf], specs[leaf].shape) for leaf in specs}
        arrays = read_leaves(source, path, plain, quantize, boxes)
        # One tensor is transferred while the next is read; more would take more memory.
        jax.block_until_ready(sent)
        sent = [
            _place(arrays.pop(leaf), boxes[leaf], spec.shape, places[leaf])
            for leaf, spec in specs.items()
        ]
        for leaf, array in zip(specs, sent, strict=True):
            set_leaf(params, leaf, array)
    return jax.block_until_ready(params)


def _check_shards(
    wanted: Mapping[str, Mapping[str, Spec]], sharding: ShardingOf
) -> None:
    wrong = []
    for specs in wanted.values():
        for leaf, spec in specs.items():
            try:
                shard = sharding(leaf, spec.shape).shard_shape(spec.shape)
            except ValueError:
                shard = None
            if shard is None or _cuts_block(leaf, spec, shard):
                wrong.append(f"{leaf} {list(spec.shape)}")
    if wrong:
        raise UsageError(
            f"the mesh does not cut into equal parts: {listing(wrong, 3)}; nf4 keeps "
            f"blocks of {BLOCK} weights together; lower mesh.fsdp or mesh.tensor, or use "
            "int8 or fp8"
        )


def _cuts_block(leaf: str, spec: Spec, shard: tuple[int, ...]) -> bool:
    """Returns whether a device's rows of nf4, two in a byte, end within a block."""
    is_nf4 = leaf.endswith("/kernel_q") and spec.dtype == np.uint8
    return is_nf4 and shard[0] < spec.shape[0] and 2 * shard[0] % BLOCK != 0


def abstract_params(source: ModelSource, *, dtype: BaseDtype = "keep") -> Params:
    """Returns the shapes and dtypes of what `load_params` returns; reads nothing."""
    params: Params = {}
    plain, quantize = _split_dtype(source, dtype)
    for path in source.tensors:
        for leaf, spec in source.specs(path, plain, quantize).items():
            set_leaf(params, leaf, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    return params


def _split_dtype(source: ModelSource, dtype: BaseDtype) -> tuple[Dtype, Format]:
    """Returns (dtype of the leaves, format of the kernels of the projections)."""
    if dtype in ("fp8", "int8", "nf4"):
        return "keep", resulting_format(source, "keep", dtype)
    return dtype, resulting_format(source, dtype, "none")


def _own_box(sharding: jax.sharding.Sharding | None, shape: tuple[int, ...]) -> Index:
    """Returns the smallest box that holds what this process's devices need."""
    if sharding is None:
        return whole(shape)
    parts = [
        as_box(index, shape)
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    return tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis))
        for axis in zip(*parts, strict=True)
    )


def _place(
    array: np.ndarray,
    box: Index,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Puts a tensor on its devices; `array` holds the part of it that is in `box`."""
    if not array.flags.c_contiguous or array.ctypes.data % 64:
        # On a CPU, JAX uses aligned memory as it is, and copies any other slowly.
        array = aligned_copy(array)
    if sharding is None:
        return jax.device_put(array)
    pieces: dict[str, np.ndarray] = {}  # devices that hold copies share one

    def piece(index: tuple[Any, ...] | None) -> np.ndarray:
        own = as_box(index, shape)
        if str(own) not in pieces:
            inside = tuple(
                slice(part.start - outer.start, part.stop - outer.start)
                for part, outer in zip(own, box, strict=True)
            )
            part = array[inside]
            pieces[str(own)] = array if own == box else aligned_copy(part)
        return pieces[str(own)]

    return jax.make_array_from_callback(shape, sharding, piece)
