"""Merge adapters into the weights that they adapt, as PEFT's `merge_and_unload` does.

The result equals PEFT's bit for bit, so all of it is NumPy: XLA would contract the scaled
product and the sum to one fused multiply-add, which rounds once where PEFT rounds twice.

Source: PEFT `tuners/lora/layer.py`, `Linear.merge`, `Embedding.merge` and
`get_delta_weight` with safe_merge=False; `tuners/lora/variants.py` for DoRA.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora.errors import CorruptError
from jlora.lora.adapter_tree import (
    EMBEDDING,
    HEAD,
    WEIGHT_LEAVES,
    Params,
    is_adapter,
    module_at,
    modules,
    plain_tree,
)
from jlora.ops.quantize import QUANTIZED_LEAVES, is_quantized, kernel_of

Arrays = Mapping[str, np.ndarray]


def merge(params: Mapping[str, Any]) -> Params:
    """Returns the tree without adapters; each adapted weight is replaced by its merged one.

    A quantised kernel with an adapter becomes a plain one, of the embedding's dtype.
    A tied head that differs from the embedding after the merge becomes a leaf of its own,
    `lm_head/kernel`, where the model finds it.

    Raises:
        CorruptError: a merged weight is not finite.
    """
    found, result = modules(params), plain_tree(params)
    embedding, head = found.get(EMBEDDING, {}), found.get(HEAD, {})
    dtype = embedding["embedding"].dtype if embedding else np.dtype(np.float32)
    for name, leaves in found.items():
        if any(map(is_adapter, leaves)):
            module = module_at(result, name)
            module.clear()
            module.update(_merged_leaves(leaves, name, dtype))
    if "kernel" not in head:
        result.pop(HEAD, None)
        kernel = merge_tied_head(_arrays(embedding), _arrays(head))
        if kernel is not None:
            # Transposed, so that the head is sharded as the embedding is.
            tied = placed_like(kernel.T, embedding["embedding"])
            result[HEAD] = {"kernel": tied.T}
    return result


def _merged_leaves(leaves: Params, name: str, dtype: Any) -> Params:
    """Returns the merged leaves of one module, on the devices of the given ones."""
    arrays = _arrays(leaves)
    if is_quantized(leaves):
        arrays["kernel"] = kernel_of(arrays, np.float32)
    plain = {k: array for k, array in arrays.items() if k not in QUANTIZED_LEAVES}
    result = {}
    for key, array in merge_module(plain).items():
        if not np.isfinite(array.astype(np.float32)).all():
            path = name.removeprefix("model.").replace(".", "/")
            raise CorruptError(f"{path}: the merged weights are not finite")
        like: Any = leaves.get(key, leaves.get("kernel_q"))
        own = like.dtype if key in leaves else dtype
        result[key] = placed_like(array.astype(own, copy=False), like)
    return result


def _arrays(leaves: Params) -> dict[str, np.ndarray]:
    return {key: np.asarray(leaf) for key, leaf in leaves.items()}


def placed_like(array: np.ndarray, like: Any) -> Any:
    """Returns the array on the devices of another one; unchanged beside a NumPy array."""
    return (
        jax.device_put(array, like.sharding) if isinstance(like, jax.Array) else array
    )


def merge_module(leaves: Arrays, dtype: Any = None) -> dict[str, np.ndarray]:
    """Returns the base model's leaves of one module, with its adapter merged into them.

    Args:
        leaves: of one module, see `jlora.lora.adapter_tree`.
        dtype: of the result; None keeps each leaf's own.
    """
    merged = {
        key: leaves.get(f"trained_{key}", leaf).astype(leaf.dtype, copy=False)
        for key, leaf in leaves.items()
        if not is_adapter(key)
    }
    for key in WEIGHT_LEAVES:
        if key in merged and "lora_A" in leaves:
            merged[key] = _merge_weight(merged[key], leaves, key, dtype)
        if key in merged and "token_rows" in leaves:
            merged[key] = _with_token_rows(merged[key], leaves, key)
    return {
        key: leaf.astype(leaf.dtype if dtype is None else dtype, copy=False)
        for key, leaf in merged.items()
    }


def merge_tied_head(
    embedding: Arrays, head: Arrays, dtype: Any = None
) -> np.ndarray | None:
    """Returns the kernel [D, V] of a tied head, or None if it stays the embedding.

    Args:
        embedding: leaves of `embed_tokens`.
        head: leaves of `lm_head`, which are all an adapter's.
        dtype: of the result; None keeps the embedding's.
    """
    if "lora_shared" in head or not any(map(is_adapter, (*embedding, *head))):
        return None
    tokens = {k: leaf for k, leaf in embedding.items() if k.startswith("token_")}
    own = {"kernel": embedding["embedding"].T, **tokens, **head}
    kernel = merge_module(own, dtype)["kernel"]
    merged = merge_module(embedding, dtype)["embedding"]
    return None if np.array_equal(kernel.T, merged) else kernel


def _merge_weight(
    weight: np.ndarray, leaves: Arrays, name: str, dtype: Any
) -> np.ndarray:
    """Returns W + scaling * (A B), for DoRA with every column scaled to its magnitude.

    The product, its scaling and the sum are each rounded to float32, and the result to its
    dtype. As in PEFT, some are rounded to W's dtype before the sum: the update of an
    embedding (without DoRA), W less the initial update of PiSSA and OLoRA, and a W that is
    a trained copy.
    """
    a, b, scaling = (leaves[key] for key in ("lora_A", "lora_B", "lora_scaling"))
    if "lora_A0" in leaves:
        weight = without_initial_update(
            weight, leaves["lora_A0"], leaves["lora_B0"], scaling
        )
    # PEFT computes B A in [out, in]; the same order of operands gives the same sums.
    product = b.T.astype(np.float32) @ a.T.astype(np.float32)
    update = (product * np.float32(scaling)).T
    if name == "embedding" and "lora_magnitude" not in leaves:
        # PEFT rounds the update of an embedding by itself.
        update = update.astype(weight.dtype).astype(np.float32)
    total = weight.astype(np.float32) + update
    if "lora_magnitude" in leaves:
        norms = np.linalg.norm(total, axis=0)
        total = (leaves["lora_magnitude"].astype(np.float32) / norms) * total
    return total.astype(weight.dtype if dtype is None else dtype)


def without_initial_update(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, scaling: Any
) -> np.ndarray:
    """Returns W - (scaling * B0) A0 in W's dtype: the base weight of PiSSA and OLoRA.

    Source: PEFT `Linear.pissa_init`, `Linear.olora_init`.
    """
    initial = (np.float32(scaling) * b.T.astype(np.float32)) @ a.T
    return (weight.astype(np.float32) - initial.T).astype(weight.dtype)


def _with_token_rows(weight: np.ndarray, leaves: Arrays, name: str) -> np.ndarray:
    """Returns an embedding with its trained rows (a head's kernel: columns), cast to it."""
    result = np.array(weight)
    rows = leaves["token_rows"].astype(weight.dtype)
    if name == "embedding":
        result[leaves["token_ids"]] = rows
    else:
        result[:, leaves["token_ids"]] = rows.T
    return result
