"""Refuse a config.json that does not describe a plain Llama.

Names alone prove nothing, as checkpoints of other architectures are renamed to be loaded,
so keys that change the computation are checked, too. What only the names of the tensors
reveal is refused in `jlora.formats.hf.hf_folder`.
"""

from typing import Any

from jlora.config.json_fields import joined
from jlora.config.quantization import find_quantization
from jlora.errors import UnsupportedError, listing

# Model type -> the names of its classes, the one that is exported first. The others are
# Llamas whose attention may have a window.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "ministral": ("MinistralForCausalLM", "MinistralModel"),
}
# Model types that resemble a Llama, and how they differ.
SIMILAR = {
    "apertus": "xIELU instead of SwiGLU",
    "arcee": "squared ReLU instead of SwiGLU",
    "baichuan": "one matrix for q, k and v, and a normalised head",
    "cohere": "parallel blocks and scaled logits",
    "cohere2": "parallel blocks and scaled logits",
    "cwm": "sliding windows in some layers",
    "deepseek_v2": "a mixture of experts with latent attention",
    "deepseek_v3": "a mixture of experts with latent attention",
    "gemma": "scaled embeddings, GELU and other norms",
    "gemma2": "scaled embeddings, GELU and other norms",
    "gemma3_text": "scaled embeddings, GELU and other norms",
    "granite": "scaled embeddings, residuals, attention and logits",
    "llama4": "a mixture of experts, and layers without rotary embedding",
    "llama4_text": "a mixture of experts, and layers without rotary embedding",
    "minicpm": "scaled embeddings, residuals and logits",
    "mixtral": "a mixture of experts",
    "mllama": "cross-attention to images",
    "mllama_text_model": "cross-attention to images",
    "olmo2": "norms after each block and on q and k",
    "phi3": "one matrix for q, k and v and one for gate and up",
    "qwen2": "biases on q, k and v that its config.json does not mention",
    "qwen3": "norms on q and k",
    "smollm3": "layers without rotary embedding",
}
# Keys that can change the computation, after the values with which they do not.
_NEUTRAL_VALUES: tuple[tuple[tuple[Any, ...], str], ...] = (
    (
        (None, 1),
        """embedding_multiplier residual_multiplier attention_multiplier logits_scaling
        logit_scale scale_emb partial_rotary_factor""",
    ),
    (
        (None, False),
        """sliding_window use_sliding_window use_qk_norm qk_layernorm qkv_bias alibi
        use_qkv_bias parallel_attn rope_interleave use_parallel_residual""",
    ),
    (
        (None,),
        """attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar clip_qkv
        scale_depth dim_model_base q_lora_rank kv_lora_rank attention_chunk_size
        no_rope_layer_interval text_config vision_config""",
    ),
    ((None, []), "no_rope_layers cross_attention_layers"),
    ((None, 0, 1), "num_experts num_local_experts n_routed_experts"),
)
NEUTRAL = {key: values for values, keys in _NEUTRAL_VALUES for key in keys.split()}


def find_family(config: dict[str, Any]) -> str:
    """Returns llama, mistral or ministral.

    Raises:
        UnsupportedError: anything else; the message names every key that shows it.
    """
    family = _family_of_names(config)
    find_quantization(config)  # refuses what is not read
    has_window = family != "llama"
    problems = [
        f"{key}={config[key]!r:.80} changes the computation"
        for key, neutral in NEUTRAL.items()
        if config.get(key) not in neutral
        and not (has_window and key == "sliding_window")
    ]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act={config['hidden_act']!r:.80}, supported: 'silu'")
    layer_types = config.get("layer_types")
    kinds = ("full_attention", "sliding_attention")[: 1 + has_window]
    if layer_types and not (
        isinstance(layer_types, list) and all(kind in kinds for kind in layer_types)
    ):
        problems.append(
            f"layer_types={layer_types!r:.120}, supported: {' and '.join(kinds)}"
        )
    if problems:
        raise UnsupportedError(
            f"config.json: this is not a plain Llama: {joined(problems)}; jlora has no "
            "such layers, fine-tune it with another tool"
        )
    return family


def _family_of_names(config: dict[str, Any]) -> str:
    names, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list):
        names = [names]
    for family, known in FAMILIES.items():
        if all(name in known for name in names) and model_type in (None, family):
            if names or model_type is not None:
                return family
            raise UnsupportedError(
                "config.json: neither architectures nor model_type says what this "
                "model is; jlora supports model_type 'llama' only"
            )
    reason = SIMILAR.get(model_type) if isinstance(model_type, str) else None
    raise UnsupportedError(
        f"config.json: architectures={listing(names) or 'none'}, "
        f"model_type={model_type!r:.80} is not a Llama{f' ({reason})' if reason else ''}; "
        "jlora supports LlamaForCausalLM, MistralForCausalLM and MinistralForCausalLM"
    )
