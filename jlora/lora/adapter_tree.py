"""What an adapter is in the tree of parameters, and how to find, add, split and count it.

Parameters are nested dicts with Hugging Face's names as paths, such as
`layers/0/self_attn/q_proj/kernel`. A module is adapted when some of these leaves lie beside
its weight W, and is a plain layer when none do; there is no second model.

| leaf | meaning |
|---|---|
| `lora_A` [in, R], `lora_B` [R, out] | LoRA: the layer uses W + scaling * (A B) |
| `lora_scaling` [] | the scaling, which is not trained |
| `lora_magnitude` [out] | DoRA: the norm that each column of that sum is scaled to |
| `lora_norm_squared` [out] | DoRA: squared column norms of W, computed once |
| `lora_A0`, `lora_B0` | PiSSA, OLoRA: the initial A and B; their product is subtracted |
| `trained_kernel`, `trained_bias`, ... | float32 copy, trained and used in place of the leaf |
| `token_ids` [n], `token_rows` [n, D] | trained rows of an embedding, and whose they are |
| `lora_shared` [] | in `lm_head`, if tied: it uses the adapter of the embedding |

An embedding [V, D] counts as a dense layer over one-hot tokens, so it has the same leaves.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.errors import CorruptError
from jlora.ops.quantize import (
    SCALES,
    is_quantized,
    kernel_of,
    kernel_shape,
    num_weights,
)

Params = dict[str, Any]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# The leaf that is a module's weight.
WEIGHT_LEAVES = ("kernel", "embedding")


def is_adapter(leaf: str) -> bool:
    """Returns whether a leaf of this name belongs to an adapter, not to the base model."""
    return leaf.startswith(("lora_", "trained_", "token_"))


def is_trainable(leaf: str) -> bool:
    """Returns whether training updates a leaf of this name."""
    trained = ("lora_A", "lora_B", "lora_magnitude", "token_rows")
    return leaf in trained or leaf.startswith("trained_")


def plain_tree(params: Mapping[str, Any]) -> Params:
    """Returns the same leaves in new dicts, also of a Flax FrozenDict."""
    return {
        key: plain_tree(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }


def map_leaves(
    function: Callable[[tuple[str, ...], Any], Any], params: Params
) -> Params:
    """Returns the tree of function(path, leaf), the path as a tuple of keys."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(entry.key for entry in path), leaf), params
    )


def module_at(params: Params, name: str) -> Params:
    """Returns the leaves of the module with this HF name."""
    node = params
    for part in name.removeprefix("model.").split("."):
        node = node[part]
    return node


def modules(params: Mapping[str, Any]) -> dict[str, Params]:
    """Returns {HF module name: leaves} of every module that has some, in model order."""
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
    visit(params.get(HEAD, {}), (HEAD,))
    return found


def linear_modules(params: Params) -> dict[str, tuple[int, int]]:
    """Returns {HF module name: (in, out)} of all linear layers, in model order."""
    return {
        name: kernel_shape(leaves)
        for name, leaves in modules(params).items()
        if "kernel" in leaves or is_quantized(leaves)
    }


def weight_of(leaves: Mapping[str, Any]) -> Any:
    """Returns a module's kernel or embedding, dequantised to float32; None of a norm."""
    if is_quantized(leaves):
        return kernel_of(leaves, jnp.float32)
    return next((leaves[name] for name in WEIGHT_LEAVES if name in leaves), None)


def weight_in(found: Mapping[str, Params], name: str) -> Any:
    """Returns the weight of one of `modules`; of a tied head, the embedding's transpose."""
    leaves = found.get(name, {})
    if name == HEAD and "kernel" not in leaves:
        return found[EMBEDDING]["embedding"].T
    return weight_of(leaves)


def with_adapter(
    params: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Any]]
) -> Params:
    """Returns a tree that also has these leaves, by HF module name; no array is copied.

    Raises:
        CorruptError: the tree has no such module.
    """
    result = plain_tree(params)
    for name, arrays in leaves.items():
        if name == HEAD:  # a tied base has none
            result.setdefault(HEAD, {})
        try:
            module_at(result, name).update(arrays)
        except KeyError as error:
            raise CorruptError(f"the model has no module {name}") from error
    return result


def trainable_mask(params: Mapping[str, Any]) -> Params:
    """Returns a tree of bool: True for every leaf that training updates."""
    return map_leaves(lambda path, _: is_trainable(path[-1]), plain_tree(params))


def split(params: Params, mask: Params) -> tuple[Params, Params]:
    """Returns (trainable, frozen): two trees without branches that would be empty."""
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


def base_of(params: Params) -> Params:
    """Returns the tree without the leaves of adapters."""
    return split(params, map_leaves(lambda path, _: is_adapter(path[-1]), params))[1]


def join(trainable: Params, frozen: Params) -> Params:
    """Returns the whole tree again from the two that `split` returned."""
    result = dict(frozen)
    for key, value in trainable.items():
        is_branch = isinstance(value, dict)
        result[key] = join(value, frozen.get(key, {})) if is_branch else value
    return result


def count_parameters(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (trainable, all) parameters, counted as PEFT counts them.

    Scalings, norms, initial values, token ids and the scales of quantised kernels are not
    parameters. A trained copy counts in addition to the leaf that it replaces, except for
    a bias that is trained without its kernel.
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
    """Returns PEFT's line: trainable parameters, all parameters, and their ratio."""
    trainable, total = count_parameters(params)
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
