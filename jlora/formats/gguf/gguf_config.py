"""Converts the metadata of a GGUF file to a config.json of Hugging Face.

Source: llama.cpp, convert_hf_to_gguf.py and src/llama-model.cpp.
"""

from collections import Counter
from typing import Any

import numpy as np

from jlora.config.architectures import FAMILIES
from jlora.errors import CorruptError, UnsupportedError
from jlora.formats.gguf.gguf_file import PLAIN, GGUFFile
from jlora.formats.safetensors_file import read_bytes

ROPE_FREQS = "rope_freqs.weight"


def to_hf_config(file: GGUFFile, type_names: dict[str, str]) -> dict[str, Any]:
    """Returns the contents of config.json.

    Args:
        file: the header.
        type_names: {tensor: name of its ggml type}.
    """
    get = file.metadata.get
    heads = _of_layers(file, "llama.attention.head_count")
    hidden = get("llama.embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CorruptError(
            f"{file.path}: llama.attention.head_count={heads!r:.80} and "
            f"llama.embedding_length={hidden!r:.80}; expected two integers above 0"
        )
    head_dim = get("llama.attention.key_length", hidden // heads)
    theta = get("llama.rope.freq_base", 10000.0)
    if not isinstance(head_dim, int):
        raise CorruptError(
            f"{file.path}: llama.attention.key_length={head_dim!r:.80}; expected an integer"
        )
    if not isinstance(theta, int | float) or not theta > 0:
        raise CorruptError(
            f"{file.path}: llama.rope.freq_base={theta!r:.80}; expected a number above 0"
        )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"{file.path}: {key}={get(key)!r:.80} differs from the head size {head_dim}; "
                "jlora does not support it"
            )
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else None
    dtypes = Counter(
        type_names[k] for k, t in file.tensors.items() if len(t.shape) == 2
    )
    common = PLAIN.get(max(dtypes, key=lambda k: dtypes[k], default=""), np.float32)
    window, longest = get("llama.attention.sliding_window"), get("llama.context_length")
    if isinstance(window, int) and isinstance(longest, int) and window >= longest:
        window = None
    family = "mistral" if window else "llama"
    return {
        "architectures": [FAMILIES[family][0]],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _of_layers(file, "llama.feed_forward_length"),
        "max_position_embeddings": longest,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "model_type": family,
        "num_attention_heads": heads,
        "num_hidden_layers": get("llama.block_count"),
        "num_key_value_heads": _of_layers(file, "llama.attention.head_count_kv", heads),
        "rms_norm_eps": _decimal(get("llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": _rope_scaling(file, head_dim),
        "rope_theta": _decimal(theta),
        "sliding_window": window or None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": np.dtype(common).name,
        "vocab_size": rows,
    }


def _of_layers(file: GGUFFile, key: str, default: Any = None) -> Any:
    """Returns a value that some converters repeat for each layer."""
    value = file.metadata.get(key, default)
    if not isinstance(value, list) or not value:
        return value
    if any(item != value[0] for item in value):
        raise UnsupportedError(
            f"{file.path}: {key}={value!r:.80} differs between layers; jlora supports one "
            "value for all"
        )
    return value[0]


def _decimal(value: Any) -> Any:
    """Returns the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    """Returns HF's `rope_scaling`, or None."""
    get = file.metadata.get
    # llama.cpp's default type is linear, and its older key means the same.
    kind = get("llama.rope.scaling.type") or "linear"
    factor = get("llama.rope.scaling.factor", get("llama.rope.scale_linear")) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"{file.path}: llama.rope.scaling.type={kind!r:.80}; jlora reads none, linear "
            "and yarn from GGUF, use the original model"
        )
    divisors = _rope_divisors(file, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1):
        return _divided(file, head_dim, divisors)
    if divisors is not None:
        raise UnsupportedError(
            f"{file.path}: llama.rope.scaling.type={kind!r} together with {ROPE_FREQS}; "
            "jlora supports one of them, use the original model"
        )
    scaling = {"rope_type": kind, "factor": _decimal(factor)}
    original = get("llama.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            value = get(f"llama.rope.scaling.yarn_{key}")
            if value is not None:
                scaling[key] = _decimal(value)
    return scaling


def _rope_divisors(file: GGUFFile, head_dim: int) -> np.ndarray | None:
    """Returns the divisor of each rotary frequency, or None if all are 1."""
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    if tensor.shape != (head_dim // 2,) or tensor.type != 0:
        raise CorruptError(
            f"{file.path}: {ROPE_FREQS} has shape {list(tensor.shape)} and type "
            f"{tensor.type}; expected F32 of shape [{head_dim // 2}]"
        )
    divisors = read_bytes(file.path, tensor.offset, 2 * head_dim).view(np.float32)
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise CorruptError(
            f"{file.path}: {ROPE_FREQS} holds values that are not above 0; the file is "
            "damaged, use another copy"
        )
    return None if (divisors == 1).all() else divisors


def _divided(
    file: GGUFFile, head_dim: int, divisors: np.ndarray | None
) -> dict[str, Any] | None:
    """Returns a rope scaling with these divisors: llama3 if it gives them, else longrope."""
    if divisors is None:
        return None
    llama3 = {
        "rope_type": "llama3",
        "factor": _decimal(float(divisors[-1])),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = file.metadata.get("llama.rope.freq_base", 10000.0)
    expected = llama3_divisors(theta, head_dim, llama3)
    if divisors[-1] >= 1 and np.allclose(divisors, expected, rtol=1e-5):
        return llama3
    values = [float(value) for value in divisors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": file.metadata.get("llama.context_length"),
    }


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Returns the divisors that llama.cpp's converter stores for rope type llama3."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    with np.errstate(over="ignore"):  # a theta that the config's own check refuses
        frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling["factor"])
