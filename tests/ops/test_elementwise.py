from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops.elementwise import (
    gated,
    negative_log_likelihood,
    plus_trained,
    times_trained,
)


def drawn(shape, dtype, seed):
    return (4 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def assert_close(found, expected, bound):
    assert found.dtype == expected.dtype
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_gated_by_hand_is_what_autodiff_makes_of_it(dtype, bound):
    gate, up, d_out = (drawn((3, 5, 64), dtype, seed) for seed in range(3))
    ours, pull = jax.vjp(partial(gated, platform="cpu"), gate, up)
    expected, pull_plain = jax.vjp(partial(gated, platform="gpu"), gate, up)
    np.testing.assert_array_equal(ours, expected)
    for found, right in zip(pull(d_out), pull_plain(d_out), strict=True):
        assert_close(found, right, bound)


def test_gradients_of_gated_are_rounded_once():
    gate, up, d_out = (drawn((4096,), jnp.bfloat16, seed) for seed in range(3))
    g, u, d = (np.asarray(x, np.float64) for x in (gate, up, d_out))
    share = 1 / (1 + np.exp(-g))
    exact = d * u * share * (1 + g * (1 - share)), d * g * share
    pull = jax.vjp(partial(gated, platform="cpu"), gate, up)[1]
    for found, right in zip(pull(d_out), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(found, np.float64), right, rtol=2**-8, atol=1e-5
        )


@pytest.mark.parametrize("shift", [0, 1e4])
def test_likelihood_by_hand_is_what_autodiff_makes_of_it(shift):
    logits = drawn((2, 3, 40), jnp.float32, 0) + shift
    targets = jnp.array([[0, 39, 7], [7, 7, 20]])
    weights = jnp.array([[1, 0.5, 0], [2, 1, 1]])
    ours, pull = jax.vjp(lambda x: negative_log_likelihood(x, targets, "cpu"), logits)
    expected, pull_plain = jax.vjp(
        lambda x: negative_log_likelihood(x, targets, "gpu"), logits
    )
    # Logits near 1e4 are rounded to 1e-3.
    assert_close(ours, expected, 2e-3 if shift else 1e-5)
    assert_close(pull(weights)[0], pull_plain(weights)[0], 1e-5)
    assert np.all(np.asarray(pull(weights)[0])[0, 2] == 0)


def test_gradients_by_hand_can_be_differentiated_again():
    gate, up = (drawn((3, 40), jnp.float32, seed) for seed in range(2))
    targets = jnp.array([0, 39, 7])

    def gradient(gate, platform):
        def total(gate):
            act = gated(gate, up, platform)
            return (negative_log_likelihood(act, targets, platform) ** 2).sum()

        return jax.grad(total)(gate)

    def along(platform):
        return jax.jvp(lambda x: gradient(x, platform), (gate,), (up,))[1]

    found = along("cpu"), jax.grad(lambda x: (gradient(x, "cpu") * up).sum())(gate)
    scale = jnp.abs(expected := along("gpu")).max()
    for ours in found:
        assert_close(ours / scale, expected / scale, 1e-5)


TOKENS = 16_384


@pytest.mark.parametrize("operation", [times_trained, plus_trained])
def test_the_gradient_of_a_trained_vector_is_summed_in_float32(operation):
    vector = 1 + drawn((8,), jnp.float32, 0) / 8
    # All of one sign: a sum in bfloat16 stops growing where its terms are too small.
    x, d_out = (jnp.abs(drawn((4, TOKENS // 4, 8), jnp.bfloat16, i)) for i in (1, 2))
    out, pull = jax.vjp(operation, x, vector)
    plain = {times_trained: jnp.multiply, plus_trained: jnp.add}[operation]
    expected, plain_pull = jax.vjp(plain, x, vector.astype(jnp.bfloat16))
    np.testing.assert_array_equal(out, expected)
    d_x, d_vector = pull(d_out)
    np.testing.assert_array_equal(d_x, plain_pull(d_out)[0])
    exact = np.asarray(d_out, np.float64)
    if operation is times_trained:
        exact = exact * np.asarray(x, np.float64)
    exact = exact.sum((0, 1))
    assert d_vector.dtype == jnp.float32
    np.testing.assert_allclose(d_vector, exact, rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            np.asarray(plain_pull(d_out)[1], np.float64), exact, rtol=1e-3
        )
