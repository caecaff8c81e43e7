"""Chooses the next token of each row from its logits, as Transformers' processors do.

Rows have settings of their own, so that requests of several people run in one batch.

Source: transformers `generation/logits_process.py`, and `_get_logits_processor` for the
order. "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) for top_p.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlora.config.sampling_config import SamplingConfig

# In the order in which they are applied.
STEPS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """`SamplingConfig` of every row, as arrays [B]; not typed so, as `KVCache`."""

    repetition_penalty: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any

    @classmethod
    def of(cls, rows: Sequence[SamplingConfig]) -> "Settings":
        """Returns the settings of these rows."""

        def column(name: str) -> np.ndarray:
            dtype = np.int32 if name == "top_k" else np.float32
            return np.array([getattr(row, name) for row in rows], dtype)

        return cls(**{name: jnp.asarray(column(name)) for name in STEPS})


def choose_tokens(
    logits: Float[Array, "B V"],
    settings: Settings,
    keys: Array,
    seen: Bool[Array, "B V"] | None,
    steps: frozenset[str],
) -> Int[Array, " B"]:
    """Returns a token for each row: the most likely one where its temperature is 0.

    Args:
        logits: of the next token.
        settings: of each row.
        keys: a random key for each row [B], of this token only.
        seen: which tokens occurred; None if no row has a penalty.
        steps: the settings that some row uses; the others are not computed.
    """
    scores = logits.astype(jnp.float32)
    for name, changed in process(scores, settings, seen, steps):
        if name == "repetition_penalty":
            logits = changed
        scores = changed
    likely = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if "temperature" not in steps:
        return likely
    drawn = jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    return jnp.where(settings.temperature == 0, likely, drawn)


def process(
    scores: Float[Array, "B V"],
    settings: Settings,
    seen: Bool[Array, "B V"] | None,
    steps: frozenset[str],
) -> Iterator[tuple[str, Float[Array, "B V"]]]:
    """Yields (step, float32 scores after it); left out tokens have minus infinity.

    Of tokens that are exactly as likely as the last one kept, top_p keeps all.
    """
    for name in STEPS:
        if name in steps:
            value = getattr(settings, name)[:, None]
            match name:
                case "repetition_penalty":
                    assert seen is not None
                    scores = jnp.where(seen, _penalised(scores, value), scores)
                case "temperature":
                    scores = scores / jnp.where(value == 0, 1, value)
                case "top_k":
                    scores = _keep(scores, scores >= _kth_largest(scores, value))
                case "top_p":
                    scores = _keep(scores, scores >= _least_of_top_p(scores, value))
                case "min_p":
                    likely = jax.nn.softmax(scores, axis=-1)
                    least = value * likely.max(-1, keepdims=True)
                    scores = _keep(scores, likely >= least)
            yield name, scores


def _penalised(scores: Array, penalty: Array) -> Array:
    return jnp.where(scores < 0, scores * penalty, scores / penalty)


def _keep(scores: Array, kept: Array) -> Array:
    return jnp.where(kept, scores, -jnp.inf)


def _kth_largest(scores: Array, k: Array) -> Array:
    """Returns each row's k-th largest score [B, 1]; its smallest for k = 0 or above V."""
    size = scores.shape[-1]
    place = jnp.where((k == 0) | (k > size), 0, size - k)
    return jnp.take_along_axis(jnp.sort(scores, axis=-1), place, axis=-1)


def _least_of_top_p(scores: Array, top_p: Array) -> Array:
    """Returns the smallest score [B, 1] that is kept, at least the largest of the row.

    The sum of all less likely tokens is above 1 - top_p.
    """
    ordered = jnp.sort(scores, axis=-1)
    total = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    is_kept = total > 1 - top_p
    is_kept = is_kept.at[:, -1].set(True)
    place = jnp.argmax(is_kept, axis=-1, keepdims=True)
    return jnp.take_along_axis(ordered, place, axis=-1)
