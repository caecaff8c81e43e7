"""Layers that share an input or follow each other, in fused kernels where possible.

The model calls `project_all`, `add_projection` and `add_swiglu`. The kernels for Hopper GPUs
compute a call if the run has them, and if `_fused_call` finds that they support it; or else
plain XLA does, layer by layer. A run has them by its devices (`jlora.ops.compute_choices`),
its weights (`can_fuse_any`) and its adapters: not several (`jlora.train.sweep_file`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from jlora.lora.adapter_tree import HEAD, Params, modules
from jlora.lora.lora_dense import Leaves, LoRADense, scale_columns
from jlora.ops.elementwise import gated
from jlora.ops.hopper import fused_projections as fused
from jlora.ops.hopper import matmul_kernel
from jlora.ops.hopper.lora_factors import Dropout
from jlora.ops.quantized_matmul import multiplies_codes
from jlora.parallel.own_program import into_split, out_of_split, splits_layers

_DORA_LEAVES = ("lora_magnitude", "lora_norm_squared")


class _FusedCall(NamedTuple):
    """Arguments of the fused kernels."""

    x: Array
    leaves: Sequence[Leaves]
    """Of every layer, without DoRA's: its scaling comes after the kernels."""
    dropout: Dropout | None
    codes: bool
    """Whether the weights are multiplied as they are stored."""


def project_all(
    x: Float[Array, "B T D"], layers: Sequence[LoRADense]
) -> list[Float[Array, "B T _"]]:
    """Returns every layer's output for the same input."""
    call = _fused_call(x, layers)
    if call is None:
        return [layer(x) for layer in layers]
    products = fused.fused_linear(
        call.x, call.leaves, dropout=call.dropout, codes=call.codes
    )
    return [
        scale_columns(y, layer.variables["params"], save_output=layer.save_output)
        for y, layer in zip(products, layers, strict=True)
    ]


def add_projection(
    residual: Float[Array, "B T D_out"], x: Float[Array, "B T D_in"], layer: LoRADense
) -> Float[Array, "B T D_out"]:
    """Returns residual + layer(x), of a layer that a tensor axis may split by its inputs."""
    if splits_layers():
        return residual + out_of_split(project_all(x, [layer])[0])
    call = _fused_call(x, [layer], adds=True)
    if call is None:
        return residual + project_all(x, [layer])[0]
    (out,) = fused.fused_linear(
        call.x, call.leaves, residual, call.dropout, codes=call.codes
    )
    return out


def add_swiglu(
    residual: Float[Array, "B T D"],
    x: Float[Array, "B T D"],
    gate: LoRADense,
    up: LoRADense,
    down: LoRADense,
) -> Float[Array, "B T D"]:
    """Returns residual + down(silu(gate(x)) * up(x)), which a tensor axis may split."""
    x = into_split(x)
    call = _fused_call(x, [gate, up, down], adds=True)
    if call is not None and splits_layers():
        made = fused.fused_mlp(
            call.x, call.leaves, None, call.dropout, codes=call.codes
        )
        return residual + out_of_split(made)
    if call is not None:
        return fused.fused_mlp(
            call.x, call.leaves, residual, call.dropout, codes=call.codes
        )
    gate_out, up_out = (
        nn.with_logical_constraint(y, ("batch", "length", "act_mlp"))
        for y in project_all(x, [gate, up])
    )
    act = gated(gate_out, up_out, gate.compute.platform)
    return add_projection(residual, act, down)


def can_fuse_any(params: Params, dtype: Any) -> bool:
    """Returns whether the kernels support some projection of a model (or of its shapes).

    They do if the number of tokens suits them, too; see `can_fuse_tokens`.
    """
    return any(
        fused.takes_weights(_without_dora(leaves), dtype)
        for name, leaves in modules(params).items()
        if name != HEAD
    )


def can_fuse_tokens(tokens: int) -> bool:
    """Returns whether the kernels support so many tokens, of all rows of a device together."""
    return tokens % matmul_kernel.ROWS == 0


def suitable_length(rows: int, length: int) -> int:
    """Returns the least length, not below `length`, of rows whose tokens the kernels take."""
    step = matmul_kernel.ROWS // math.gcd(rows, matmul_kernel.ROWS)
    return -(-length // step) * step


def _without_dora(leaves: Leaves) -> Leaves:
    return {k: leaf for k, leaf in leaves.items() if k not in _DORA_LEAVES}


def _fused_call(
    x: Array, layers: Sequence[LoRADense], *, adds: bool = False
) -> _FusedCall | None:
    """Returns how to call the kernels, or None if they do not support these layers.

    Args:
        x: the input.
        layers: of one block of the model, so they share `compute` and the dropout rate.
        adds: whether the kernels use the products at once, for SwiGLU or a sum. DoRA, which
            scales them afterwards, is not possible then.
    """
    compute, rate = layers[0].compute, layers[0].dropout
    if compute.kernels != "hopper" or layers[0].is_initializing():
        return None
    drops = layers[0].has_dropout() and (isinstance(rate, Array) or rate > 0)
    has_dora = any(layer.has_variable("params", "lora_magnitude") for layer in layers)
    # The kernels need the rate as a constant, and DoRA drops another product as well.
    if (has_dora and (adds or drops)) or (drops and isinstance(rate, Array)):
        return None
    leaves = [_without_dora(layer.variables["params"]) for layer in layers]
    x = x.astype(compute.dtype)
    if not fused.can_fuse(x, leaves, drops=drops):
        return None
    seeds = [layer.dropout_seeds(x) for layer in layers] if drops else []
    codes = all(multiplies_codes(own, compute) for own in leaves)
    dropout = Dropout(float(rate), seeds) if drops else None
    return _FusedCall(x, leaves, dropout, codes)
