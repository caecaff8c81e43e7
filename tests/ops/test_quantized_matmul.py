"""Products with quantised weights, of codes and of dequantised weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops.compute_choices import Compute
from jlora.ops.quantize import kernel_of, quantize_kernel
from jlora.ops.quantized_matmul import quantize_rows, quantized_matmul

CODES = Compute(code_products=("fp8", "int8"))


def stored(name: Any, rows: int = 192, columns: int = 40) -> dict[str, jax.Array]:
    kernel = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    return jax.tree.map(jnp.asarray, quantize_kernel(kernel, name))


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def test_what_stays_for_the_backward_pass_is_the_stored_form():
    leaves = stored("nf4")
    x = jnp.ones((3, 192))
    _, backward = jax.vjp(lambda x: quantized_matmul(x, leaves, Compute()), x)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert leaves["kernel_q"].shape in kept
    assert (192, 40) not in kept


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_products_of_codes_are_those_of_rounded_activations(name: str) -> None:
    """Forward and backward, against NumPy in float64."""
    leaves, x, dy = stored(name), normal(2, 7, 192), normal(2, 7, 40) ** 3
    y, pull = jax.vjp(lambda x: quantized_matmul(x, leaves, CODES), x)
    (dx,) = pull(dy)

    w = np.asarray(kernel_of(leaves, jnp.float32), np.float64)
    expected = rounded(x, name) @ w
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    scale = np.asarray(leaves["kernel_scale"], np.float64)
    expected = rounded(dy * leaves["kernel_scale"], name) @ (w / scale).T
    np.testing.assert_allclose(dx, expected, atol=1e-5 * np.abs(expected).max())


def rounded(x: jax.Array, name: str) -> np.ndarray:
    """Returns x with every value the nearest that a token's scale allows."""
    wide = np.asarray(x, np.float64)
    peak = np.abs(wide).max(axis=-1, keepdims=True)
    if name == "int8":
        return np.rint(wide / peak * 127) * peak / 127
    codes = np.asarray(wide / peak * 448, jnp.float8_e4m3fn)
    return codes.astype(np.float64) * peak / 448


@pytest.mark.parametrize(("name", "allowed"), [("fp8", 0.04), ("int8", 0.015)])
def test_rounding_activations_changes_products_little(name: Any, allowed: float):
    leaves, x, dy = stored(name, 1024, 512), normal(64, 1024), normal(64, 512)

    def both(compute: Compute) -> list[np.ndarray]:
        y, pull = jax.vjp(lambda x: quantized_matmul(x, leaves, compute), x)
        return [np.asarray(y), *map(np.asarray, pull(dy))]

    for found, exact in zip(both(CODES), both(Compute()), strict=True):
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert 0 < error < allowed


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_rows_of_zeros_and_of_no_numbers(name: str) -> None:
    x = normal(4, 192).at[0].set(0).at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf)
    y = quantized_matmul(x, stored(name), CODES)
    assert np.all(np.asarray(y[0]) == 0)
    assert not np.isfinite(np.asarray(y[1:3])).any()
    assert np.isfinite(np.asarray(y[3])).all()


def test_arrays_that_are_summed_have_the_same_scale() -> None:
    small, large = normal(5, 8), 100 * normal(5, 16)
    (a, b), scale = quantize_rows([small, large], jnp.float8_e4m3fn)
    np.testing.assert_allclose(scale, jnp.abs(large).max(axis=1) / 448, rtol=1e-6)
    wide = a.astype(jnp.float32) * scale[:, None]
    np.testing.assert_allclose(wide, small, rtol=2**-4, atol=float(scale.max()) / 2**10)
    assert np.abs(np.asarray(b, np.float32)).max(axis=1).tolist() == [448] * 5
