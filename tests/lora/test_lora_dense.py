import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import FrozenDict
from helpers.training_cases import (
    ALL_LINEAR,
    adapted_params,
    llama_config,
    logits_of,
    random_params,
    random_tokens,
    shapes,
)

from jlora import LoraConfig, LoRADense, add_lora, count_parameters, merge
from jlora.errors import CorruptError, UsageError
from jlora.lora.adapter_tree import (
    format_parameter_count,
    join,
    linear_modules,
    map_leaves,
    module_at,
    split,
    trainable_mask,
)
from jlora.lora.merging import merge_kernel
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


def random_input(shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


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


def identity_layer(dropout, *, features=64):
    """A layer whose adapter hands its input through, over a zero kernel."""
    eye = jnp.eye(features)
    leaves = {"kernel": 0 * eye, "lora_A": eye, "lora_B": eye}
    params = {**leaves, "lora_scaling": jnp.float32(1)}
    layer = LoRADense(features, dropout=dropout)

    def apply(x, kernel=None, rngs=None):
        changed = params if kernel is None else {**params, "kernel": kernel}
        y = layer.apply({"params": changed}, jnp.asarray(x), rngs=rngs)
        return np.asarray(y)

    return apply


DROPOUT_RNG = {"dropout": jax.random.key(5)}


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
    same = module_at(params, K0)
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


def test_trainable_mask_is_true_at_lora_a_and_lora_b_only():
    params = adapted_params(llama_config(), LoraConfig(target_modules="all-linear"))
    expected = map_leaves(lambda path, _: path[-1] in ("lora_A", "lora_B"), params)
    assert trainable_mask(params) == expected
    assert sum(jax.tree.leaves(expected)) == 2 * 7 * 2


def test_join_undoes_split():
    params = adapted_params(llama_config())
    trainable, frozen = split(params, trainable_mask(params))
    joined = join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True)
    )


def test_split_keeps_empty_branches_out_of_both_parts():
    params = adapted_params(llama_config(), LoraConfig(target_modules=["q_proj"]))
    trainable, frozen = split(params, trainable_mask(params))
    names = {path[-1].key for path, _ in leaves_with_path(trainable)}
    assert names == {"lora_A", "lora_B"}
    assert trainable.keys() == {"layers"}
    assert "lora_A" not in frozen["layers"]["0"]["self_attn"]["q_proj"]


def leaves_with_path(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_merged_weights_give_the_logits_of_base_and_adapter(changes):
    config, tokens = llama_config(**changes), random_tokens(2, 8)
    model, params = Llama(config), adapted_params(config)
    merged = logits_of(model, merge(params), tokens)
    expected = logits_of(model, params, tokens)
    base = logits_of(model, random_params(config), tokens)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-5)


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
    assert equal(merge(adapted), base)


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


def merge_case(dtype):
    """Kernel, A and B on grids where every sum of the product is exact."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((40, 30)).astype(dtype)
    a = rng.integers(-64, 64, (40, 4)).astype(np.float32) / 32
    b = rng.integers(-64, 64, (4, 30)).astype(np.float32) / 32
    product = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_array_equal(product, product.astype(np.float32))
    return kernel, a, b, product


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge_kernel_rounds_scale_and_sum_apart(dtype):
    kernel, a, b, product = merge_case(dtype)
    scaling = np.float32(0.7)
    expected = np.empty_like(kernel)
    for i, j in np.ndindex(kernel.shape):
        update = np.float32(product[i, j] * np.float64(scaling))
        total = np.float32(np.float64(kernel[i, j]) + np.float64(update))
        expected[i, j] = total.astype(dtype)
    merged = merge_kernel(kernel, a, b, float(scaling))
    assert merged.dtype == dtype
    np.testing.assert_array_equal(merged, expected)


def test_merge_kernel_differs_from_a_fused_multiply_add():
    kernel, a, b, product = merge_case(np.float32)
    fused = (kernel + product * np.float64(np.float32(0.7))).astype(np.float32)
    assert np.mean(merge_kernel(kernel, a, b, 0.7) != fused) > 0.1


def test_merge_kernel_multiplies_before_it_scales():
    kernel, a, b, _ = merge_case(np.float32)
    scaled_first = kernel + a @ (b * np.float32(0.7))
    assert np.mean(merge_kernel(kernel, a, b, 0.7) != scaled_first) > 0.1


LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}
LLAMA_31_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("sizes", "lora", "line"),
    [
        (
            LLAMA_2_7B,
            LoraConfig(r=8),
            "trainable params: 4,194,304 || all params: 6,742,609,920 || "
            "trainable%: 0.0622",
        ),
        (
            LLAMA_31_8B,
            LoraConfig(r=16, target_modules="all-linear"),
            "trainable params: 41,943,040 || all params: 8,072,204,288 || "
            "trainable%: 0.5196",
        ),
    ],
)
def test_parameter_count_of_real_sizes_is_the_line_of_peft(sizes, lora, line):
    base = shapes(llama_config(**sizes))
    params = jax.eval_shape(lambda tree: add_lora(tree, lora, jax.random.key(0)), base)
    assert format_parameter_count(params) == line


def test_count_parameters_counts_a_tied_table_once():
    config = llama_config(tie_word_embeddings=True, num_hidden_layers=1)
    d, f, v, q, kv = 32, 48, 56, 64, 32
    layer = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d
    adapter = 2 * ((d + q) + (d + kv))
    lora = LoraConfig(r=2)
    found = count_parameters(adapted_params(config, lora))
    assert found == (adapter, v * d + layer + d + adapter)


def test_linear_modules_come_in_model_order_with_their_sizes():
    found = linear_modules(shapes(llama_config(num_hidden_layers=11)))
    layers = [int(name.split(".")[2]) for name in found if "layers" in name]
    assert layers == sorted(layers)
    assert found["model.layers.10.mlp.down_proj"] == (48, 32)
    assert list(found)[-1] == "lm_head"


def test_a_second_adapter_is_refused():
    params = adapted_params(llama_config())
    with pytest.raises(UsageError, match="have an adapter already"):
        add_lora(params, LoraConfig(), jax.random.key(0))


def test_a_frozen_dict_is_as_good_as_a_dict():
    config = llama_config()
    params = random_params(config)
    key = jax.random.key(0)
    plain = add_lora(params, LoraConfig(), key)
    frozen = add_lora(FrozenDict(params), LoraConfig(), key)
    jax.tree.map(np.testing.assert_array_equal, frozen, plain)
    tuned = FrozenDict(plain)
    assert count_parameters(tuned) == count_parameters(plain)
    assert trainable_mask(tuned) == trainable_mask(plain)
    jax.tree.map(np.testing.assert_array_equal, merge(tuned), merge(plain))
