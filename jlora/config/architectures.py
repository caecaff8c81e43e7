"""Is this config.json a plain Llama? By its names, and by keys that change the maths.

Names alone prove nothing: checkpoints of other architectures are renamed to be loadable.
What only the tensors' names give away is refused in `jlora.formats.hf.hf_folder`.
"""

from typing import Any

from jlora.config.json_fields import joined
from jlora.errors import UnsupportedError, listing

LLAMA = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
MISTRAL = ("MistralForCausalLM", "MistralModel")
# Model types that look like a Llama, and what is different about them.
LOOK_ALIKES = {
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
# Keys that change the computation, with the values that leave a Llama a Llama.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("embedding_multiplier", "residual_multiplier", "attention_multiplier"),
            *("logits_scaling", "logit_scale", "scale_emb", "partial_rotary_factor"),
        ),
        (None, 1),
    ),
    **dict.fromkeys(
        (
            *("sliding_window", "use_sliding_window", "use_qk_norm", "qk_layernorm"),
            *("qkv_bias", "use_qkv_bias", "alibi", "parallel_attn", "rope_interleave"),
            "use_parallel_residual",
        ),
        (None, False),
    ),
    **dict.fromkeys(
        (
            *("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"),
            *("query_pre_attn_scalar", "scale_depth", "dim_model_base"),
            *("q_lora_rank", "kv_lora_rank", "attention_chunk_size"),
            *("no_rope_layer_interval", "text_config", "vision_config"),
            "quantization_config",
        ),
        (None,),
    ),
    **dict.fromkeys(("no_rope_layers", "cross_attention_layers"), (None, [])),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts"), (None, 0, 1)
    ),
}


def refuse_other_architectures(config: dict[str, Any]) -> bool:
    """Returns whether the model is a Mistral without a sliding window, else a Llama.

    Raises:
        UnsupportedError: anything else; every key that says so is named.
    """
    is_mistral = _refuse_names(config)
    if "quantization_config" in config and config["quantization_config"] is not None:
        _refuse_quantised(config["quantization_config"])
    problems = [
        f"{key}={config[key]!r:.80} changes the computation"
        for key, neutral in NEUTRAL.items()
        if config.get(key) not in neutral
    ]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act={config['hidden_act']!r:.80}, supported: 'silu'")
    layer_types = config.get("layer_types")
    if layer_types and not (
        isinstance(layer_types, list)
        and all(kind == "full_attention" for kind in layer_types)
    ):
        problems.append(
            f"layer_types={layer_types!r:.120}, supported: full_attention in every layer"
        )
    if is_mistral and "sliding_window" not in config:
        problems.append(
            "sliding_window is absent, which means 4096 for a Mistral; if the model was "
            "trained without a window, add sliding_window: null"
        )
    if problems:
        raise UnsupportedError(
            f"config.json: this is not a plain Llama: {joined(problems)}; jlora has no "
            "such layers, fine-tune it with another tool"
        )
    return is_mistral


def _refuse_names(config: dict[str, Any]) -> bool:
    """Returns whether the names say Mistral; raises unless they say Llama or Mistral."""
    names, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list):
        names = [names]
    for known, model_type in ((LLAMA, "llama"), (MISTRAL, "mistral")):
        if all(name in known for name in names) and kind in (None, model_type):
            if names or kind is not None:
                return model_type == "mistral"
            raise UnsupportedError(
                "config.json: neither architectures nor model_type says what this "
                "model is; jlora supports model_type 'llama' only"
            )
    reason = LOOK_ALIKES.get(kind) if isinstance(kind, str) else None
    raise UnsupportedError(
        f"config.json: architectures={listing(names) or 'none'}, model_type={kind!r:.80} "
        f"is not a Llama{f' ({reason})' if reason else ''}; jlora supports "
        "LlamaForCausalLM, and MistralForCausalLM without a sliding window"
    )


def _refuse_quantised(settings: Any) -> None:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    raise UnsupportedError(
        f"config.json: the checkpoint is quantised ({method or 'unknown method'!s:.80}); "
        "use the original bfloat16, float16 or float32 model"
    )
