"""Each kernel, run by Pallas' simulation of a GPU, against plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import plain_kernels as plain

from jlora.ops.dropout import seeds
from jlora.ops.hopper import (
    dropout_kernels,
    matmul_kernel,
    product_kernels,
    quantize_kernel,
    swiglu_kernel,
)
from jlora.ops.hopper.operands import Operands, Scales
from jlora.ops.quantize import CODES
from jlora.ops.quantized_matmul import quantize_rows

needs_jax_011 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot simulate the kernel"
)


def random_arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def simulated(kernel: Any, *arguments: Any, **options: Any) -> Any:
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    try:
        return kernel(*arguments, **options, interpret=params.InterpretGPUParams())
    except NotImplementedError:
        if jax.__version_info__ >= (0, 11):
            raise
        pytest.skip("this jax does not simulate blocks that share a tile; 0.11 does")


def assert_close(found: Any, expected: Any, name: str = "") -> None:
    a, b = (np.asarray(x, np.float32) for x in (found, expected))
    # A few gradients are rounded the other way, by one step.
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b), name


@pytest.mark.parametrize("transposed", [False, True])
def test_simulated_sum_of_products_equals_products_in_float32(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    monkeypatch.setattr(matmul_kernel, "multiprocessors", lambda: 2)
    x, s, w, b = random_arrays((256, 256), (256, 64), (256, 256), (64, 256))
    group = [w.T, b.T] if transposed else [w, b]
    operands = Operands([x, s], [group], None, transposed)
    (found,) = simulated(product_kernels.sum_of_products, operands, 2 * w)
    x, s, w, b = (y.astype(jnp.float32) for y in (x, s, w, b))
    # One rounding to bfloat16.
    np.testing.assert_allclose(found, x @ w + s @ b + 2 * w, rtol=2**-8, atol=1e-3)


def test_simulated_swiglu_gradients_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul_kernel, "multiprocessors", lambda: 2)
    shapes = (512, 128), (512, 64), (512, 128), (512, 64), (512, 512), (512, 512)
    dy, ds, w, a, gate, up = random_arrays(*shapes)
    # Four tiles for one pair of blocks.
    arguments = Operands([dy, ds], [[w, a]], None, transposed=True), gate, up
    found = simulated(product_kernels.swiglu_gradients, *arguments)
    for a, b in zip(found, plain.swiglu_gradients(*arguments), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("stored", ["fp8", "int8"])
def test_simulated_products_of_codes_equal_products_in_float32(
    monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    monkeypatch.setattr(matmul_kernel, "multiprocessors", lambda: 2)
    x, s, w, v, b, c = random_arrays(
        (256, 256), (256, 64), (256, 256), (256, 256), (256, 64), (256, 64)
    )
    (x, w, v), rows = quantize_rows([x, w, v], CODES[stored])
    columns = [1 + jnp.arange(256) / 256, 2 - jnp.arange(256) / 256]
    operands = Operands([x, s], [[w, b], [v, c]], Scales(rows, columns), True)
    found = simulated(product_kernels.sum_of_products, operands)
    found += simulated(product_kernels.swiglu_forward, operands)
    one = Operands([x, s], [[w, b]], Scales(rows, []), True)
    found += simulated(product_kernels.sum_of_products, one, jnp.tile(s, 4))
    operands, one, s = jax.tree.map(
        lambda y: y.astype(jnp.float32) if y.dtype == jnp.bfloat16 else y,
        (operands, one, s),
    )
    expected = [
        *plain.sum_of_products(operands),
        *plain.swiglu_forward(operands),
        *plain.sum_of_products(one, jnp.tile(s, 4)),
    ]
    for a, b in zip(found, expected, strict=True):
        # One rounding to bfloat16, and of gate and up before they are multiplied.
        assert np.linalg.norm(a - b) < 0.004 * np.linalg.norm(b)


@needs_jax_011
@pytest.mark.parametrize("stored", ["fp8", "int8"])
@pytest.mark.parametrize("scaled", [False, True])
def test_simulated_codes_of_rows_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, stored: str, scaled: bool
) -> None:
    monkeypatch.setattr(quantize_kernel, "multiprocessors", lambda: 1)
    arrays = random_arrays((20, 256), (20, 512))
    arrays[0] = arrays[0].at[3].set(0)
    arrays[1] = arrays[1].at[3].set(0).at[5, 7].set(jnp.inf)
    factors = [1 + jnp.arange(x.shape[1]) / 64 for x in arrays] if scaled else []
    arguments = arrays, CODES[stored], factors
    codes, scale = simulated(quantize_kernel.quantize_rows, *arguments)
    expected_codes, expected_scale = plain.quantize_rows(*arguments)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    for a, b in zip(codes, expected_codes, strict=True):
        finite = np.arange(20) != 5
        found, expected = (np.asarray(x, np.float32)[finite] for x in (a, b))
        np.testing.assert_array_equal(found, expected)


@needs_jax_011
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_simulated_swiglu_and_lora_gradients_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, width: int, rate: float
) -> None:
    monkeypatch.setattr(swiglu_kernel, "multiprocessors", lambda: 4)
    rows, columns = 192, 512  # two bands of columns, two ranges of rows of unequal size
    gate, up, d_act, *factors, a = random_arrays(
        *[(rows, columns)] * 3,
        *[(rows, width)] * 3,
        *[(width, columns)] * 2,
        (columns, width),
    )
    seed = seeds(jax.random.split(jax.random.key(0), 9)[0])
    dropout = swiglu_kernel.DownDropout(a, seed) if rate else None
    arguments = gate, up, d_act, factors[:3], factors[3:], dropout
    kernel = swiglu_kernel.swiglu_and_lora_gradients
    found = simulated(kernel, *arguments, rate=rate)
    expected = plain.swiglu_and_lora_gradients(*arguments, rate=rate)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert_close(a, b, name)


@needs_jax_011
@pytest.mark.parametrize(("masks", "rank"), [(2, 16), (3, 32)])
def test_simulated_dropout_kernels_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, masks: int, rank: int
) -> None:
    monkeypatch.setattr(dropout_kernels, "multiprocessors", lambda: 4)
    keys = jax.random.split(jax.random.key(0), 8)
    width = 64 if masks * rank < 64 else 128
    shapes = [(512, 128), (512, width), *[(128, rank)] * masks]
    x, ds, *factors = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=False)
    )
    rest = factors, [seeds(key) for key in keys[-masks:]]
    s = simulated(dropout_kernels.dropped_x_times_a, x, *rest, rate=0.3, width=width)
    through_a, sums = simulated(
        dropout_kernels.dropped_x_times_a_gradients, x, ds, *rest, rate=0.3
    )

    x, ds, rest = jax.tree.map(
        lambda y: y.astype(jnp.float32) if y.dtype == jnp.bfloat16 else y, (x, ds, rest)
    )
    expected = plain.dropped_x_times_a(x, *rest, rate=0.3, width=width)
    expected_through_a, expected_sums = plain.dropped_x_times_a_gradients(
        x, ds, *rest, rate=0.3
    )
    for found, wanted in ((s, expected), (through_a, expected_through_a)):
        # One rounding to bfloat16.
        np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-3)
    for found, wanted in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)
