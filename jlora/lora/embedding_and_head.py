"""The token embedding and the logits, with the adapters of both, tied or not.

An adapter of an embedding [V, D] treats it as a dense layer over one-hot tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.lora.adapter_tree import Params
from jlora.lora.lora_dense import Leaves, column_norms, linear
from jlora.ops.compute_choices import Compute
from jlora.ops.matmul import matmul


def embed(
    tokens: Int[Array, "..."], leaves: Leaves, compute: Compute
) -> Float[Array, "... D"]:
    """Returns each token's vector with the adapter applied; NaN for an id outside [0, V).

    LoRA adds s A[token] B. As in PEFT, an embedding has no dropout.
    """
    embedding = leaves.get("trained_embedding", leaves["embedding"])
    y = _rows_of_tokens(embedding, tokens).astype(compute.dtype)
    if "lora_A" in leaves:
        b = leaves["lora_B"] * leaves["lora_scaling"]
        y = y + matmul(_rows_of_tokens(leaves["lora_A"], tokens), b, compute)
    if "lora_magnitude" in leaves:
        gain = leaves["lora_magnitude"] / column_norms(leaves)
        y = (gain * y).astype(compute.dtype)
    if "token_rows" in leaves:
        hit = tokens[..., None] == leaves["token_ids"]
        rows = leaves["token_rows"][jnp.argmax(hit, axis=-1)].astype(compute.dtype)
        y = jnp.where(jnp.any(hit, axis=-1)[..., None], rows, y)
    return y


def _rows_of_tokens(matrix: Array, tokens: Array) -> Array:
    return matrix.at[tokens].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
    )


def head_parameters(params: Params) -> Params:
    """Returns the leaves that make the logits: of `lm_head`, or of a tied embedding.

    DoRA's norms are among them, so that they are computed once and not for every chunk of
    positions.
    """
    head = dict(params.get("lm_head", {}))
    if "kernel" not in head:
        head = _tied_head(params["embed_tokens"], head)
    if "lora_magnitude" in head:
        head["lora_norm"] = column_norms({**head, "kernel": _head_kernel(head)})
    return head


def _tied_head(embed_tokens: Leaves, head: Params) -> Params:
    shared = ["embedding", "token_rows", "token_ids"]
    if "lora_shared" in head:
        shared.append("trained_embedding")
    tied = {key: embed_tokens[key] for key in shared if key in embed_tokens}
    if "lora_shared" in head and "lora_A" in embed_tokens:
        tied["lora_A"] = embed_tokens["lora_B"].T
        tied["lora_B"] = embed_tokens["lora_A"].T
        tied["lora_scaling"] = embed_tokens["lora_scaling"]
    return tied | {key: leaf for key, leaf in head.items() if key != "lora_shared"}


def _head_kernel(head: Leaves) -> Array:
    embedding = head.get("trained_embedding", head.get("embedding"))
    return head["kernel"] if embedding is None else embedding.T


def head_logits(
    hidden: Float[Array, "... D"],
    head: Leaves,
    compute: Compute,
    *,
    dropped: Float[Array, "... D"] | None = None,
) -> Float[Array, "... V"]:
    """Returns the logits in `compute.dtype`.

    Args:
        hidden: the final states.
        head: what `head_parameters` returns.
        compute: how to multiply.
        dropped: hidden after dropout, for the adapter in training.
    """
    leaves = {**head, "kernel": _head_kernel(head)}
    logits = linear(hidden, leaves, compute, dropped=dropped)
    if "token_rows" in head:
        rows = matmul(hidden, head["token_rows"].T, compute)
        logits = logits.at[..., head["token_ids"]].set(rows)
    return logits
