"""A dense layer with the LoRA or DoRA adapter whose leaves lie beside its weight.

`jlora.lora.adapter_tree` lists the leaves of an adapter. Without any of them the layer is
a plain one. One more, `lora_norm`, is never in the tree: `head_parameters` computes DoRA's
column norms once for all chunks of a step.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021); "DoRA:
Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024); PEFT's `tuners/lora/layer.py`
and `tuners/lora/dora.py`.
"""

from dataclasses import field

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt32

from jlora.lora.adapter_tree import weight_of
from jlora.ops.compute_choices import Compute
from jlora.ops.dropout import drop_by, placed, seeds
from jlora.ops.elementwise import plus_trained
from jlora.ops.hopper.fused_projections import PRODUCT_NAME, Leaves
from jlora.ops.matmul import matmul, matmul_float32
from jlora.ops.quantize import is_quantized, kernel_shape
from jlora.ops.quantized_matmul import quantized_matmul
from jlora.parallel.own_program import first_column, splits_layers

# DoRA's column norms, which remat "minimal" saves for the backward pass.
NORM_NAME = "dora_norm"


class LoRADense(nn.Module):
    """A dense layer that applies the adapter among its leaves; see `linear`.

    Attributes:
        features: size of the output.
        takes_split: whether a tensor axis splits the input, not the output.
        use_bias: whether there is a bias.
        dropout: rate on the adapter's input. It acts when a "dropout" rng is given, or its
            seeds as the variable "seeds" of a collection of that name.
        compute: how to multiply.
        save_output: whether remat "minimal" saves the output for the backward pass.
    """

    features: int
    takes_split: bool = False
    use_bias: bool = False
    dropout: float | Array = 0.0
    compute: Compute = field(default_factory=Compute)
    save_output: bool = False

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
        if "lora_A" in leaves and self.has_dropout():
            dropped = drop_by(x, self.dropout_seeds(x), self.dropout)
        return linear(
            x, leaves, self.compute, dropped=dropped, save_output=self.save_output
        )

    def has_dropout(self) -> bool:
        """Returns whether dropout's seeds are given, or an rng to draw them from."""
        return self.has_variable("dropout", "seeds") or self.has_rng("dropout")

    def dropout_seeds(self, x: Float[Array, "... T _"]) -> UInt32[Array, " words"]:
        """Returns the seeds of this layer's dropout mask, of inputs that lie where x does."""
        if self.has_variable("dropout", "seeds"):
            found = self.get_variable("dropout", "seeds")
        else:
            found = seeds(self.make_rng("dropout"))
        if not (self.takes_split and splits_layers()):
            return placed(found, x)
        size, _ = kernel_shape(self.variables["params"])
        return placed(found, x, first_column(size))


def linear(
    x: Float[Array, "... D_in"],
    leaves: Leaves,
    compute: Compute,
    *,
    dropped: Float[Array, "... D_in"] | None = None,
    save_output: bool = False,
) -> Float[Array, "... D_out"]:
    """Returns x W (+ bias) with the adapter applied, in `compute.dtype`.

    LoRA adds s (x A) B. DoRA then scales every column of W + s A B to its magnitude. All
    factors of a product are cast to `compute.dtype`.

    Args:
        x: the input.
        leaves: the weight and the adapter of one layer.
        compute: how to multiply.
        dropped: x after dropout, None without it. A reads it, and so does the product with
            W by which DoRA changes x W.
        save_output: whether remat "minimal" saves the product for the backward pass.
    """
    y = _base_product(x, leaves, compute)
    if dropped is not None and "lora_magnitude" in leaves:
        y = _dora_with_dropout(x, y, leaves, compute, dropped, save_output=save_output)
    else:
        if "lora_A" in leaves:
            update = _lora_product(x if dropped is None else dropped, leaves, compute)
            y = y + (update - _initial_product(x, leaves, compute))
        y = scale_columns(y, leaves, save_output=save_output)
    if "trained_bias" in leaves:
        return plus_trained(y, leaves["trained_bias"])
    return y + leaves["bias"].astype(compute.dtype) if "bias" in leaves else y


def _base_product(x: Array, leaves: Leaves, compute: Compute) -> Array:
    """Returns x W, where W may be quantised, or trained itself."""
    if "trained_kernel" not in leaves and is_quantized(leaves):
        return quantized_matmul(x, leaves, compute)
    return matmul(x, leaves.get("trained_kernel", leaves.get("kernel")), compute)


def _lora_product(x: Array, leaves: Leaves, compute: Compute) -> Array:
    """Returns s (x A) B; s scales B, the smallest factor, before B is rounded."""
    b = leaves["lora_B"] * leaves["lora_scaling"]
    return matmul(matmul(x, leaves["lora_A"], compute), b, compute)


def _initial_product(x: Array, leaves: Leaves, compute: Compute) -> Array | float:
    """Returns what the initial A and B add, if PiSSA or OLoRA subtracts it."""
    if "lora_A0" not in leaves:
        return 0.0
    initial = {"lora_A": leaves["lora_A0"], "lora_B": leaves["lora_B0"]}
    return _lora_product(x, {**leaves, **initial}, compute)


def scale_columns(y: Array, leaves: Leaves, *, save_output: bool) -> Array:
    """Returns y, with every column scaled to its magnitude if the layer has DoRA.

    The gradient of the magnitudes needs y, so remat "minimal" saves it then as well.
    """
    has_dora = "lora_magnitude" in leaves
    if save_output or has_dora:
        y = checkpoint_name(y, PRODUCT_NAME)
    return (_dora_gain(leaves) * y).astype(y.dtype) if has_dora else y


def _dora_gain(leaves: Leaves) -> Array:
    return leaves["lora_magnitude"] / column_norms(leaves)


def _dora_with_dropout(
    x: Array,
    y: Array,
    leaves: Leaves,
    compute: Compute,
    dropped: Array,
    *,
    save_output: bool,
) -> Array:
    """Returns x W + (gain - 1) drop(x) W + gain s (drop(x) A) B, given y = x W.

    As in PEFT, the first x is not dropped, so there are two products with W. With
    `save_output`, remat "minimal" saves the result; without it, drop(x) W, which the
    gradient of the magnitudes needs.
    """
    base = _base_product(dropped, leaves, compute)
    base = base - _initial_product(dropped, leaves, compute)
    if not save_output:
        base = checkpoint_name(base, PRODUCT_NAME)
    y = y - _initial_product(x, leaves, compute)
    gain = _dora_gain(leaves)
    y = y + (gain - 1) * base + gain * _lora_product(dropped, leaves, compute)
    y = y.astype(compute.dtype)
    return checkpoint_name(y, PRODUCT_NAME) if save_output else y


def column_norms(leaves: Leaves) -> Float[Array, " D_out"]:
    """Returns ||W + s A B|| of every column in float32, without a gradient.

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
    # Before the first step magnitude / norm must be exactly 1. Without the barrier XLA
    # computes it as magnitude * rsqrt(squared), which rounds differently.
    norms = jax.lax.optimization_barrier(jnp.sqrt(squared))
    return checkpoint_name(norms, NORM_NAME)


def _exact_product(a: Array, weight: Array) -> Array:
    """Returns a^T weight in float32, without a float32 copy of a bfloat16 weight.

    Three bfloat16 numbers hold a float32's 24 bits; their products are exact.
    """
    if weight.dtype != jnp.bfloat16:
        return matmul_float32(a.T, weight)
    parts, rest = [], a
    for _ in range(3):
        # Without the barrier XLA may skip the rounding.
        part = jax.lax.optimization_barrier(rest.astype(jnp.bfloat16))
        parts.append(part)
        rest = rest - part.astype(jnp.float32)
    stacked = jnp.concatenate(parts, axis=1)  # [in, 3 R]
    product = jnp.matmul(stacked.T, weight, preferred_element_type=jnp.float32)
    return product.reshape(3, a.shape[1], -1).sum(axis=0)
