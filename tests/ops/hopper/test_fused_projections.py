"""The algebra of fused projections and their gradients, in float32 without the kernels."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.lora.lora_dense import linear
from jlora.ops.compute_choices import Compute
from jlora.ops.dropout import drop, seeds
from jlora.ops.hopper.fused_projections import Leaves, fused_linear, fused_mlp
from jlora.ops.hopper.lora_factors import Dropout
from jlora.ops.quantize import quantize_kernel

Sizes = tuple[tuple[int, int], ...]
D, F, K = 24, 40, 12
MLP_SIZES = ((D, F), (D, F), (F, D))
RATE = 0.4
KEYS = [jax.random.key(i) for i in (5, 6, 7)]
DROPOUT = Dropout(RATE, [seeds(key) for key in KEYS])


def random_layers(sizes: Sizes, ranks: Any) -> list[dict[str, Any]]:
    return [
        random_leaves(i, *size, rank)
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
    ]


def random_leaves(key: int, size_in: int, size_out: int, rank: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(key), 3)
    drawn = {"kernel": size_in**-0.5 * jax.random.normal(keys[0], (size_in, size_out))}
    if rank:
        drawn["lora_A"] = size_in**-0.5 * jax.random.normal(keys[1], (size_in, rank))
        drawn["lora_B"] = rank**-0.5 * jax.random.normal(keys[2], (rank, size_out))
        drawn["lora_scaling"] = jnp.float32(1.5)
    return drawn


def random_input(scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(9), (2, 5, D))


def plain_linear(x: jax.Array, layer: Leaves, key: Any = None) -> jax.Array:
    """One projection, with dropout if a key is given."""
    y = x @ layer["kernel"]
    if "lora_A" in layer:
        x = x if key is None else drop(x, key, RATE)
        y += x @ layer["lora_A"] @ layer["lora_B"] * layer["lora_scaling"]
    return y


def plain_mlp(x: jax.Array, layers: Any, keys: Any = (None,) * 3) -> list[jax.Array]:
    gate, up = (plain_linear(x, layers[i], keys[i]) for i in (0, 1))
    return [2 * x + plain_linear(jax.nn.silu(gate) * up, layers[2], keys[2])]


def gradients(function: Any, x: jax.Array, layers: list[dict[str, Any]]) -> Any:
    adapters = [
        {k: v for k, v in layer.items() if k in ("lora_A", "lora_B")}
        for layer in layers
    ]

    def total(x: jax.Array, adapters: Any) -> jax.Array:
        joined = [{**layer, **own} for layer, own in zip(layers, adapters, strict=True)]
        outs = function(x, joined)
        return sum(jnp.sum(jnp.sin(y)) for y in outs)  # type: ignore[return-value]

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, adapters)


def assert_close(found: Any, expected: Any) -> None:
    def check(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums

    jax.tree.map(check, found, expected)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(
    ("ranks", "dropout", "keys"),
    [
        ((2, 0, 4), None, [None] * 3),
        ((0, 0, 0), None, [None] * 3),
        ((70, 1, 1), None, [None] * 3),
        ((20, 0, 1), DROPOUT, KEYS),
    ],
)
def test_fused_projections_equal_single_ones(ranks, dropout, keys) -> None:
    def single(x: jax.Array, layers: Any) -> list[jax.Array]:
        return [plain_linear(x, *pair) for pair in zip(layers, keys, strict=True)]

    x, layers = random_input(), random_layers(((D, D), (D, K), (D, K)), ranks)
    found = gradients(lambda x, ls: fused_linear(x, ls, dropout=dropout), x, layers)
    assert_close(found, gradients(single, x, layers))


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("ranks", [(2, 3, 4), (0, 8, 0), (0, 0, 0), (3, 0, 40)])
def test_fused_mlp_equals_the_plain_one(ranks) -> None:
    x, layers = random_input(0.3), random_layers(MLP_SIZES, ranks)
    found = gradients(lambda x, ls: [fused_mlp(x, ls, 2 * x)], x, layers)
    assert_close(found, gradients(plain_mlp, x, layers))


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("ranks", [(2, 0, 4), (20, 3, 1), (0, 5, 0), (0, 0, 0)])
def test_fused_mlp_with_dropout_equals_the_plain_one(ranks) -> None:
    x, layers = random_input(0.3), random_layers(MLP_SIZES, ranks)
    found = gradients(lambda x, ls: [fused_mlp(x, ls, 2 * x, DROPOUT)], x, layers)
    assert_close(found, gradients(lambda x, ls: plain_mlp(x, ls, KEYS), x, layers))


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("ranks", [(2, 3, 4), (0, 0, 0), (0, 8, 0)])
def test_fused_products_of_codes_are_those_of_single_layers(name: Any, ranks) -> None:
    """But for arrays that are summed having one scale, which rounds them otherwise."""

    def single(x: jax.Array, layer: Any) -> jax.Array:
        without = {k: v for k, v in layer.items() if k != "kernel"}
        return linear(x, without, Compute(code_products=("fp8", "int8")))

    def single_mlp(x: jax.Array, layers: Any) -> list[jax.Array]:
        gate, up = single(x, layers[0]), single(x, layers[1])
        return [2 * x + single(jax.nn.silu(gate) * up, layers[2])]

    x, layers = random_input(0.3), random_layers(MLP_SIZES, ranks)
    for layer in layers:
        stored = quantize_kernel(np.asarray(layer.pop("kernel")), name)
        layer |= jax.tree.map(jnp.asarray, stored)
    found = gradients(lambda x, ls: [fused_mlp(x, ls, 2 * x, codes=True)], x, layers)
    assert_nearly_close(found, gradients(single_mlp, x, layers))
    # Only gate and up are of one input.
    found = gradients(lambda x, ls: fused_linear(x, ls, codes=True), x, layers[:2])
    expected = gradients(lambda x, ls: [single(x, own) for own in ls], x, layers[:2])
    assert_close(found[0], expected[0])
    assert_close(found[1][1], expected[1][1])
    assert_nearly_close(found, expected)


def assert_nearly_close(found: Any, expected: Any) -> None:
    def check(a: jax.Array, b: jax.Array) -> None:
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)

    jax.tree.map(check, found, expected)


@pytest.mark.usefixtures("plain_kernels")
def test_gradients_of_fused_adapters_are_float32() -> None:
    layer = random_leaves(0, D, D, 2)
    layer["kernel"] = layer["kernel"].astype(jnp.bfloat16)
    x = jnp.ones((1, 4, D), jnp.bfloat16)
    _, (_, (found,)) = gradients(fused_linear, x, [layer])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_importing_the_kernels_does_not_import_mosaic_gpu() -> None:
    code = (
        "import sys; import jlora.model.llama, jlora.ops.hopper.fused_projections; "
        "sys.exit('jax.experimental.pallas.mosaic_gpu' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
