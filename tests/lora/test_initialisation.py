import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapter_methods import EVERYWHERE
from helpers.training_cases import (
    ALL_LINEAR,
    adapted_params,
    llama_config,
    logits_of,
    random_params,
    random_tokens,
)

from jlora import LoraConfig, add_lora
from jlora.errors import UnsupportedError, UsageError
from jlora.lora.adapter_tree import module_at
from jlora.model.llama import Llama

Q0, K0, V0 = (f"model.layers.0.self_attn.{p}_proj" for p in "qkv")

Q1, V1 = (f"model.layers.1.self_attn.{p}_proj" for p in "qv")

IN, OUT = 1024, 24


def one_kernel(lora):
    params = {
        "layers": {"0": {"self_attn": {"q_proj": {"kernel": np.ones((IN, OUT))}}}}
    }
    return module_at(add_lora(params, lora, jax.random.key(0)), Q0)


def q_only(**fields: Any) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], **fields)


def equal(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def test_a_is_uniform_within_one_over_sqrt_of_its_inputs():
    a = np.asarray(one_kernel(q_only(r=64))["lora_A"])
    bound = 1 / math.sqrt(IN)
    assert a.shape == (IN, 64)
    assert 0.999 * bound < np.abs(a).max() <= bound
    # 65536 draws: the standard error of mean and deviation is below 0.4 %.
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.015)
    assert abs(a.mean()) < 0.015 * bound


def test_b_is_zero():
    b = np.asarray(one_kernel(q_only(r=4))["lora_B"])
    np.testing.assert_array_equal(b, np.zeros((4, OUT), np.float32))


def test_gaussian_draws_a_with_deviation_one_over_rank():
    pair = one_kernel(q_only(r=16, init_lora_weights="gaussian"))
    a = np.asarray(pair["lora_A"])
    assert a.std() == pytest.approx(1 / 16, rel=0.03)
    assert np.abs(a).max() > 3 / 16
    assert not np.any(pair["lora_B"])


def test_init_false_draws_b_uniform_within_one_over_sqrt_of_the_rank():
    b = np.asarray(one_kernel(q_only(r=64, init_lora_weights=False))["lora_B"])
    assert 0.98 / 8 < np.abs(b).max() <= 1 / 8


def test_orthogonal_factors_are_not_zero_but_their_product_is():
    lora = LoraConfig(r=4, init_lora_weights="orthogonal")
    params = add_lora(random_params(llama_config()), lora, jax.random.key(0))
    a, b = (np.asarray(module_at(params, Q0)[leaf]) for leaf in ("lora_A", "lora_B"))
    assert min(np.abs(a).max(), np.abs(b).max()) > 0.05
    np.testing.assert_allclose(a @ b, 0, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "excess"), [("pissa", 1e-6), ("pissa_niter_4", 0.1)]
)
def test_pissa_is_the_best_approximation_of_its_rank(method, excess):
    lora = LoraConfig(r=4, lora_alpha=6, init_lora_weights=method)
    params = add_lora(random_params(llama_config()), lora, jax.random.key(0))
    leaves = module_at(params, Q0)
    kernel = np.asarray(leaves["kernel"], np.float64)
    values = np.linalg.svd(kernel, compute_uv=False)
    rest = kernel - 1.5 * np.asarray(leaves["lora_A"] @ leaves["lora_B"])
    best = np.linalg.norm(values[4:])
    assert best * (1 - 1e-6) < np.linalg.norm(rest) < best * (1 + excess)
    np.testing.assert_array_equal(leaves["lora_A0"], leaves["lora_A"])


# DoRA's product with 1 changes what XLA fuses, and with it which bfloat16 roundings it
# leaves out: in that dtype the logits are equal up to those only.
@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"use_dora": True, "target_modules": EVERYWHERE}, jnp.float32),
        ({"init_lora_weights": "pissa"}, jnp.bfloat16),
        ({"init_lora_weights": "pissa_niter_2"}, jnp.float32),
        ({"init_lora_weights": "olora"}, jnp.bfloat16),
        ({"modules_to_save": ["norm", "lm_head"]}, jnp.bfloat16),
        ({"trainable_token_indices": [0, 5]}, jnp.bfloat16),
    ],
    ids=str,
)
def test_a_new_adapter_leaves_the_logits_bit_identical(fields, dtype):
    config, tokens = llama_config(num_hidden_layers=1), random_tokens(2, 8)
    base = random_params(config, dtype=dtype)
    model = Llama(config, dtype=dtype)
    adapted = add_lora(base, LoraConfig(**fields), jax.random.key(1))
    before = logits_of(model, base, tokens)
    np.testing.assert_array_equal(logits_of(model, adapted, tokens), before)
    kernel = module_at(base, Q0)["kernel"]
    assert module_at(adapted, Q0)["kernel"] is kernel


def test_add_lora_leaves_the_logits_unchanged():
    config, tokens = llama_config(), random_tokens(2, 8)
    base = random_params(config)
    lora = LoraConfig(target_modules="all-linear")
    model = Llama(config)
    adapted = add_lora(base, lora, jax.random.key(1))
    before = logits_of(model, base, tokens)
    np.testing.assert_array_equal(logits_of(model, adapted, tokens), before)


def test_add_lora_shares_the_base_leaves():
    base = random_params(llama_config())
    adapted = add_lora(base, ALL_LINEAR, jax.random.key(1))
    assert module_at(adapted, Q0)["kernel"] is module_at(base, Q0)["kernel"]
    assert "lora_A" not in module_at(base, Q0)


def test_draws_of_a_module_do_not_depend_on_other_targets():
    base, key = random_params(llama_config()), jax.random.key(3)
    few = add_lora(base, LoraConfig(target_modules=["v_proj"]), key)
    many = add_lora(base, LoraConfig(target_modules="all-linear"), key)
    assert equal(module_at(few, V1), module_at(many, V1))


def test_draws_differ_between_modules_and_keys():
    base = random_params(llama_config())
    lora = LoraConfig(target_modules=["k_proj", "v_proj"])
    one, two = (add_lora(base, lora, jax.random.key(i)) for i in range(2))
    draws = [module_at(one, K0), module_at(one, V0), module_at(one, V1)]
    draws.append(module_at(two, K0))
    assert len({np.asarray(pair["lora_A"]).tobytes() for pair in draws}) == 4


@pytest.mark.parametrize(
    ("use_rslora", "scaling"), [(False, 32 / 16), (True, 32 / math.sqrt(16))]
)
def test_scaling_is_alpha_over_rank_or_its_root(use_rslora, scaling):
    pair = one_kernel(q_only(r=16, lora_alpha=32, use_rslora=use_rslora))
    assert float(pair["lora_scaling"]) == scaling


def test_patterns_give_modules_their_own_rank_and_scaling():
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.1\.self_attn\.v_proj": 2},
        alpha_pattern={"q_proj": 6.0},
    )
    params = add_lora(random_params(llama_config()), lora, jax.random.key(0))
    found = {
        name: (pair["lora_A"].shape[1], pair["lora_B"].shape[0], pair["lora_scaling"])
        for name in (Q0, Q1, V0, V1)
        for pair in [module_at(params, name)]
    }
    expected = {Q0: (4, 4, 1.5), Q1: (4, 4, 1.5), V0: (4, 4, 2.0), V1: (2, 2, 4.0)}
    assert found == expected


def test_adapters_are_float32_over_a_bfloat16_base():
    params = adapted_params(llama_config(), dtype=jnp.bfloat16)
    q_proj = module_at(params, Q0)
    dtypes = {name: str(leaf.dtype) for name, leaf in q_proj.items()}
    assert dtypes.pop("kernel") == "bfloat16"
    assert set(dtypes.values()) == {"float32"}


def test_a_second_adapter_is_refused():
    params = adapted_params(llama_config())
    with pytest.raises(UsageError, match="have an adapter already"):
        add_lora(params, LoraConfig(), jax.random.key(0))


def test_biases_are_not_trained():
    with pytest.raises(UnsupportedError, match=r"lora\.bias='all'"):
        add_lora(
            random_params(llama_config()), LoraConfig(bias="all"), jax.random.key(0)
        )


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_that_a_weight_does_not_have_is_refused(method):
    message = rf"rank {OUT + 1} of {Q0} \[{IN}, {OUT}\]; lower lora.r"
    with pytest.raises(UsageError, match=message):
        one_kernel(q_only(r=OUT + 1, init_lora_weights=method))
    assert one_kernel(q_only(r=OUT, init_lora_weights=method))["lora_A"].shape[1] == OUT
