"""Adapters folded into the weights they update: PEFT's `merge_and_unload`, bit for bit.

All of it is NumPy, which rounds the product, the scale and the sum apart, where one XLA
program would contract them to a fused multiply-add.

Source: PEFT `tuners/lora/layer.py`, `Linear.merge`, `Embedding.merge` and
`get_delta_weight` with safe_merge=False; `tuners/lora/variants.py` for DoRA.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora.errors import CorruptError
from jlora.lora.adapter_tree import Params, is_adapter, plain_tree
from jlora.lora.lora_dense import WEIGHTS
from jlora.ops.quantize import QUANTIZED_LEAVES, is_quantized, kernel_of

Arrays = Mapping[str, np.ndarray]


def merge(params: Mapping[str, Any]) -> Params:
    """Returns the tree without adapters, each adapted weight replaced by its merged one.

    A quantised kernel with an adapter becomes a plain one, of the embedding's dtype.
    Where embedding and head of a tied base come apart, the head becomes a leaf of its
    own, `lm_head/kernel`; the model reads it from there.

    Raises:
        CorruptError: a merged weight is not finite.
    """
    params = plain_tree(params)
    result = _merge_tree(params, "", _table_dtype(params))
    head = params.get("lm_head", {})
    if "kernel" not in head:
        result.pop("lm_head", None)
        table = params.get("embed_tokens", {})
        kernel = merge_tied_head(_arrays(table), _arrays(head))
        if kernel is not None:
            like = table["embedding"]
            result["lm_head"] = {"kernel": _placed_like(kernel.T, like).T}
    return result


def _table_dtype(params: Params) -> Any:
    table = params.get("embed_tokens", {}).get("embedding")
    return np.dtype(np.float32) if table is None else table.dtype


def _merge_tree(tree: Params, path: str, dtype: Any) -> Params:
    if not any(is_adapter(key) for key in tree):
        return {
            key: _merge_tree(value, f"{path}/{key}" if path else key, dtype)
            if isinstance(value, dict)
            else value
            for key, value in tree.items()
        }
    result = {key: leaf for key, leaf in tree.items() if not is_adapter(key)}
    if result:
        arrays = _arrays(tree)
        if is_quantized(tree):
            arrays["kernel"] = kernel_of(arrays, np.float32)
        plain = {k: v for k, v in arrays.items() if k not in QUANTIZED_LEAVES}
        result = {}
        for key, array in merge_module(plain).items():
            if not np.isfinite(array.astype(np.float32)).all():
                raise CorruptError(f"{path}: the merged weights are not finite")
            like: Any = tree.get(key, tree.get("kernel_q"))
            own = like.dtype if key in tree else dtype
            result[key] = _placed_like(array.astype(own, copy=False), like)
    return result


def _arrays(tree: Params) -> dict[str, np.ndarray]:
    return {key: np.asarray(leaf) for key, leaf in tree.items()}


def _placed_like(array: np.ndarray, like: Any) -> Any:
    return (
        jax.device_put(array, like.sharding) if isinstance(like, jax.Array) else array
    )


def merge_module(leaves: Arrays, dtype: Any = None) -> dict[str, np.ndarray]:
    """Returns the base's leaves of one module with its adapter merged into them.

    Args:
        leaves: of one module, see `jlora.lora.lora_dense`.
        dtype: of the result; None keeps each leaf's own.
    """
    base = {key: leaf for key, leaf in leaves.items() if not is_adapter(key)}
    merged = {
        key: leaves.get(f"trained_{key}", leaf).astype(leaf.dtype, copy=False)
        for key, leaf in base.items()
    }
    for key in WEIGHTS:
        if key in merged and "lora_A" in leaves:
            merged[key] = _merge_weight(merged[key], leaves, key, dtype)
        if key in merged and "token_rows" in leaves:
            merged[key] = _with_rows(merged[key], leaves, key)
    return {
        key: leaf.astype(leaf.dtype if dtype is None else dtype, copy=False)
        for key, leaf in merged.items()
    }


def merge_tied_head(
    table: Arrays, head: Arrays, dtype: Any = None
) -> np.ndarray | None:
    """Returns the kernel [D, V] of a tied base's head; None where it stays the embedding.

    Args:
        table: leaves of `embed_tokens`.
        head: leaves of `lm_head`, all of them an adapter's.
        dtype: of the result; None keeps the table's.
    """
    parts = {key for key in (*table, *head) if is_adapter(key)}
    if "lora_shared" in head or not parts:
        return None
    tokens = {key: table[key] for key in ("token_ids", "token_rows") if key in table}
    own = {"kernel": table["embedding"].T, **tokens, **head}
    kernel = merge_module(own, dtype)["kernel"]
    merged = merge_module(table, dtype)["embedding"]
    return None if np.array_equal(kernel.T, merged) else kernel


def merge_kernel(
    kernel: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scaling: float
) -> np.ndarray:
    """Returns W + (A B) * scaling in the kernel's dtype.

    The product, the scale and the sum are each rounded to float32, then the result once
    to the kernel's dtype.
    """
    total = kernel.astype(np.float32) + _update(lora_a, lora_b, scaling)
    return total.astype(kernel.dtype)


def _update(lora_a: np.ndarray, lora_b: np.ndarray, scaling: Any) -> np.ndarray:
    # PEFT computes B A in [out, in]; the same operand order gives the same sums.
    product = lora_b.T.astype(np.float32) @ lora_a.T.astype(np.float32)
    return (product * np.float32(scaling)).T


def _merge_weight(
    weight: np.ndarray, leaves: Arrays, name: str, dtype: Any
) -> np.ndarray:
    """Returns W + update, for DoRA each column brought to its magnitude."""
    if "lora_A0" in leaves:
        weight = without_start(
            weight, leaves["lora_A0"], leaves["lora_B0"], leaves["lora_scaling"]
        )
    update = _update(leaves["lora_A"], leaves["lora_B"], leaves["lora_scaling"])
    if "lora_magnitude" in leaves:
        total = weight.astype(np.float32) + update
        norms = np.linalg.norm(total, axis=0)
        total = (leaves["lora_magnitude"].astype(np.float32) / norms) * total
    else:
        if name == "embedding":  # PEFT rounds an embedding's update by itself
            update = update.astype(weight.dtype).astype(np.float32)
        total = weight.astype(np.float32) + update
    return total.astype(weight.dtype if dtype is None else dtype)


def without_start(
    weight: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scaling: Any
) -> np.ndarray:
    """Returns W - (scaling B0) A0 in W's dtype: the base that PiSSA and OLoRA leave.

    Source: PEFT `Linear.pissa_init`, `Linear.olora_init`.
    """
    start = (np.float32(scaling) * lora_b.T.astype(np.float32)) @ lora_a.T
    return (weight.astype(np.float32) - start.T).astype(weight.dtype)


def _with_rows(weight: np.ndarray, leaves: Arrays, name: str) -> np.ndarray:
    """Returns a table with the trained rows of its tokens (columns of a head's kernel)."""
    result = np.array(weight)
    rows = leaves["token_rows"].astype(weight.dtype)
    if name == "embedding":
        result[leaves["token_ids"]] = rows
    else:
        result[:, leaves["token_ids"]] = rows.T
    return result
