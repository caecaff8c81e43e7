from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training_cases import Run

from jlora.config.optim_config import OptimConfig
from jlora.train import adam_8bit
from jlora.train.adam_8bit import (
    Rounded,
    code_values,
    moment_bytes,
    restored,
    rounded,
    scale_by_adam_8bit,
)

B1, B2, EPS, STEPS = 0.9, 0.999, 1e-8, 6


def reference_codes(is_signed: bool) -> list[float]:
    """The codes in words: 7 decades, of 2^0 to 2^6 means between equal parts of [0.1, 1]."""
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade * (1 if is_signed else 2)
        for part in range(count):
            low, high = (0.1 + 0.9 * (part + side) / count for side in (0, 1))
            value = 10.0 ** (decade - 6) * (low + high) / 2
            found += [value, -value] if is_signed else [value]
    return sorted(found)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_256_numbers_dense_near_zero(signed):
    values = code_values(signed=signed)
    assert len(values) == 256
    np.testing.assert_allclose(values, reference_codes(signed), rtol=1e-6)
    assert 0.0 in values


def nearest(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value at the nearest of its block's 256, one after the other."""
    found = np.zeros(array.size, np.float32)
    flat = array.reshape(-1)
    for start in range(0, array.size, 256):
        block = flat[start : start + 256]
        scale = np.abs(block).max()
        for i, x in enumerate(block):
            share = x / scale if scale else 0.0
            found[start + i] = values[np.abs(values - share).argmin()] * scale
    return found.reshape(array.shape)


@pytest.mark.parametrize("shape", [(3, 100), (256,), (2, 5, 77), (1,)])
@pytest.mark.parametrize("signed", [True, False])
def test_rounding_takes_the_nearest_value_of_each_block(shape, signed):
    rng = np.random.default_rng(0)
    array = (rng.normal(size=shape) * 10.0 ** rng.uniform(-9, 3, shape)).astype(
        np.float32
    )
    array = array if signed else np.abs(array)
    values = code_values(signed=signed)
    kept = rounded(jnp.asarray(array), values)
    assert (kept.codes.shape, kept.codes.dtype) == (shape, jnp.uint8)
    found = np.asarray(restored(kept, values))
    np.testing.assert_allclose(found, nearest(array, values), rtol=1e-6)


def test_nothing_is_kept_exactly():
    values = code_values(signed=True)
    kept = rounded(jnp.zeros((2, 300)), values)
    assert not np.asarray(restored(kept, values)).any()


def test_updates_equal_adam_with_moments_rounded_in_numpy():
    rng = np.random.default_rng(1)
    shapes = {"large": (64, 80), "small": (9,)}
    rule: Any = scale_by_adam_8bit(B1, B2, EPS)
    state = rule.init({n: jnp.zeros(shape) for n, shape in shapes.items()})
    tables = code_values(signed=True), code_values(signed=False)
    mean = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
    square = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
    update = jax.jit(rule.update)
    for step in range(1, STEPS + 1):
        drawn = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        moved, state = update(jax.tree.map(jnp.asarray, drawn), state)
        for n, gradient in drawn.items():
            m = B1 * mean[n] + (1 - B1) * gradient
            v = B2 * square[n] + (1 - B2) * gradient**2
            expected = m / (1 - B1**step) / (np.sqrt(v / (1 - B2**step)) + EPS)
            # A share between two codes may round either way, which moves a later step.
            share = np.isclose(moved[n], expected, rtol=1e-3, atol=1e-5).mean()
            assert share > 0.999, (n, step, share)
            is_large = n == "large"
            mean[n] = nearest(m, tables[0]) if is_large else m
            square[n] = nearest(v, tables[1]) if is_large else v
    assert isinstance(state.mu["large"], Rounded)
    assert state.mu["small"].dtype == jnp.float32


def test_small_arrays_are_updated_as_by_adam():
    rng = np.random.default_rng(2)
    rules: Any = scale_by_adam_8bit(B1, B2, EPS), optax.scale_by_adam(B1, B2, EPS)
    states = [rule.init({"a": jnp.zeros((4095,))}) for rule in rules]
    for _ in range(3):
        drawn = {"a": jnp.asarray(rng.normal(size=4095), jnp.float32)}
        found = [r.update(drawn, s) for r, s in zip(rules, states, strict=True)]
        states = [state for _, state in found]
        # 1 - b2^step is exact to 6e-5 in float32.
        np.testing.assert_allclose(found[0][0]["a"], found[1][0]["a"], rtol=1e-4)


def test_training_goes_as_with_adamw(monkeypatch):
    monkeypatch.setattr(adam_8bit, "SMALLEST", 1)
    losses = [
        [
            metrics["loss"]
            for metrics in Run(
                optim=OptimConfig(optimizer=name, learning_rate=1e-2, warmup_ratio=0)
            ).train(8)
        ]
        for name in ("adamw", "adamw_8bit")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


def test_a_moment_takes_a_quarter_of_the_memory():
    assert moment_bytes(4095) == 4 * 4095
    assert moment_bytes(4096) == 4096 + 4 * 16
    assert moment_bytes(1 << 20) / (4 << 20) == pytest.approx(0.2539, abs=1e-4)
