import pytest
from helpers.hf_configs import make

from jlora.errors import UnsupportedError


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


@pytest.mark.parametrize(
    "value", [3, [["full_attention"]], "sliding_attention", [None]]
)
def test_layer_types_of_a_strange_type_are_refused(value):
    with pytest.raises(UnsupportedError, match="layer_types"):
        make(layer_types=value)
