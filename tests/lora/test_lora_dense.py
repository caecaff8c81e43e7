from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import GOLDEN
from helpers.training_cases import adapted_params, llama_config, random_tokens

from jlora import LoRADense
from jlora.lora.adapter_tree import module_at
from jlora.lora.initialisation import norm_squared
from jlora.lora.lora_dense import column_norms, linear
from jlora.model.llama import Llama
from jlora.ops.compute_choices import Compute

DROPOUT_RNG = {"dropout": jax.random.key(5)}


def random_input(shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_scaling_multiplies_the_update():
    x = random_input((3, 6))
    leaves = {
        name: jnp.asarray(random_input(shape))
        for name, shape in (("kernel", (6, 5)), ("lora_A", (6, 2)), ("lora_B", (2, 5)))
    }
    layer = LoRADense(5)

    def output(scaling):
        params = {**leaves, "lora_scaling": np.float32(scaling)}
        return np.asarray(layer.apply({"params": params}, jnp.asarray(x)))

    update = x @ leaves["lora_A"] @ leaves["lora_B"]
    np.testing.assert_allclose(output(1.5) - output(0), 1.5 * update, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_with_a_known_dropout_mask_equals_peft(kind):
    with np.load(GOLDEN / "_layers" / "dropout.npz") as file:
        expected = dict(file)
    pair = {leaf: expected[f"{kind}/{leaf}"].T for leaf in ("lora_A", "lora_B")}
    if kind == "dora":
        pair["lora_magnitude"] = expected["dora/magnitude"]
    kernel = jnp.asarray(expected["weight"].T)
    frozen = {
        "kernel": kernel,
        "lora_scaling": jnp.float32(expected["scaling"]),
        "lora_norm_squared": norm_squared(kernel),
    }

    def output(x, pair, mask=None):
        dropped = None if mask is None else x * mask
        return linear(x, {**frozen, **pair}, Compute(), dropped=dropped)

    x = jnp.asarray(expected["x"])
    pair = jax.tree.map(jnp.asarray, pair)
    np.testing.assert_allclose(output(x, pair), expected[f"{kind}/y_eval"], atol=1e-5)
    y, pull = jax.vjp(lambda x, pair: output(x, pair, expected["mask"]), x, pair)
    np.testing.assert_allclose(y, expected[f"{kind}/y_train"], atol=1e-5)
    d_x, d_pair = pull(jnp.asarray(expected["upstream"]))
    np.testing.assert_allclose(d_x, expected[f"{kind}/grad/x"], atol=1e-4)
    for leaf, gradient in d_pair.items():
        key = f"{kind}/grad/{leaf}".replace("lora_magnitude", "magnitude")
        np.testing.assert_allclose(gradient.T, expected[key], atol=1e-4)


def identity_layer(dropout, *, features=64):
    """A layer with a zero kernel, whose adapter returns its input."""
    eye = jnp.eye(features)
    leaves = {"kernel": 0 * eye, "lora_A": eye, "lora_B": eye}
    params = {**leaves, "lora_scaling": jnp.float32(1)}
    layer = LoRADense(features, dropout=dropout)

    def apply(x, kernel=None, rngs=None):
        changed = params if kernel is None else {**params, "kernel": kernel}
        y = layer.apply({"params": changed}, jnp.asarray(x), rngs=rngs)
        return np.asarray(y)

    return apply


def test_dropout_zeroes_or_scales_up_each_input_of_a():
    x = random_input((32, 64))
    dropped = identity_layer(0.25)(x, rngs=DROPOUT_RNG)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], (x / 0.75)[kept], rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=0.04)


def test_dropout_leaves_the_base_path_alone():
    x, kernel = random_input((32, 64)), jnp.asarray(random_input((64, 64)))
    layer = identity_layer(0.5)
    with_base = layer(x, kernel, rngs=DROPOUT_RNG)
    difference = with_base - layer(x, rngs=DROPOUT_RNG)
    np.testing.assert_allclose(difference, x @ kernel, atol=1e-4)


def test_dropout_preserves_the_mean():
    ones = np.ones((512, 64), np.float32)
    dropped = identity_layer(0.4)(ones, rngs=DROPOUT_RNG)
    # 32768 draws of deviation 0.82: the standard error is 0.0045.
    assert dropped.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("dropout", "rngs"), [(0.5, None), (0.0, DROPOUT_RNG)])
def test_without_rng_or_rate_there_is_no_dropout(dropout, rngs):
    x = random_input((4, 64))
    np.testing.assert_array_equal(identity_layer(dropout)(x, rngs=rngs), x)


def projections(dropout):
    """Outputs of k_proj and v_proj, which share input and, here, all weights."""
    config = llama_config()
    params = adapted_params(config)
    same = module_at(params, "model.layers.0.self_attn.k_proj")
    for i in "01":
        params["layers"][i]["self_attn"] |= {"k_proj": same, "v_proj": same}
    model = Llama(config, lora_dropout=dropout)
    _, captured = model.apply(
        {"params": params},
        random_tokens(2, 8),
        rngs=DROPOUT_RNG,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    layer: Any = captured["intermediates"]["layers"]["0"]["self_attn"]  # type: ignore[index]
    return [np.asarray(layer[f"{p}_proj"]["__call__"][0]) for p in "kv"]


def test_modules_that_share_an_input_have_masks_of_their_own():
    k, v = projections(dropout=0.5)
    assert np.mean(k == v) < 0.1


def test_the_same_modules_agree_without_dropout():
    k, v = projections(dropout=0.0)
    np.testing.assert_array_equal(k, v)


def norm_case(dtype, from_kernel=False):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    leaves = {
        "kernel": draw(48, 40).astype(dtype),
        "lora_A": draw(48, 3),
        "lora_B": draw(3, 40),
        "lora_scaling": jnp.float32(0.7),
    }
    if from_kernel:
        leaves |= {"lora_A0": draw(48, 3), "lora_B0": draw(3, 40)}
    return leaves | {"lora_norm_squared": norm_squared(leaves["kernel"])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("from_kernel", [False, True])
def test_column_norms_are_those_of_kernel_and_update(dtype, from_kernel):
    leaves = norm_case(dtype, from_kernel)
    wide = {k: np.asarray(v, np.float64) for k, v in leaves.items()}
    total = wide["kernel"] + 0.7 * wide["lora_A"] @ wide["lora_B"]
    if from_kernel:
        total -= 0.7 * wide["lora_A0"] @ wide["lora_B0"]
    expected = np.linalg.norm(total, axis=0)
    np.testing.assert_allclose(column_norms(leaves), expected, rtol=2e-6)


def test_column_norms_make_no_matrix_of_the_kernels_shape():
    leaves = norm_case(jnp.bfloat16)
    text = str(jax.make_jaxpr(column_norms)(leaves))
    assert "bf16[48,40]" in text  # the kernel itself
    assert "f32[48,40]" not in text


def test_no_gradient_flows_through_column_norms():
    leaves = norm_case(jnp.float32)
    gradient = jax.grad(lambda a: column_norms({**leaves, "lora_A": a}).sum())(
        leaves["lora_A"]
    )
    assert not gradient.any()


def test_the_gradient_of_a_trained_bias_is_exact_over_many_tokens():
    x, kernel = (jnp.asarray(random_input(shape)) for shape in ((16_384, 8), (8, 5)))
    d_out = jnp.abs(jnp.asarray(random_input((16_384, 5)))).astype(jnp.bfloat16)
    compute = Compute(dtype=jnp.dtype("bfloat16"))

    def output(bias, name="trained_bias"):
        return linear(x, {"kernel": kernel, name: bias}, compute)

    bias = jnp.asarray(random_input(5))
    out, pull = jax.vjp(output, bias)
    np.testing.assert_array_equal(out, output(bias, "bias"))
    exact = np.asarray(d_out, np.float64).sum(0)
    np.testing.assert_allclose(pull(d_out)[0], exact, rtol=1e-5)
