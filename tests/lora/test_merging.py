from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.adapter_methods import METHODS, trained_adapter
from helpers.training_cases import (
    adapted_params,
    llama_config,
    logits_of,
    random_params,
    random_tokens,
    shapes,
)

from jlora import LoraConfig, add_lora, merge
from jlora.errors import CorruptError
from jlora.lora.adapter_tree import module_at
from jlora.lora.merging import merge_module
from jlora.model.llama import Llama

Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_merged_weights_give_the_logits_of_base_and_adapter(changes):
    config, tokens = llama_config(**changes), random_tokens(2, 8)
    model, params = Llama(config), adapted_params(config)
    merged = logits_of(model, merge(params), tokens)
    expected = logits_of(model, params, tokens)
    base = logits_of(model, random_params(config), tokens)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_adapter_of_every_method_gives_the_same_logits(method):
    config, params, _ = trained_adapter(method)
    tokens = random_tokens(2, 8)
    model = Llama(config)
    expected = logits_of(model, params, tokens)
    merged = logits_of(model, merge(params), tokens)
    np.testing.assert_allclose(merged, expected, atol=2e-5)
    assert (
        np.abs(expected - logits_of(model, random_params(config), tokens)).max() > 0.1
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_restores_the_structure_of_the_base(dtype):
    config = llama_config()
    merged = merge(adapted_params(config, dtype=dtype))
    described = jax.tree.map(lambda x: (x.shape, x.dtype), merged)
    assert described == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes(config, dtype)
    )


def test_merge_of_an_untrained_adapter_gives_the_base():
    base = random_params(llama_config(), dtype=jnp.bfloat16)
    adapted = add_lora(base, LoraConfig(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, merge(adapted), base)


def test_merge_keeps_what_has_no_adapter():
    params = adapted_params(llama_config(), LoraConfig(target_modules=["v_proj"]))
    merged = merge(params)
    assert module_at(merged, Q0)["kernel"] is module_at(params, Q0)["kernel"]


def test_merge_refuses_weights_that_are_not_finite():
    params = adapted_params(llama_config())
    pair = module_at(params, Q1)
    pair["lora_A"] = pair["lora_A"].at[0, 0].set(jnp.inf)
    with pytest.raises(CorruptError, match=r"layers/1/self_attn/q_proj.*not finite"):
        merge(params)


def merge_case(dtype=np.float32):
    """Kernel, A and B on grids where every sum of the product is exact."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((40, 30)).astype(dtype)
    a = rng.integers(-64, 64, (40, 4)).astype(np.float32) / 32
    b = rng.integers(-64, 64, (4, 30)).astype(np.float32) / 32
    product = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_array_equal(product, product.astype(np.float32))
    return kernel, a, b, product


def merged_kernel(kernel, a, b, scaling=0.7):
    pair = {"lora_A": a, "lora_B": b, "lora_scaling": np.float32(scaling)}
    return merge_module({"kernel": kernel, **pair})["kernel"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge_module_rounds_scale_and_sum_apart(dtype):
    kernel, a, b, product = merge_case(dtype)
    scaling: Any = np.float32(0.7)
    expected = np.empty_like(kernel)
    for i, j in np.ndindex(kernel.shape):
        update = np.float32(product[i, j] * np.float64(scaling))
        total = np.float32(np.float64(kernel[i, j]) + np.float64(update))
        expected[i, j] = total.astype(dtype)
    merged = merged_kernel(kernel, a, b, scaling)
    assert merged.dtype == dtype
    np.testing.assert_array_equal(merged, expected)


def test_merge_module_differs_from_a_fused_multiply_add():
    kernel, a, b, product = merge_case()
    fused = (kernel + product * np.float64(np.float32(0.7))).astype(np.float32)
    assert np.mean(merged_kernel(kernel, a, b) != fused) > 0.1


def test_merge_module_multiplies_before_it_scales():
    kernel, a, b, _ = merge_case()
    scaled_first = kernel + a @ (b * np.float32(0.7))
    assert np.mean(merged_kernel(kernel, a, b) != scaled_first) > 0.1
