"""Llama and its loss in plain NumPy, float64, with loops over heads and positions.

Shares no code with the package: it reads the dictionary of a config.json and weights
under HF's names in HF's layout ([out, in]), so that a mistake in the package's names,
transposes or formulas cannot hide here, too.

Source: "Llama 2" (Touvron et al., 2023), section 2; transformers `modeling_llama.py`.
"""

import math
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
# HF module name -> (A [in, R], B [R, out], scaling).
Adapters = dict[str, tuple[np.ndarray, np.ndarray, float]]


def forward(
    config: dict[str, Any],
    weights: Weights,
    tokens: np.ndarray,
    adapters: Adapters | None = None,
) -> np.ndarray:
    """Returns the logits [B, T, V] of int tokens [B, T], float64."""
    wide = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    rows = [_row(config, wide, row, adapters or {}) for row in np.asarray(tokens)]
    return np.stack(rows)


def loss(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    """Returns the mean of -log softmax(logits)[target] over the positions with mask 1."""
    total = count = 0.0
    for b, t in np.argwhere(mask):
        row = logits[b, t]
        highest = row.max()
        log_sum = highest + math.log(np.exp(row - highest).sum())
        total += mask[b, t] * (log_sum - row[targets[b, t]])
        count += mask[b, t]
    return float(total / count)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """Returns x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rope_frequencies(config: dict[str, Any], length: int = 0) -> np.ndarray:
    """Returns the angle per position of each pair of a head, radians [H/2]."""
    rope, dim = config["rope_parameters"], _head_dim(config)
    theta, most = rope["rope_theta"], config["max_position_embeddings"]
    kind, factor = rope["rope_type"], rope.get("factor")
    original = rope.get("original_max_position_embeddings") or most
    if kind == "dynamic":
        stretch = factor * max(length, most) / most - (factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    result = np.empty(dim // 2)
    for j in range(dim // 2):
        frequency = theta ** (-2 * j / dim)
        if kind == "llama3":
            frequency = _llama3(frequency, rope)
        elif kind == "linear":
            frequency /= factor
        elif kind == "longrope":
            which = "long_factor" if length > original else "short_factor"
            frequency /= rope[which][j]
        elif kind == "yarn":
            divided = _yarn_share(j, dim, theta, original, rope)
            frequency *= (1 - divided) + divided / (factor or most / original)
        result[j] = frequency
    return result


def rope_scale(config: dict[str, Any]) -> float:
    """Returns what cos and sin are multiplied by."""
    rope, most = config["rope_parameters"], config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or most
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = rope.get("factor") or most / original
    if factor <= 1 or rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if rope["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    above, below = rope.get("mscale") or 0, rope.get("mscale_all_dim") or 0
    if not (above and below):
        above, below = 1, 0
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def _yarn_share(j: int, dim: int, theta: float, original: int, rope: Any) -> float:
    """Returns how much of pair j is divided by the factor, from 0 to 1."""
    edges = []
    for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1):
        wavelength = original / turns
        edges.append(dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(theta))
    if rope.get("truncate", True):
        edges = [math.floor(edges[0]), math.ceil(edges[1])]
    low, high = max(edges[0], 0), min(edges[1], dim - 1)
    if low == high:
        high += 0.001
    return min(max((j - low) / (high - low), 0), 1)


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequency
    if wavelength < original / rope["high_freq_factor"]:
        return frequency
    if wavelength > original / rope["low_freq_factor"]:
        return frequency / rope["factor"]
    share = (original / wavelength - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    return (1 - share) * frequency / rope["factor"] + share * frequency


def _head_dim(config: dict[str, Any]) -> int:
    return (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )


def _row(
    config: dict[str, Any], weights: Weights, tokens: np.ndarray, adapters: Adapters
) -> np.ndarray:
    def linear(module: str, x: np.ndarray) -> np.ndarray:
        y = x @ weights[f"{module}.weight"].T
        if f"{module}.bias" in weights:
            y = y + weights[f"{module}.bias"]
        if module in adapters:
            a, b, scaling = adapters[module]
            y = y + scaling * ((x @ a.astype(np.float64)) @ b.astype(np.float64))
        return y

    def norm(module: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, weights[f"{module}.weight"], config["rms_norm_eps"])

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(f"{layer}.input_layernorm", x)
        q, k, v = (linear(f"{layer}.self_attn.{p}_proj", h) for p in "qkv")
        x = x + linear(f"{layer}.self_attn.o_proj", _attention(config, q, k, v))
        h = norm(f"{layer}.post_attention_layernorm", x)
        gate = linear(f"{layer}.mlp.gate_proj", h)
        gate = gate / (1 + np.exp(-gate))
        x = x + linear(
            f"{layer}.mlp.down_proj", gate * linear(f"{layer}.mlp.up_proj", h)
        )
    x = norm("model.norm", x)
    if config.get("tie_word_embeddings"):
        return x @ weights["model.embed_tokens.weight"].T
    return linear("lm_head", x)


def _attention(
    config: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Returns the heads' outputs side by side, [T, N*H]."""
    dim = _head_dim(config)
    heads = config["num_attention_heads"]
    group = heads // config["num_key_value_heads"]
    frequencies, scale = rope_frequencies(config, len(q)), rope_scale(config)
    outputs = []
    for n in range(heads):
        kv = n // group
        query = scale * _rotate(q[:, n * dim : (n + 1) * dim], frequencies)
        key = scale * _rotate(k[:, kv * dim : (kv + 1) * dim], frequencies)
        value = v[:, kv * dim : (kv + 1) * dim]
        out = np.empty_like(query)
        for t in range(len(query)):
            scores = key[: t + 1] @ query[t] / math.sqrt(dim)
            shares = np.exp(scores - scores.max())
            out[t] = shares @ value[: t + 1] / shares.sum()
        outputs.append(out)
    return np.concatenate(outputs, axis=-1)


def _rotate(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Returns x [T, H], the pair (x_j, x_{j + H/2}) at t turned by t * frequency_j."""
    half = len(frequencies)
    out = np.empty_like(x)
    for t in range(len(x)):
        cos, sin = np.cos(t * frequencies), np.sin(t * frequencies)
        first, second = x[t, :half], x[t, half:]
        out[t, :half] = first * cos - second * sin
        out[t, half:] = first * sin + second * cos
    return out
