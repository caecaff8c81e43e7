"""LoRA as leaves of a layer: `lora_A` [in, R], `lora_B` [R, out] and `lora_scaling` [].

A module is adapted when these leaves lie beside its kernel, and is a plain dense layer
when they do not; there is no second model. `lora_scaling` is alpha / R, a frozen scalar
that travels with the leaves, so that merging and the forward pass need only the tree.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021); PEFT's
`tuners/lora/layer.py` and `tuners/tuners_utils.py` for names, defaults and selection.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora import fused
from jlora.config import LoraConfig
from jlora.errors import CorruptError, UsageError
from jlora.targets import TABLES, select_modules

Params = dict[str, Any]
TRAINABLE_LEAVES = ("lora_A", "lora_B")
LORA_LEAVES = (*TRAINABLE_LEAVES, "lora_scaling")


def matmul(x: Array, w: Array, dtype: Any) -> Array:
    """Returns x @ w in `dtype`; float32 means float32 products, also on GPU and TPU."""
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    return jnp.matmul(x.astype(dtype), w.astype(dtype), precision=precision)


class LoRADense(nn.Module):
    """y = x W (+ bias) + scaling * (dropout(x) A) B, where the leaves A and B exist.

    Products run in `dtype` (float32 masters A and B are cast down, x never up).
    Dropout acts on A's input only, when a "dropout" rng is given.
    `kernels` is xla or hopper; the latter matters to `project` and the model's MLP.
    """

    features: int
    use_bias: bool = False
    dropout: float | Array = 0.0
    dtype: Any = jnp.float32
    kernels: str = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "... D_in"]) -> Float[Array, "... D_out"]:
        """Returns the layer's output in `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros_init(), shape)
        y = matmul(x, kernel, self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
        if not self.has_variable("params", "lora_A"):
            return y
        a, b, scaling = (self.get_variable("params", leaf) for leaf in LORA_LEAVES)
        if self.has_rng("dropout"):
            keep = jax.random.bernoulli(
                self.make_rng("dropout"), 1 - self.dropout, x.shape
            )
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        # The scale is applied to B, the smallest operand, before it is rounded.
        return y + matmul(matmul(x, a, self.dtype), b * scaling, self.dtype)


def leaves_to_fuse(x: Array, layers: Sequence[LoRADense]) -> list[Params] | None:
    """Returns the layers' leaves if `jlora.fused` is to compute them, else None."""
    if any(layer.kernels != "hopper" or layer.is_initializing() for layer in layers):
        return None
    if any(layer.dropout > 0 and layer.has_rng("dropout") for layer in layers):
        return None
    leaves = [dict(layer.variables["params"]) for layer in layers]
    return leaves if fused.can_fuse(x.astype(layers[0].dtype), leaves) else None


def project(
    x: Float[Array, "B T D"], layers: Sequence[LoRADense]
) -> list[Float[Array, "B T _"]]:
    """Returns every layer's output for their common input."""
    leaves = leaves_to_fuse(x, layers)
    if leaves is None:
        return [layer(x) for layer in layers]
    return fused.project(x.astype(layers[0].dtype), leaves)


def linear_modules(params: Params) -> dict[str, tuple[int, int]]:
    """Returns {HF module name: (in, out)} of the tree's linear layers, in model order."""
    found: dict[str, tuple[int, int]] = {}

    def visit(tree: Params, path: tuple[str, ...]) -> None:
        if "kernel" in tree:
            found[".".join(path)] = tree["kernel"].shape
            return
        for key in sorted(
            tree, key=lambda k: (0, int(k), "") if k.isdigit() else (1, 0, k)
        ):
            if isinstance(tree[key], dict):
                visit(tree[key], (*path, key))

    visit(params.get("layers", {}), ("model", "layers"))
    if "lm_head" in params:
        visit(params["lm_head"], ("lm_head",))
    return found


def module_at(params: Params, name: str) -> Params:
    """Returns the subtree of an HF module name."""
    node = params
    for part in name.removeprefix("model.").split("."):
        node = node[part]
    return node


def add_lora(params: Params, config: LoraConfig, key: Array) -> Params:
    """Returns the tree with new adapter leaves beside every selected kernel.

    A is uniform in +-1/sqrt(in), B zero, both float32; the base leaves are shared, not
    copied. Each module draws from its own key, so targets do not influence each other.

    Raises:
        UsageError, UnsupportedError: as `select_modules`; or adapters are there already.
    """
    if any(leaf in LORA_LEAVES for leaf in _leaf_names(params)):
        raise UsageError("these parameters have an adapter already; merge it first")
    linears = linear_modules(params)
    names = list(dict.fromkeys([TABLES[0], *linears, TABLES[1]]))
    selected = select_modules(config, names, strict=True)
    order = {name: i for i, name in enumerate(linears)}
    leaves = {}
    for name, (rank, scaling) in selected.items():
        pair = _init_pair(
            config, jax.random.fold_in(key, order[name]), linears[name], rank
        )
        leaves[name] = {**pair, "lora_scaling": jnp.float32(scaling)}
    return with_adapter(params, leaves)


def _init_pair(
    config: LoraConfig, key: Array, shape: tuple[int, int], rank: int
) -> dict[str, Array]:
    """Returns A [in, R] and B [R, out] drawn as PEFT's `init_lora_weights` says."""
    in_features, out_features = shape
    key_a, key_b = jax.random.split(key)
    a_shape, b_shape = (in_features, rank), (rank, out_features)
    if config.init_lora_weights == "gaussian":
        a = jax.random.normal(key_a, a_shape, jnp.float32) / rank
    else:
        a = _uniform(key_a, a_shape, in_features)
    if config.init_lora_weights is False:
        return {"lora_A": a, "lora_B": _uniform(key_b, b_shape, rank)}
    return {"lora_A": a, "lora_B": jnp.zeros(b_shape, jnp.float32)}


def _uniform(key: Array, shape: tuple[int, int], fan_in: int) -> Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def with_adapter(params: Params, leaves: Mapping[str, Mapping[str, Any]]) -> Params:
    """Returns the tree with the leaves of each HF module name added; nothing is copied.

    Raises:
        CorruptError: a module that the tree does not have.
    """
    result = _copy_structure(params)
    for name, arrays in leaves.items():
        try:
            module_at(result, name).update(arrays)
        except KeyError as error:
            raise CorruptError(f"the model has no module {name}") from error
    return result


def _copy_structure(tree: Params) -> Params:
    return {
        key: _copy_structure(value) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def _leaf_names(params: Params) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [path[-1].key for path, _ in paths]


def trainable_mask(params: Params) -> Params:
    """Returns a tree of bool: True at `lora_A` and `lora_B`, False elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in TRAINABLE_LEAVES, params
    )


def split(params: Params, mask: Params) -> tuple[Params, Params]:
    """Returns (trainable, frozen): two trees that hold only their own leaves."""
    trainable: Params = {}
    frozen: Params = {}
    for key, value in params.items():
        if isinstance(value, dict):
            inner, outer = split(value, mask[key])
            trainable |= {key: inner} if inner else {}
            frozen |= {key: outer} if outer else {}
        else:
            (trainable if mask[key] else frozen)[key] = value
    return trainable, frozen


def join(trainable: Params, frozen: Params) -> Params:
    """Returns the one tree of two that `split` made."""
    result = dict(frozen)
    for key, value in trainable.items():
        result[key] = (
            join(value, frozen.get(key, {})) if isinstance(value, dict) else value
        )
    return result


def count_parameters(params: Params) -> tuple[int, int]:
    """Returns (trainable, all) parameters; `lora_scaling` is a setting, not a parameter."""
    trainable = total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        size = math.prod(leaf.shape)
        total += 0 if name == "lora_scaling" else size
        trainable += size if name in TRAINABLE_LEAVES else 0
    return trainable, total


def format_parameter_count(params: Params) -> str:
    """Returns PEFT's report: trainable params, all params and their ratio in percent."""
    trainable, total = count_parameters(params)
    percent = 100 * trainable / total
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {percent:.4f}"
    )


def merge_kernel(
    kernel: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scaling: float
) -> np.ndarray:
    """Returns W + (A B) * scaling in the kernel's dtype: PEFT's default merge, bit for bit.

    The product, the scale and the sum are each rounded to float32, then the result once
    to the kernel's dtype. NumPy keeps them apart, where one XLA program would contract
    them to a fused multiply-add.

    Source: PEFT `Linear.merge` and `get_delta_weight`, safe_merge=False.
    """
    # PEFT computes B A in [out, in]; the same operand order gives the same sums.
    delta = (lora_b.T.astype(np.float32) @ lora_a.T.astype(np.float32)) * np.float32(
        scaling
    )
    return (kernel.astype(np.float32) + delta.T).astype(kernel.dtype)


def merge(params: Params) -> Params:
    """Returns the tree without adapters, each adapted kernel replaced by `merge_kernel`.

    Raises:
        CorruptError: a merged kernel is not finite.
    """

    def visit(tree: Params, path: str) -> Params:
        result = {
            key: visit(value, f"{path}/{key}") if isinstance(value, dict) else value
            for key, value in tree.items()
            if key not in LORA_LEAVES
        }
        if "lora_A" in tree:
            arrays = [np.asarray(tree[leaf]) for leaf in ("kernel", *LORA_LEAVES)]
            merged = merge_kernel(arrays[0], arrays[1], arrays[2], float(arrays[3]))
            if not np.isfinite(merged.astype(np.float32)).all():
                raise CorruptError(f"{path}: the merged weights are not finite")
            result["kernel"] = _placed_like(merged, tree["kernel"])
        return result

    return visit(params, "")


def _placed_like(array: np.ndarray, like: Any) -> Any:
    return (
        jax.device_put(array, like.sharding) if isinstance(like, jax.Array) else array
    )


LeafFunction = Callable[[tuple[str, ...], Any], Any]


def map_leaves(function: LeafFunction, params: Params) -> Params:
    """Returns the tree of function(path, leaf), the path as a tuple of keys."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(entry.key for entry in path), leaf), params
    )
