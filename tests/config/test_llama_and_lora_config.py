from dataclasses import fields
from typing import Any

import pytest

from jlora.config.llama_config import LlamaConfig, unused_keys
from jlora.config.lora_config import LoraConfig
from jlora.config.peft_fields import FORMS, INERT, REFUSED
from jlora.errors import CorruptError, UnsupportedError, UsageError

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_hf({**HF, **changes})


def without(group: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != key}


def test_absent_keys_get_hf_defaults():
    config = make()
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rope_parameters.rope_theta == 10000.0
    assert config.max_position_embeddings == 2048
    assert not config.tie_word_embeddings
    assert config.eos_token_id == ()


@pytest.mark.parametrize("head_dim", [16, 24, 128])
def test_head_dim_is_what_the_file_says(head_dim):
    assert make(head_dim=head_dim).head_dim == head_dim


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
def test_null_means_the_default(key):
    assert make(**{key: None}) == make()


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, ()), (2, (2,)), ([1, 2, 3], (1, 2, 3)), (0, (0,))]
)
def test_eos_token_id_is_one_or_several(eos, expected):
    assert make(eos_token_id=eos).eos_token_id == expected


@pytest.mark.parametrize(
    "key",
    [
        "pretraining_tp",
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "auto_map",
        "torch_dtype",
        "somebody_elses_key",
    ],
)
def test_harmless_keys_change_nothing(key):
    assert make(**{key: "anything"}) == make()


def test_keys_that_are_not_used_are_known():
    harmless = {"pretraining_tp": 2, "auto_map": {}, "use_cache": True}
    assert unused_keys(HF | harmless) == ["auto_map", "pretraining_tp", "use_cache"]
    assert unused_keys(HF | {"sliding_window": None, "rope_theta": 1e4}) == []


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"])
def test_llama_spellings_are_accepted(name):
    assert make(architectures=[name]) == make()


def test_v4_and_v5_layouts_mean_the_same_theta():
    old = make(rope_theta=5e5)
    new = make(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert old == new
    assert old.rope_parameters.rope_theta == 5e5


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_llama3_in_v4_and_v5_layout_is_the_same(type_key):
    scaling = {**without(LLAMA3, "rope_type"), type_key: "llama3"}
    old = make(rope_theta=5e5, rope_scaling=scaling)
    new = make(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert old.rope_parameters.factor == 8.0
    assert old.rope_parameters.original_max_position_embeddings == 32


def test_rope_settings_repeated_in_every_place_are_accepted():
    config = make(
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        rope_parameters={**LLAMA3, "rope_theta": 5e5},
        original_max_position_embeddings=32,
    )
    assert config == make(rope_theta=5e5, rope_scaling=LLAMA3)


@pytest.mark.parametrize("empty", [None, {}])
def test_empty_rope_scaling_is_no_scaling(empty):
    assert make(rope_scaling=empty) == make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "Classification"),
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": "LlamaForCausalLM2"}, "LlamaForCausalLM2"),
        ({"architectures": [], "model_type": None}, "neither"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"attention_multiplier": 0.01}, "attention_multiplier"),
        ({"logits_scaling": 8}, "logits_scaling"),
        ({"logit_scale": 0.06}, "logit_scale"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_att"),
        ({"rope_scaling": {"type": "default", "mrope_section": [8, 8]}}, "mrope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
)
def test_other_architectures_are_refused_by_name(changes, words):
    with pytest.raises(UnsupportedError, match=words):
        make(**changes)


@pytest.mark.parametrize(
    "neutral",
    [
        {"embedding_multiplier": 1.0},
        {"logits_scaling": 1},
        {"sliding_window": None},
        {"no_rope_layers": []},
        {"num_local_experts": 0},
        {"quantization_config": None},
        {"hidden_act": "silu"},
        {"layer_types": ["full_attention", "full_attention"]},
        {"attention_bias": None},
    ],
)
def test_neutral_values_of_other_architectures_are_accepted(neutral):
    assert make(**neutral) == make()


def test_an_unsupported_rope_type_is_answered_with_the_supported_ones():
    with pytest.raises(
        UnsupportedError, match="default, linear, dynamic, llama3, yarn, longrope"
    ):
        make(rope_scaling={"rope_type": "su"})


@pytest.mark.parametrize("key", [key for key in HF if key.endswith(("size", "layers"))])
@pytest.mark.parametrize("value", [None, 0, -1, True, "64", 64.0])
def test_sizes_must_be_integers_above_zero(key, value):
    with pytest.raises(CorruptError, match=key):
        make(**{key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads='4'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": 5}, "head_dim is not given"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"rope_theta": None}, "rope_theta=None"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": [10000.0]}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta"),
        ({"rope_theta": "a", "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "10000.0, 500000.0",
        ),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "type and rope_type differ"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}},
            "differ in factor",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "differ",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
            "64 at the top and 32",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_contradictions_are_refused_with_the_key(changes, words):
    with pytest.raises(CorruptError, match=words):
        make(**changes)


@pytest.mark.parametrize("key", without(LLAMA3, "rope_type"))
def test_a_missing_llama3_key_is_named_with_its_type(key):
    with pytest.raises(CorruptError, match=f"llama3.*{key}"):
        make(rope_scaling=without(LLAMA3, key))


@pytest.mark.parametrize(
    "value", [3, [["full_attention"]], "sliding_attention", [None]]
)
def test_layer_types_of_a_strange_type_are_refused(value):
    with pytest.raises(UnsupportedError, match="layer_types"):
        make(layer_types=value)


@pytest.mark.parametrize("value", [[], {"a": 1}, 3])
def test_a_rope_type_of_a_strange_type_is_refused(value):
    with pytest.raises(UnsupportedError, match="rope"):
        make(rope_scaling={"rope_type": value, "factor": 2.0})


def test_longer_rows_than_the_model_takes_are_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"seq_len=129 .*=128"):
        make(max_position_embeddings=128).check_length(129, "data.seq_len")


def test_rows_as_long_as_the_model_takes_are_accepted():
    make(max_position_embeddings=128).check_length(128, "data.seq_len")


def test_lora_defaults_are_those_of_peft():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)
    assert config.target_modules is None
    assert config.init_lora_weights is True
    assert not config.use_rslora
    assert config.bias == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj=0"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj=-1"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_to_transform": [0, -1]}, "-1; layers count from 0"),
    ],
)
def test_lora_values_out_of_range_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        LoraConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "pissa_niter_0"},
    ],
)
def test_lora_features_that_are_not_there_are_refused_by_name(changes):
    with pytest.raises(UnsupportedError, match=next(iter(changes))):
        LoraConfig(**changes)


# Every field of PEFT 0.21's LoraConfig that is not kept, in a form that changes nothing.
AT_REST = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "inference_mode": True,
    "fan_in_fan_out": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": None,
    "lora_ga_config": None,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": [],
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "qalora_group_size": 16,
}


def test_a_lora_config_of_peft_at_rest_is_taken_and_judged_in_one_place():
    assert LoraConfig(r=4, **AT_REST) == LoraConfig(r=4)
    assert AT_REST.keys() == {*REFUSED, *INERT}
    assert FORMS.keys() == {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_jlora_does_not_do_is_refused_with_field_value_and_reason(name):
    wanted: dict[str, Any] = {name: "wanted"}
    with pytest.raises(UnsupportedError) as caught:
        LoraConfig(**wanted)
    assert f"{name}='wanted' ({REFUSED[name][1]})" in str(caught.value)
    assert "leave it out" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": "8"}, "r='8' is not an integer"),
        ({"r": None}, "r=None is not an integer"),
        ({"lora_alpha": True}, "lora_alpha=True is not a number"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not true or false"),
        ({"use_dora": 1}, "use_dora=1 is not true or false"),
        ({"target_modules": [1]}, r"target_modules=\[1\] is not"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not a list"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0' is not"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform=\[0.5\] is not"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"alpha_pattern": {1: 2}}, "alpha_pattern="),
        ({"alpha_pattern": {"q_proj": "2"}}, "q_proj='2'"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices="),
        ({"init_lora_weights": None}, "init_lora_weights=None"),
        ({"bias": None}, "bias=None is not a string"),
        ({"revision": 1}, "revision=1 is not a string"),
    ],
)
def test_lora_values_of_a_wrong_type_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        LoraConfig(**changes)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"rank_pattern": None, "alpha_pattern": None}, {}),
        (
            {"target_modules": {"v_proj", "k_proj"}},
            {"target_modules": ["k_proj", "v_proj"]},
        ),
        ({"target_modules": ("q_proj",)}, {"target_modules": ["q_proj"]}),
        ({"layers_to_transform": range(2)}, {"layers_to_transform": [0, 1]}),
        ({"init_lora_weights": "Gaussian"}, {"init_lora_weights": "gaussian"}),
    ],
)
def test_what_peft_takes_for_a_list_or_nothing_is_taken(given, kept):
    assert LoraConfig(**given) == LoraConfig(**kept)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 2.0), (True, 8.0)])
def test_scaling_is_alpha_over_rank_or_its_root(rslora, expected):
    config = LoraConfig(r=16, lora_alpha=32, use_rslora=rslora)
    assert config.scaling(16, 32) == expected
