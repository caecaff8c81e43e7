"""Writes tests/golden/rope: what Transformers computes with every type of rotary scaling.

Run once, with torch and transformers installed:
    python tests/golden/make_rope_golden.py

One tiny Llama (model.safetensors, config.json), and per case in cases.json the rotary
settings that replace its own. expected.npz holds the logits of a row within and of a row
beyond the original context, and the frequencies of models of real size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent / "rope"
PLAIN: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTHS = (24, 80)
ORIGINAL = {"original_max_position_embeddings": 32}
SHORT = [1.0, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5]
LONG = [1.0, 1.3, 2.0, 4.1, 7.5, 15.0, 28.0, 40.0]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
# Name -> rope_parameters (or rope_scaling) without theta, as files in the wild have them.
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn_own_range": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
        **ORIGINAL,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        **ORIGINAL,
    },
    "yarn_factor_null": {"rope_type": "yarn", "factor": None, **ORIGINAL},
    "yarn_attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 0.8,
        **ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        **ORIGINAL,
    },
    "longrope_factor": {
        "rope_type": "longrope",
        "factor": 3.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        **ORIGINAL,
    },
    "longrope_attention": {
        "rope_type": "longrope",
        "attention_factor": 1.1,
        "short_factor": SHORT,
        "long_factor": LONG,
        **ORIGINAL,
    },
}
THETA = 50000.0
# Models of real size: head_dim, theta, max and original positions.
SIZES = (
    (64, 10000.0, 4096, 2048),
    (80, 100000.0, 16384, 4096),
    (96, 130000.0, 2048, 2048),
    (128, 500000.0, 131072, 8192),
    (256, 1000042.0, 32768, 4096),
)


def main() -> None:
    """Writes the model, the cases and the numbers."""
    torch.manual_seed(0)
    HERE.mkdir(parents=True, exist_ok=True)
    model = LlamaForCausalLM(LlamaConfig(**PLAIN))
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape) * 0.2
            parameter.copy_(values + (1.0 if key.endswith("norm.weight") else 0.0))
    model.to(torch.bfloat16).save_pretrained(HERE)
    (HERE / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.RandomState(0).randint(0, PLAIN["vocab_size"], (1, LENGTHS[-1]))
    arrays: dict[str, Any] = {"tokens": np.int32(tokens)}
    for name, settings in CASES.items():
        for length in LENGTHS:
            arrays[f"logits {name} {length}"] = logits(settings, tokens[:, :length])
    sizes = [
        {"name": name, "size": size, "length": length, "settings": settings}
        for name in CASES
        for size in SIZES
        for length, settings in [(size[2] // 2, rescaled(name, size))]
    ] + [
        {"name": name, "size": size, "length": 3 * size[2], "settings": settings}
        for name in ("dynamic", "longrope")
        for size in SIZES
        for settings in [rescaled(name, size)]
    ]
    for i, case in enumerate(sizes):
        arrays[f"frequencies {i}"], arrays[f"attention {i}"] = frequencies(**case)
    arrays["versions"] = np.array(
        [f"{m.__name__} {m.__version__}" for m in (torch, transformers, np)]
    )
    np.savez_compressed(HERE / "expected.npz", **arrays)
    document = {"theta": THETA, "cases": CASES, "sizes": sizes}
    (HERE / "cases.json").write_text(json.dumps(document) + "\n")


def logits(settings: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Returns the float32 logits [B, T, V] of the tiny model with these settings."""
    config = LlamaConfig(
        **PLAIN,
        rope_parameters={"rope_theta": THETA, **json.loads(json.dumps(settings))},
    )
    model = LlamaForCausalLM.from_pretrained(
        HERE, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def rescaled(name: str, size: tuple[int, float, int, int]) -> dict[str, Any]:
    """Returns a case's settings for a model of another size."""
    settings = dict(CASES[name])
    if "original_max_position_embeddings" in settings:
        settings["original_max_position_embeddings"] = size[3]
    for key in ("short_factor", "long_factor"):
        if key in settings:
            pairs = size[0] // 2
            settings[key] = [round(1 + 40 * (j / pairs) ** 2, 3) for j in range(pairs)]
    if "long_factor" in settings:
        settings["long_factor"] = [2 * value for value in settings["long_factor"]]
    return settings


def frequencies(
    name: str, size: tuple[int, float, int, int], length: int, settings: dict[str, Any]
) -> tuple[np.ndarray, np.float64]:
    """Returns Transformers' inverse frequencies and attention factor."""
    head_dim, theta, positions, _ = size
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_theta": theta, **settings},
    )
    if name == "default":
        function = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
        inverse, attention = function.compute_default_rope_parameters(config)
    else:
        function = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
        inverse, attention = function(config, seq_len=torch.tensor(length))
    return inverse.numpy(), np.float64(attention)


if __name__ == "__main__":
    main()
