"""Small random Llamas as Transformers saves them, and what they compute."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PLAIN = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
ORIGINAL = {"original_max_position_embeddings": 48}
LONG = [1.0 + 1.5 * j for j in range(4)]
# Rotary settings besides theta; `random_tokens` rows are longer than every original
# context, and than all positions of "dynamic".
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": LONG,
        **ORIGINAL,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True, "rms_norm_eps": 1e-5},
    "head_dim": {"head_dim": 20, "num_key_value_heads": 4},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    **{
        name: {"rope_parameters": {"rope_theta": 20000.0, **rope}}
        for name, rope in ROPES.items()
    },
}
CONFIGS["dynamic"]["max_position_embeddings"] = 64


def save(
    folder: Path, name: str = "gqa", dtype: torch.dtype = torch.float32, **options: Any
) -> LlamaForCausalLM:
    """Writes a model to a folder and returns it as Transformers reads it, in float32."""
    torch.manual_seed(len(name))
    model = LlamaForCausalLM(LlamaConfig(**(PLAIN | CONFIGS[name])))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, **options)
    return load(folder)


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Returns the model of a folder as Transformers reads it."""
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def random_tokens(rows: int = 2, length: int = 80, seed: int = 0) -> np.ndarray:
    """Returns int32 ids [rows, length]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, PLAIN["vocab_size"], (rows, length)).astype(np.int32)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits [B, T, V] that Transformers or PEFT computes."""
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
