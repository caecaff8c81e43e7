from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference

from jlora.model.decoder_layer import RMSNorm

EPS, WIDTH = 1e-5, 16
SHAPE = (4, 4096, WIDTH)


def drawn(seed: int, shape: tuple[int, ...] = SHAPE, dtype: Any = jnp.bfloat16) -> Any:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def norm(x: Any, **leaves: Any) -> Any:
    frozen = {"scale": jnp.ones(WIDTH, jnp.bfloat16)}
    return RMSNorm(EPS).apply({"params": {**frozen, **leaves}}, x)


def residual_bytes(function: Any, *args: Any) -> int:
    """The bytes that the backward pass keeps of the forward pass."""
    saved = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))


def test_the_gradient_of_a_trained_scale_is_exact_over_many_tokens():
    x = drawn(0)
    d_out = x + drawn(1)  # so that the terms below do not cancel
    scale = drawn(2, (WIDTH,), jnp.float32)
    out, pull = jax.vjp(lambda s: norm(x, trained_scale=s), scale)
    np.testing.assert_array_equal(out, norm(x, scale=scale.astype(jnp.bfloat16)))
    normed = reference.rms_norm(np.asarray(x, np.float64), np.ones(WIDTH), EPS)
    exact = (np.asarray(d_out, np.float64) * normed).sum((0, 1))
    # What is left is that the normalised input is rounded to bfloat16.
    np.testing.assert_allclose(pull(d_out)[0], exact, rtol=1e-4)


def test_a_trained_scale_saves_one_bfloat16_array_for_the_backward_pass():
    x, scale = drawn(0), drawn(1, (WIDTH,), jnp.float32)

    def plain(x: Any) -> Any:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean + EPS)).astype(x.dtype)
        return normed * jnp.ones(WIDTH, x.dtype)

    frozen = residual_bytes(norm, x)
    assert frozen == pytest.approx(residual_bytes(plain, x), abs=4 * WIDTH)
    trained = residual_bytes(lambda x, s: norm(x, trained_scale=s), x, scale)
    assert trained - frozen <= x.nbytes + 4 * WIDTH
