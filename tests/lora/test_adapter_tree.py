import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from helpers.training_cases import (
    adapted_params,
    llama_config,
    random_params,
    shapes,
)

from jlora import LoraConfig, add_lora, count_parameters, merge
from jlora.lora.adapter_tree import (
    format_parameter_count,
    join,
    linear_modules,
    map_leaves,
    split,
    trainable_mask,
)


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
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trainable)}
    assert names == {"lora_A", "lora_B"}
    assert trainable.keys() == {"layers"}
    assert "lora_A" not in frozen["layers"]["0"]["self_attn"]["q_proj"]


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


def test_count_parameters_counts_a_tied_embedding_once():
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


def test_a_frozen_dict_gives_the_same_as_a_dict():
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
