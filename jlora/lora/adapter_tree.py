"""Adapter leaves in a tree of parameters: find, split, join, count and add them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jlora.errors import CorruptError
from jlora.ops.quantize import SCALES, is_quantized, kernel_shape, num_weights

Params = dict[str, Any]


_TRAINABLE = ("lora_A", "lora_B", "lora_magnitude", "token_rows")


def is_trainable(leaf: str) -> bool:
    """Returns whether training moves leaves of this name."""
    return leaf in _TRAINABLE or leaf.startswith("trained_")


def is_adapter(leaf: str) -> bool:
    """Returns whether leaves of this name are an adapter's, not the base's."""
    return leaf.startswith(("lora_", "trained_", "token_"))


def module_at(params: Params, name: str) -> Params:
    """Returns the subtree of an HF module name."""
    node = params
    for part in name.removeprefix("model.").split("."):
        node = node[part]
    return node


def plain_tree(params: Mapping[str, Any]) -> Params:
    """Returns the same leaves in new, plain dicts; Flax's FrozenDict is no dict."""
    return {
        key: plain_tree(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }


def modules(params: Mapping[str, Any]) -> dict[str, Params]:
    """Returns {HF module name: leaves} of all that holds leaves, in model order."""
    params = plain_tree(params)
    found: dict[str, Params] = {}

    def visit(tree: Params, path: tuple[str, ...]) -> None:
        if any(not isinstance(value, dict) for value in tree.values()):
            found[".".join(path)] = tree
            return
        for key in sorted(tree, key=lambda k: (int(k) if k.isdigit() else 0, k)):
            visit(tree[key], (*path, key))

    for key in ("embed_tokens", "layers", "norm"):
        visit(params.get(key, {}), ("model", key))
    visit(params.get("lm_head", {}), ("lm_head",))
    return {name: leaves for name, leaves in found.items() if leaves}


def linear_modules(params: Params) -> dict[str, tuple[int, int]]:
    """Returns {HF module name: (in, out)} of the tree's linear layers, in model order."""
    return {
        name: kernel_shape(leaves)
        for name, leaves in modules(params).items()
        if "kernel" in leaves or is_quantized(leaves)
    }


def with_adapter(
    params: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Any]]
) -> Params:
    """Returns the tree with the leaves of each HF module name added; nothing is copied.

    Raises:
        CorruptError: a module that the tree does not have.
    """
    result = plain_tree(params)
    for name, arrays in leaves.items():
        if name == "lm_head":  # which a tied base has not
            result.setdefault("lm_head", {})
        try:
            module_at(result, name).update(arrays)
        except KeyError as error:
            raise CorruptError(f"the model has no module {name}") from error
    return result


def trainable_mask(params: Mapping[str, Any]) -> Params:
    """Returns a tree of bool: True at the leaves that training moves, False elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_trainable(path[-1].key), plain_tree(params)
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


def count_parameters(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (trainable, all) parameters as PEFT counts them.

    An adapter's settings (scalings, norms, starts, ids) and the scales of quantised
    kernels are no parameters. A copy counts
    beside what it shadows, but a bias trained alone is trained in its place.
    """
    trainable = total = 0
    for leaves in modules(params).values():
        for name, leaf in leaves.items():
            size = 0 if name in SCALES else num_weights(leaf)
            trainable += size if is_trainable(name) else 0
            in_place = name == "trained_bias" and "trained_kernel" not in leaves
            if not in_place and (is_trainable(name) or not is_adapter(name)):
                total += size
    return trainable, total


def format_parameter_count(params: Params) -> str:
    """Returns PEFT's report: trainable params, all params and their ratio in percent."""
    trainable, total = count_parameters(params)
    percent = 100 * trainable / total
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {percent:.4f}"
    )


LeafFunction = Callable[[tuple[str, ...], Any], Any]


def map_leaves(function: LeafFunction, params: Params) -> Params:
    """Returns the tree of function(path, leaf), the path as a tuple of keys."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(entry.key for entry in path), leaf), params
    )
