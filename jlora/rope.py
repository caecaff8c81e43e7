"""Rotary position embedding: frequencies per rope type, and their application.

Tables are built in NumPy, so they are the same constants on every backend; angles, cos
and sin are float32. The layout is HF's: pairs are (x_j, x_{j + H/2}).

Source: "RoFormer" (Su et al., 2021); transformers `modeling_rope_utils`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.config import LlamaConfig, RopeParameters


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Returns the angle per position of each pair, radians, float32 [H/2].

    float32(theta ** e) with a float32 exponent e follows HF's arithmetic most closely:
    one unit in the last place here is 5e-4 in cos at position 8192.
    """
    rope, dim = config.rope_parameters, config.head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.float64(rope.rope_theta) ** exponent.astype(np.float64)
    frequencies = np.float32(1) / power.astype(np.float32)
    return _llama3(frequencies, rope) if rope.rope_type == "llama3" else frequencies


def _llama3(frequencies: np.ndarray, rope: RopeParameters) -> np.ndarray:
    """Divides long wavelengths by `factor`, keeps short ones, blends between.

    Source: transformers `_compute_llama3_parameters`.
    """
    turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (frequencies * (keep + (1 - keep) / np.float32(rope.factor))).astype(
        np.float32
    )


def rope_angles(
    config: LlamaConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 H_half"], Float[Array, "B T 1 H_half"]]:
    """Returns (cos, sin) of every position's angles, float32."""
    frequencies = jnp.asarray(rope_frequencies(config))
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


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
