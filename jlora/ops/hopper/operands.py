"""What the matmul kernel multiplies: activations, weights and LoRA factors of projections.

A sum of products has an x and a weight for each term. The last term is the adapters'. With
`Mode.codes` the others are codes of 8 bits with scales, which the tensor cores can only
multiply if both operands have the summed axis last. Weights [in, out] are stored like this for
the backward pass; the forward pass transposes them, which takes 1 % of a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array

from jlora.ops.hopper import lora_factors, quantize_kernel
from jlora.ops.hopper.lora_factors import Adapters
from jlora.ops.quantize import kernel_of

Weights = Mapping[str, Array]
"""A projection's `kernel`, or the leaves of its quantised form."""


class Mode(NamedTuple):
    """How projections are computed: constants of the program."""

    rate: float
    """Of dropout."""
    codes: bool
    """Whether quantised weights are multiplied as they are stored."""


class Scales(NamedTuple):
    """What the sums of products of codes are multiplied by, before other terms are added."""

    rows: Array
    """float32 [M], of the rows of x."""
    columns: list[Array]
    """float32 [N] of the weights of every output, or none."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["xs", "weights", "scales"],
    meta_fields=["transposed"],
)
@dataclass(frozen=True)
class Operands:
    """Terms x @ w, or x @ w^T, that are summed to outputs [M, N].

    Attributes:
        xs: bfloat16 or codes [M, K].
        weights: for every output a w [K, N] for each x, [N, K] if transposed.
        scales: of the codes.
        transposed: whether products are with w^T.
    """

    xs: list[Array]
    weights: list[list[Array]]
    scales: Scales | None
    transposed: bool


def forward_operands(
    x: Array, s: Array | None, weights: list[Weights], adapters: Adapters, mode: Mode
) -> Operands:
    """Returns the terms of each projection's output: x W and, unless s = x A is None, s B."""
    xs, scales, dtype = [x], None, x.dtype
    if mode.codes:
        stored = [own["kernel_q"].T for own in weights]
        xs, rows = quantize_kernel.quantize_rows([x], stored[0].dtype)
        scales = Scales(rows, [own["kernel_scale"] for own in weights])
    else:
        stored = [kernel_of(own, dtype, has_fast_gather=True) for own in weights]
    groups = [[w] for w in stored]
    if s is not None:
        sizes = [w.shape[0 if mode.codes else 1] for w in stored]
        factors = lora_factors.aligned_b(adapters, sizes, dtype)
        for group, b in zip(groups, factors, strict=True):
            group.append(b.T if mode.codes else b)
        xs = [*xs, s]
    return Operands(xs, groups, scales, mode.codes)


def backward_operands(
    dys: list[Array],
    ds: Array | None,
    weights: list[Weights],
    adapters: Adapters,
    mode: Mode,
) -> Operands:
    """Returns the terms of the gradient of x: dy W^T of each projection, and ds A^T."""
    xs, scales, dtype = dys, None, dys[0].dtype
    if mode.codes:
        group = [own["kernel_q"] for own in weights]
        factors = [own["kernel_scale"] for own in weights]
        xs, rows = quantize_kernel.quantize_rows(dys, group[0].dtype, factors)
        scales = Scales(rows, [])
    else:
        group = [kernel_of(own, dtype, has_fast_gather=True) for own in weights]
    if ds is not None:
        xs, group = [*xs, ds], [*group, lora_factors.concatenated_a(adapters, dtype)]
    return Operands(xs, [group], scales, transposed=True)
