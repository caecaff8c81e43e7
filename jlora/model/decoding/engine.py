"""Prompts and steps of generation, as compiled functions that never wait for the host.

`start` reads the prompts and chooses each row's first token; `advance` computes several steps
in one call, in which the weights are read once a step and the cache is changed in place.
Programs depend on the shapes and on which settings are used, not on their values, so a
later start finds them compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jlora.config.llama_config import LlamaConfig
from jlora.config.sampling_config import SamplingConfig
from jlora.lora.adapter_tree import Params
from jlora.model.decoding.kv_cache import KVCache
from jlora.model.decoding.sampling import Settings, choose_tokens
from jlora.model.llama import Llama
from jlora.ops.quantize import QUANTIZED_LEAVES

# Lengths are rounded up to a multiple of this, so that few are ever compiled.
_MULTIPLE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where each row's text is, and how it goes on. B rows; typed as `KVCache` is."""

    cache: KVCache
    tokens: Any
    """Int [B]: the newest token, which is not in the cache yet."""
    numbers: Any
    """Int [B]: how many tokens were chosen."""
    keys: Any
    """A random key for each row; token t is drawn with fold_in(key, t)."""
    settings: Settings
    seen: Any
    """Bool [B, V]: the tokens of prompt and text; None if no row has a penalty."""


@dataclass(frozen=True)
class Row:
    """One prompt and how to continue it."""

    prompt: list[int]
    sampling: SamplingConfig
    key: Any
    """A random key of `jax.random.key`."""


def steps_of(rows: Sequence[Row]) -> frozenset[str]:
    """Returns the settings that some row uses."""
    return frozenset().union(*(row.sampling.steps for row in rows))


def start(
    model: Llama,
    params: Params,
    rows: Sequence[Row],
    *,
    size: int,
    steps: frozenset[str],
    kept: KVCache | None = None,
    known: int = 0,
) -> DecodeState:
    """Returns the state after the prompts, with the first token of each row chosen.

    Args:
        model: without remat.
        params: of the model.
        rows: at least one prompt, none of them empty.
        size: tokens that the cache has room for, at least those of each prompt.
        steps: settings to be ready for, at least `steps_of(rows)`.
        kept: the cache of an earlier text of one row, which is used up; None: a new one.
        known: how many tokens of the prompt `kept` begins with, fewer than all.
    """
    counts = np.array([len(row.prompt) - known for row in rows], np.int32)
    longest = min(rounded_up(int(counts.max())), size - known)
    tokens = np.zeros((len(rows), longest), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row.prompt) - known] = row.prompt[known:]
    if kept is not None:
        kept = replace(kept, length=jnp.full(1, known, jnp.int32))
    return _start(
        model,
        params,
        tokens,
        counts,
        Settings.of([row.sampling for row in rows]),
        jnp.stack([row.key for row in rows]),
        kept,
        size=size,
        steps=steps,
    )


@partial(jax.jit, static_argnames=("model", "size", "steps"), donate_argnames="kept")
def _start(
    model: Llama,
    params: Params,
    tokens: Array,
    counts: Array,
    settings: Settings,
    keys: Array,
    kept: KVCache | None,
    *,
    size: int,
    steps: frozenset[str],
) -> DecodeState:
    rows = len(counts)
    cache = kept or KVCache.empty(model.config, rows, size, model.dtype)
    logits, cache = _decode(
        model, params, tokens, cache, counts, is_prompt=kept is None
    )
    seen = None
    if "repetition_penalty" in steps:
        is_text = jnp.arange(tokens.shape[1]) < counts[:, None]
        # An id outside the vocabulary is dropped.
        place = jnp.where(is_text, tokens, model.config.vocab_size)
        seen = jnp.zeros((rows, logits.shape[-1]), bool)
        seen = seen.at[jnp.arange(rows)[:, None], place].set(True, mode="drop")
    numbers = jnp.zeros(rows, jnp.int32)
    state = DecodeState(cache, counts, numbers, keys, settings, seen)
    return _chosen(state, logits, cache, steps)


@partial(jax.jit, static_argnames=("model", "steps", "count"), donate_argnames="state")
def advance(
    model: Llama,
    params: Params,
    state: DecodeState,
    *,
    steps: frozenset[str],
    count: int,
) -> tuple[DecodeState, Int[Array, "count B"]]:
    """Returns the state `count` steps later, and the tokens of these steps.

    The state that is given is used up. Rows that have ended, or whose cache is full, go
    on with tokens that mean nothing.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        # Otherwise XLA might dequantise all weights before the loop, and keep them.
        own = _tied(params, state.tokens) if _is_quantized(params) else params
        logits, cache = _decode(
            model,
            own,
            _columns(state.tokens, model.platform),
            state.cache,
            jnp.ones_like(state.tokens),
        )
        state = _chosen(state, logits, cache, steps)
        return state, state.tokens

    return jax.lax.scan(step, state, length=count)


def _columns(tokens: Int[Array, " B"], platform: str) -> Int[Array, "B T"]:
    """Returns the tokens of a step as the model takes them.

    A single one has padding after it on a GPU, because for one row XLA turns the smaller
    products into sums over copies of the weights. What the padding writes into the cache,
    the next step overwrites.
    """
    alone = platform == "gpu" and len(tokens) == 1
    return jnp.repeat(tokens[:, None], 2 if alone else 1, axis=1)


def _decode(model: Llama, params: Params, *args: Any, **options: Any) -> Any:
    return model.apply({"params": params}, *args, **options, method="decode")


def _chosen(
    state: DecodeState, logits: Array, cache: KVCache, steps: frozenset[str]
) -> DecodeState:
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.numbers)
    tokens = choose_tokens(logits, state.settings, keys, state.seen, steps)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    numbers = state.numbers + 1
    return replace(state, cache=cache, tokens=tokens, numbers=numbers, seen=seen)


def _is_quantized(params: Params) -> bool:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return any(path[-1].key in QUANTIZED_LEAVES for path, _ in paths)


def _tied(params: Params, tokens: Array) -> Params:
    return jax.lax.optimization_barrier((params, tokens))[0]


def cache_size(config: LlamaConfig, needed: int, least: int = 0) -> int:
    """Returns `needed` rounded up, not past a length where rotary angles change.

    At least `least`, if that length is not passed by it.
    """
    original = config.rope_parameters.original_max_position_embeddings
    limits = (original, config.longest)
    allowed = [limit for limit in limits if needed <= limit]
    return min(rounded_up(max(needed, least)), *allowed)


def rounded_up(count: int) -> int:
    """Returns a length of at least `count`, at most a quarter or 63 tokens longer."""
    step = max(_MULTIPLE, 2 ** (max(count - 1, 1).bit_length() - 3))
    return -(-count // step) * step
