"""Rotary position embedding: frequencies per rope type, and their application.

Frequencies are computed in NumPy, so they are the same constants on every platform; angles,
cos and sin are float32. As in HF, the pairs that turn together are (x_j, x_{j + H/2}).

Source: "RoFormer" (Su et al., 2021); transformers `modeling_rope_utils`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.config.llama_config import LlamaConfig
from jlora.config.rope_config import RopeParameters


def rope_frequencies(config: LlamaConfig, length: int) -> np.ndarray:
    """Returns the angle in radians by which each pair turns per position, float32 [H/2].

    Args:
        config: the model.
        length: largest position + 1; dynamic and longrope depend on it.

    Source: transformers `modeling_rope_utils`, whose float32 arithmetic is followed.
    """
    rope, dim = config.rope_parameters, config.head_dim
    theta = np.float64(rope.rope_theta)
    if rope.rope_type == "dynamic":
        # factor * stretch - (factor - 1), which is exactly 1 without stretch.
        stretch = max(length / config.max_position_embeddings, 1.0)
        theta *= (1 + rope.factor * (stretch - 1)) ** (dim / (dim - 2))
    power = _powers(theta, dim)
    with np.errstate(over="ignore"):  # a pair whose power is infinite never turns
        match rope.rope_type:
            case "linear":
                return 1 / power / np.float32(rope.factor)
            case "llama3":
                return _llama3_frequencies(1 / power, rope)
            case "yarn":
                return _yarn_frequencies(power, rope)
            case "longrope":
                is_long = length > rope.original_max_position_embeddings
                scales = rope.long_factor if is_long else rope.short_factor
                return 1 / (np.array(scales, np.float32) * power)
            case _:
                return 1 / power


def _powers(theta: np.float64, dim: int) -> np.ndarray:
    """Returns theta ** (2j / dim), float32 [dim/2].

    float32(theta ** e) with a float32 exponent e follows HF's arithmetic most closely:
    one unit in the last place here is 5e-4 in cos at position 8192.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    with np.errstate(over="ignore"):
        return (theta ** exponent.astype(np.float64)).astype(np.float32)


def _llama3_frequencies(frequencies: np.ndarray, rope: RopeParameters) -> np.ndarray:
    """Divides low frequencies by `factor`, leaves high ones, and blends in between."""
    turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    weight = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    scale = weight + (1 - weight) / np.float32(rope.factor)
    return (frequencies * scale).astype(np.float32)


def _yarn_frequencies(power: np.ndarray, rope: RopeParameters) -> np.ndarray:
    """Divides low frequencies by `factor`, leaves high ones, and blends by the index.

    Source: "YaRN" (Peng et al., 2023), section 3.2.
    """
    dim, original = 2 * len(power), rope.original_max_position_embeddings

    def index_of(turns: float) -> float:
        """Returns the index of the pair that turns so often in the original context."""
        log_period = math.log(original / (turns * 2 * math.pi))
        return dim * log_period / (2 * math.log(rope.rope_theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(
        high - low
    )
    weight = 1 - np.clip(ramp, 0, 1)
    divided = 1 / (np.float32(rope.factor) * power)
    return divided * (1 - weight) + (1 / power) * weight


def rope_angles(
    config: LlamaConfig, positions: Int[Array, "B T"], length: int, platform: str
) -> tuple[Float[Array, "B T 1 H_half"], Float[Array, "B T 1 H_half"]]:
    """Returns cos and sin of every position's angles, float32, times attention_factor.

    `length`: see `rope_frequencies`.
    """
    frequencies = jnp.asarray(rope_frequencies(config, length))
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    factor = jnp.float32(config.rope_parameters.attention_factor)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return (
        (_computed_once(cos), _computed_once(sin)) if platform == "cpu" else (cos, sin)
    )


def _computed_once(x: Array) -> Array:
    """Returns x as a product with the identity, which XLA on a CPU does not repeat.

    It would compute cos and sin again for every head of every layer, and it removes
    barriers before it decides so.
    """
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)


def apply_rope(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T 1 H_half"],
    sin: Float[Array, "B T 1 H_half"],
) -> Float[Array, "B T N H"]:
    """Returns x with each pair turned by its angle; computed in float32, x's dtype out."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)
