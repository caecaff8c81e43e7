"""A model's configuration as the metadata of a GGUF file: the inverse of `gguf_config`.

Source: llama.cpp, convert_hf_to_gguf.py; gguf.constants.
"""

from typing import Any

import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UnsupportedError
from jlora.formats.gguf.gguf_config import llama3_divisors


def config_metadata(config: LlamaConfig) -> dict[str, Any]:
    """Returns {key: value}; an int is a uint32 and a float a float32 in the file."""
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters.rope_theta,
        **(
            {"llama.attention.sliding_window": config.sliding_window}
            if config.sliding_window
            else {}
        ),
        **_scaling(config),
    }


def rope_divisors(config: LlamaConfig) -> np.ndarray | None:
    """Returns the float32 divisor of each rotary frequency, None if there are none.

    Raises:
        UnsupportedError: a rotary type for which GGUF has no form.
    """
    rope = config.rope_parameters
    if rope.rope_type in ("default", "linear", "yarn"):
        return None
    if rope.rope_type == "llama3":
        scaling = vars(rope)
        divisors = llama3_divisors(rope.rope_theta, config.head_dim, scaling)
        return divisors.astype(np.float32)
    same = rope.rope_type == "longrope" and rope.short_factor == rope.long_factor
    if not same or rope.attention_factor != 1:
        raise UnsupportedError(
            f"rope type {rope.rope_type}: llama.cpp computes it otherwise for a Llama, so "
            "no GGUF file would be this model; export a Hugging Face folder (--to hf)"
        )
    return np.array(rope.short_factor, np.float32)


def _scaling(config: LlamaConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    if rope.rope_type not in ("linear", "yarn"):
        return {}
    prefix = "llama.rope.scaling"
    scaling: dict[str, Any] = {
        f"{prefix}.type": rope.rope_type,
        f"{prefix}.factor": rope.factor,
    }
    if rope.rope_type == "yarn":
        original = rope.original_max_position_embeddings
        scaling[f"{prefix}.original_context_length"] = original
        scaling[f"{prefix}.yarn_beta_fast"] = rope.beta_fast
        scaling[f"{prefix}.yarn_beta_slow"] = rope.beta_slow
    return scaling
