"""LoRA as leaves of a layer: `lora_A` [in, R], `lora_B` [R, out] and `lora_scaling` [].

A module is adapted when these leaves lie beside its weight, and is a plain layer when
they do not; there is no second model, and merging and the forward pass need only the
tree. An embedding [V, D] is a layer that maps one-hot tokens, so its leaves are the same.

| leaf | what it is |
|---|---|
| `lora_A`, `lora_B`, `lora_scaling` | the update A B * scaling; the scaling is frozen |
| `lora_magnitude` [out] | DoRA: the length each column of W + update is brought to |
| `lora_norm_squared` [out] | DoRA: that of the frozen W, so that no step computes it |
| `lora_A0`, `lora_B0` | PiSSA, OLoRA: the start, which is subtracted from the update |
| `trained_kernel`, `trained_embedding`, `trained_scale`, `trained_bias` | float32 copies |
| `token_rows` [n, D], `token_ids` [n] | rows that stand in for those of a table |
| `lora_shared` [] | in `lm_head` over a tied table: it uses the embedding's adapter |

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021); "DoRA:
Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024); PEFT's `tuners/lora/layer.py`
and `tuners/lora/dora.py` for names and formulas.

Above 300 lines, as all that reads or splits these leaves is here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from jlora.lora.adapter_tree import Params
from jlora.ops.compute_choices import Compute
from jlora.ops.dropout import drop_by, seeds
from jlora.ops.hopper import fused_projections as fused
from jlora.ops.hopper.low_rank import Dropout
from jlora.ops.matmul import matmul, matmul_float32
from jlora.ops.quantize import (
    is_quantized,
    kernel_of,
    quantized_matmul,
)

Leaves = Mapping[str, Any]
_DORA = ("lora_magnitude", "lora_norm_squared")
# Where a layer's weight lies; an adapter is an update of it.
WEIGHTS = ("kernel", "embedding")
# The one value of DoRA's that a recomputing backward pass does better to keep.
NORM_NAME = "dora_norm"


def linear(
    x: Float[Array, "... D_in"],
    leaves: Leaves,
    compute: Compute,
    *,
    dropped: Float[Array, "... D_in"] | None = None,
    keep: bool = False,
) -> Float[Array, "... D_out"]:
    """Returns x W (+ bias) and what the adapter among the leaves makes of it.

    LoRA adds s (x A) B; DoRA then brings every column of W + s A B to its magnitude.
    Products run in `compute.dtype` (float32 masters A and B are cast down, x never up).

    Args:
        x: the input.
        leaves: of one module, see above.
        compute: dtype of the products and the result, and platform.
        dropped: x after dropout, for A (and DoRA's change of the base) in training.
        keep: whether the gradient of what follows reads the product.
    """
    bias = leaves.get("trained_bias", leaves.get("bias"))
    y = _base(x, leaves, compute)
    if dropped is not None and "lora_magnitude" in leaves:
        y = _dropped_dora(x, y, leaves, compute, dropped, keep=keep)
    else:
        if "lora_A" in leaves:
            inner = x if dropped is None else dropped
            y = y + (_update(inner, leaves, compute) - _start(x, leaves, compute))
        y = _finished(y, leaves, keep=keep)
    return y if bias is None else y + bias.astype(compute.dtype)


def _base(x: Array, leaves: Leaves, compute: Compute) -> Array:
    """Returns x W of a kernel that is trained itself, quantised or plain."""
    if "trained_kernel" not in leaves and is_quantized(leaves):
        return quantized_matmul(x, leaves, compute)
    return matmul(x, leaves.get("trained_kernel", leaves.get("kernel")), compute)


def _update(x: Array, leaves: Leaves, compute: Compute) -> Array:
    return _product(x, leaves["lora_A"], leaves["lora_B"], leaves, compute)


def _finished(y: Array, leaves: Leaves, *, keep: bool) -> Array:
    """Returns the product, its columns brought to their magnitudes if this is DoRA.

    A gain's gradient reads the product, so a recomputing backward pass keeps it.
    """
    dora = "lora_magnitude" in leaves
    if keep or dora:
        y = checkpoint_name(y, fused.PRODUCT_NAME)
    return (_gain(leaves) * y).astype(y.dtype) if dora else y


def _gain(leaves: Leaves) -> Array:
    return leaves["lora_magnitude"] / column_norms(leaves)


def _dropped_dora(
    x: Array, y: Array, leaves: Leaves, compute: Compute, dropped: Array, *, keep: bool
) -> Array:
    """Returns DoRA's output under dropout, given y = x W.

    PEFT leaves y itself undropped, which costs this second product with the kernel. A
    backward pass keeps it for the gain's gradient, or the output, where that is read.
    """
    base = _base(dropped, leaves, compute) - _start(dropped, leaves, compute)
    if not keep:
        base = checkpoint_name(base, fused.PRODUCT_NAME)
    y = y - _start(x, leaves, compute)
    gain = _gain(leaves)
    y = (y + (gain - 1) * base + gain * _update(dropped, leaves, compute)).astype(
        compute.dtype
    )
    return checkpoint_name(y, fused.PRODUCT_NAME) if keep else y


def _product(x: Array, a: Array, b: Array, leaves: Leaves, compute: Compute) -> Array:
    """Returns s (x a) b; the scale is applied to b, the smallest, before it is rounded."""
    return matmul(matmul(x, a, compute), b * leaves["lora_scaling"], compute)


def _start(x: Array, leaves: Leaves, compute: Compute) -> Array | float:
    """Returns what the adapter added at its start, if that was taken out of the base."""
    if "lora_A0" not in leaves:
        return 0.0
    return _product(x, leaves["lora_A0"], leaves["lora_B0"], leaves, compute)


def lookup(
    tokens: Int[Array, "..."], leaves: Leaves, compute: Compute
) -> Float[Array, "... D"]:
    """Returns each token's vector, adapted; NaN for an id outside the table.

    The update of a token is A[token] B; an embedding has no dropout, as in PEFT.
    """
    table = leaves.get("trained_embedding", leaves["embedding"])
    y = _rows(table, tokens).astype(compute.dtype)
    if "lora_A" in leaves:
        a = _rows(leaves["lora_A"], tokens)
        b = leaves["lora_B"] * leaves["lora_scaling"]
        y = y + matmul(a, b, compute)
    if "lora_magnitude" in leaves:
        y = (_gain(leaves) * y).astype(compute.dtype)
    if "token_rows" in leaves:
        hit = tokens[..., None] == leaves["token_ids"]
        rows = leaves["token_rows"][jnp.argmax(hit, axis=-1)].astype(compute.dtype)
        y = jnp.where(jnp.any(hit, axis=-1)[..., None], rows, y)
    return y


def _rows(table: Array, tokens: Array) -> Array:
    return table.at[tokens].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
    )


def head_parameters(params: Params) -> Params:
    """Returns the leaves that make logits: those of `lm_head`, over a tied table if need be.

    A tied table's kernel is its `embedding`; DoRA's norms are computed here, once, and
    not by every chunk of positions.
    """
    head = dict(params.get("lm_head", {}))
    if "kernel" not in head:
        head = _tied_head(params["embed_tokens"], head)
    if "lora_magnitude" in head:
        head["lora_norm"] = column_norms({**head, "kernel": _head_kernel(head)})
    return head


def _tied_head(table: Leaves, head: Params) -> Params:
    tied = {"embedding": table["embedding"]}
    tied |= {key: table[key] for key in ("token_rows", "token_ids") if key in table}
    if "lora_shared" in head:
        if "trained_embedding" in table:
            tied["trained_embedding"] = table["trained_embedding"]
        if "lora_A" in table:
            tied["lora_A"], tied["lora_B"] = table["lora_B"].T, table["lora_A"].T
            tied["lora_scaling"] = table["lora_scaling"]
    return tied | {key: leaf for key, leaf in head.items() if key != "lora_shared"}


def _head_kernel(head: Leaves) -> Array:
    table = head.get("trained_embedding", head.get("embedding"))
    return head["kernel"] if table is None else table.T


def head_logits(
    hidden: Float[Array, "... D"],
    head: Leaves,
    compute: Compute,
    *,
    dropped: Float[Array, "... D"] | None = None,
) -> Float[Array, "... V"]:
    """Returns the logits of `head_parameters`' leaves in `compute.dtype`; `dropped` as `linear`."""
    logits = linear(
        hidden, {**head, "kernel": _head_kernel(head)}, compute, dropped=dropped
    )
    if "token_rows" in head:
        rows = matmul(hidden, head["token_rows"].T, compute)
        logits = logits.at[..., head["token_ids"]].set(rows)
    return logits


def column_norms(leaves: Leaves) -> Float[Array, " D_out"]:
    """Returns ||W + s A B|| per output in float32: a constant to every gradient.

    No matrix of W's shape is made: ||W + U||^2 = ||W||^2 + 2 <W, U> + ||U||^2, where the
    first term is a leaf, <W, A B> = sum_r B (A^T W), and ||A B||^2 = sum_r B (A^T A) B.
    """
    if "lora_norm" in leaves:
        return leaves["lora_norm"]
    leaves = {key: jax.lax.stop_gradient(leaf) for key, leaf in leaves.items()}
    a, b = leaves["lora_A"], leaves["lora_B"]
    if "lora_A0" in leaves:
        a = jnp.concatenate([a, leaves["lora_A0"]], axis=1)
        b = jnp.concatenate([b, -leaves["lora_B0"]], axis=0)
    b = b * leaves["lora_scaling"]
    cross = _exact_product(a, weight_of(leaves))
    gram = matmul_float32(a.T, a)
    update = jnp.sum(b * (2 * cross + matmul_float32(gram, b)), axis=0)
    squared = jnp.maximum(leaves["lora_norm_squared"] + update, 0)
    # Behind a barrier, or XLA divides by it as by a reciprocal root: m / n would not be
    # exactly 1 at the start.
    norms = jax.lax.optimization_barrier(jnp.sqrt(squared))
    return checkpoint_name(norms, NORM_NAME)


def weight_of(leaves: Leaves) -> Any:
    """Returns a module's kernel or embedding, a quantised one as float32; None of a norm."""
    if is_quantized(leaves):
        return kernel_of(leaves, jnp.float32)
    return next((leaves[name] for name in WEIGHTS if name in leaves), None)


def _exact_product(a: Array, weight: Array) -> Array:
    """Returns a^T weight in float32, without a float32 copy of a bfloat16 weight.

    Three bfloat16 numbers hold a float32's 24 bits; their products are exact.
    """
    if weight.dtype != jnp.bfloat16:
        return matmul_float32(a.T, weight)
    parts, rest = [], a
    for _ in range(3):
        # Without the barrier XLA may take the rounding to be none.
        part = jax.lax.optimization_barrier(rest.astype(jnp.bfloat16))
        parts.append(part)
        rest = rest - part.astype(jnp.float32)
    stacked = jnp.concatenate(parts, axis=1)  # [in, 3 R]
    product = jnp.matmul(stacked.T, weight, preferred_element_type=jnp.float32)
    return product.reshape(3, a.shape[1], -1).sum(axis=0)


def norm_squared(weight: Array) -> Float[Array, " D_out"]:
    """Returns the sum of squares of every column of a weight, float32."""
    return jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0)


class LoRADense(nn.Module):
    """A dense layer, with an adapter where the tree has one; see `linear`.

    Dropout acts on the adapter's input only, when a "dropout" rng is given, or its seeds
    as the variable "seeds" of a collection of that name.
    `keep`: whether the gradient of what follows reads the product, see `linear`.
    """

    features: int
    use_bias: bool = False
    dropout: float | Array = 0.0
    compute: Compute = field(default_factory=Compute)
    keep: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D_in"]) -> Float[Array, "... D_out"]:
        """Returns the layer's output in `compute.dtype`."""
        shape = (x.shape[-1], self.features)
        if not self.has_variable("params", "kernel_q"):
            self.param("kernel", nn.initializers.zeros_init(), shape)
        if self.use_bias:
            self.param("bias", nn.initializers.zeros_init(), (self.features,))
        leaves = self.variables["params"]
        dropped = None
        if "lora_A" in leaves and self.drops():
            dropped = drop_by(x, self.dropout_seeds(), self.dropout)
        return linear(x, leaves, self.compute, dropped=dropped, keep=self.keep)

    def drops(self) -> bool:
        """Returns whether seeds of dropout are given, or a key to make them of."""
        return self.has_variable("dropout", "seeds") or self.has_rng("dropout")

    def dropout_seeds(self) -> UInt32[Array, "2"]:
        """Returns what the dropout of the adapter's input depends on."""
        if self.has_variable("dropout", "seeds"):
            return self.get_variable("dropout", "seeds")
        return seeds(self.make_rng("dropout"))


def to_fuse(
    x: Array, layers: Sequence[LoRADense]
) -> tuple[list[Params], Dropout | None] | None:
    """Returns the layers' leaves and dropout if fused kernels are to compute them.

    DoRA's leaves are among them: it scales what comes out.
    """
    if any(
        layer.compute.kernels != "hopper" or layer.is_initializing() for layer in layers
    ):
        return None
    leaves = [dict(layer.variables["params"]) for layer in layers]
    rate = layers[0].dropout
    drops = layers[0].drops() and (isinstance(rate, Array) or rate > 0)
    # A rate that is an array is not known here; DoRA drops another product, too.
    if drops and (
        isinstance(rate, Array) or any("lora_magnitude" in y for y in leaves)
    ):
        return None
    plain = _without_dora(leaves)
    if any(is_quantized(own) for own in leaves) or not fused.can_fuse(
        x.astype(layers[0].compute.dtype), plain, drops=drops
    ):
        return None
    if not drops:
        return leaves, None
    return leaves, Dropout(float(rate), [layer.dropout_seeds() for layer in layers])


def _without_dora(layers: Sequence[Leaves]) -> list[Leaves]:
    """Returns the layers as plain LoRA, whose products DoRA scales."""
    return [{k: y for k, y in own.items() if k not in _DORA} for own in layers]


def project(
    x: Float[Array, "B T D"], layers: Sequence[LoRADense]
) -> list[Float[Array, "B T _"]]:
    """Returns every layer's output for their common input."""
    found = to_fuse(x, layers)
    if found is None:
        return [layer(x) for layer in layers]
    leaves, dropout = found
    products = fused.project(
        x.astype(layers[0].compute.dtype), _without_dora(leaves), dropout=dropout
    )
    return [
        _finished(y, own, keep=layer.keep)
        for y, own, layer in zip(products, leaves, layers, strict=True)
    ]


def add_projection(
    residual: Float[Array, "B T D_out"], x: Float[Array, "B T D_in"], layer: LoRADense
) -> Float[Array, "B T D_out"]:
    """Returns residual + layer(x)."""
    found = to_fuse(x, [layer])
    if found is None or "lora_magnitude" in found[0][0]:
        return residual + project(x, [layer])[0]
    return fused.project(x.astype(layer.compute.dtype), found[0], residual, found[1])[0]
