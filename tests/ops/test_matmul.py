import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import equations

from jlora.ops.compute_choices import Compute
from jlora.ops.matmul import matmul


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 3, 64), (64, 16), (2, 3, 16))
    return [
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def rounded(*products):
    return [np.asarray(jnp.asarray(y, jnp.bfloat16), np.float32) for y in products]


def test_bfloat16_product_and_gradients_are_rounded_once():
    x, w, dy = operands(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: matmul(x, w, Compute("cpu", jnp.bfloat16)), x, w)
    wide_x, wide_w, wide_dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    expected = rounded(
        wide_x @ wide_w,
        wide_dy @ wide_w.T,
        np.einsum("btd,btn->dn", wide_x, wide_dy),
    )
    for found, right in zip((y, *pull(dy)), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        # One unit in the last place: float32 sums may round the other way at a tie.
        np.testing.assert_allclose(np.asarray(found, np.float32), right, rtol=2**-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_product_on_a_cpu_has_a_float32_sum_of_like_operands(dtype):
    x, w, dy = operands(dtype)

    def both(x, w, dy):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, Compute("cpu", dtype)), x, w)
        return y, pull(dy)

    jaxpr = jax.make_jaxpr(both)(x, w, dy).jaxpr
    found = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(found) == 3
    for eqn in found:
        assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(dtype)}
        assert eqn.outvars[0].aval.dtype == jnp.float32
