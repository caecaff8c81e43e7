from dataclasses import replace

import pytest
from helpers.hf_configs import make

from jlora.errors import CorruptError, UnsupportedError


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"])
def test_llama_spellings_are_accepted(name):
    assert make(architectures=[name]) == make()


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
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm"),
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


def make_mistral(family: str = "Mistral", **changes):
    names = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    needed = {"num_key_value_heads": 2, "max_position_embeddings": 256}
    return make(**names, **needed, **changes)


@pytest.mark.parametrize("family", ["Mistral", "Ministral"])
@pytest.mark.parametrize(
    ("window", "expected"), [({}, 4096), ({"sliding_window": None}, None)]
)
def test_window_of_a_mistral(family, window, expected):
    config = make_mistral(family, **window, layer_types=["sliding_attention"] * 2)
    plain = make(num_key_value_heads=2, max_position_embeddings=256)
    assert config == replace(plain, sliding_window=expected)


@pytest.mark.parametrize("window", [0, -1, "4096", True, 4096.0, [4096]])
def test_window_that_is_no_length_is_corrupt(window):
    with pytest.raises(CorruptError, match="sliding_window"):
        make_mistral(sliding_window=window)


def test_text_beyond_the_window_is_refused_and_within_it_is_said(capsys):
    config = make_mistral(sliding_window=40)
    assert config.longest == 40
    for _ in range(2):
        config.check_length(40, "data.seq_len")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "data.seq_len is within the model's sliding_window=40" in said
    with pytest.raises(
        UnsupportedError, match=r"data\.seq_len=41 exceeds the model's sl"
    ):
        config.check_length(41, "data.seq_len")


@pytest.mark.parametrize(
    "value", [3, [["full_attention"]], "sliding_attention", [None]]
)
def test_layer_types_of_a_strange_type_are_refused(value):
    with pytest.raises(UnsupportedError, match="layer_types"):
        make(layer_types=value)
