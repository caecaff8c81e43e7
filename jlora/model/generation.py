"""Text from a model: one token at a time through a key-value cache."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import Params
from jlora.model.kv_cache import KVCache
from jlora.model.llama import Llama

# Prompts are padded to a multiple of this, so that few lengths are ever compiled.
PROMPT_MULTIPLE = 64
NEW_TOKENS = 256


@runtime_checkable
class TextTokenizer(Protocol):
    """What `generate` needs of `jlora.data.Tokenizer`."""

    stop_ids: frozenset[int]

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Returns the ids of plain text."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """Returns the ids of a conversation in the model's chat template."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        ...


def generate(
    model: Llama,
    params: Params,
    tokenizer: TextTokenizer,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Returns the text that continues a prompt, or the answer to a conversation.

    Args:
        model: as `jlora.load` returns it, as are `params` and `tokenizer`.
        params: of the model, with or without an adapter.
        tokenizer: of the model.
        prompt: text to continue, or messages such as
            [{"role": "user", "content": "Hello"}].
        max_new_tokens: None: 256, or as many as the model has room for.
        temperature: 0 takes the most likely token; higher is more random.
        seed: of the sampling.

    Raises:
        UsageError: the prompt is empty or too long.
        UnsupportedError: it is longer than the model's attention window.
    """
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, add_bos=True)
    else:
        tokens = tokenizer.encode_chat(prompt, add_generation_prompt=True)
    if max_new_tokens is None:
        room = model.config.longest - len(tokens)
        max_new_tokens = max(1, min(NEW_TOKENS, room))
    new = generate_tokens(
        model,
        params,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        temperature=temperature,
        seed=seed,
    )
    return tokenizer.decode(list(new))


@partial(jax.jit, static_argnames=("model", "greedy"), donate_argnames="cache")
def _next_token(
    model: Llama,
    params: Params,
    tokens: Array,
    cache: KVCache,
    count: Array,
    key: Array,
    temperature: Array,
    *,
    greedy: bool,
) -> tuple[Array, KVCache]:
    logits, cache = model.apply(  # type: ignore[misc]
        {"params": params}, tokens, cache, count, method="decode"
    )
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32), cache


def generate_tokens(
    model: Llama,
    params: Params,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` token ids that follow the prompt.

    Stops before a stop id, which is not yielded. Temperature 0 takes the most likely
    token; above 0, token t is drawn with a key that follows from (seed, t).

    Raises:
        UsageError: no prompt, or more positions than the model was made for.
        UnsupportedError: more tokens than its attention window.
    """
    limit = model.config.max_position_embeddings
    if not prompt:
        raise UsageError("the prompt is empty; give at least one token")
    needed = len(prompt) + max_new_tokens
    if needed > limit:
        room = limit - len(prompt)
        hint = f"give at most max_new_tokens={room}" if room > 0 else "shorten it"
        raise UsageError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens={max_new_tokens} "
            f"exceed the model's max_position_embeddings={limit}; {hint}"
        )
    model.config.check_length(needed, "prompt + max_new_tokens")
    size = _cache_size(model.config, needed)
    padded = min(_round_up(len(prompt)), size)
    cache = KVCache.empty(model.config, 1, size, model.dtype)
    tokens = np.zeros((1, padded), np.int32)
    tokens[0, : len(prompt)] = prompt
    count = len(prompt)
    key = jax.random.key(seed)
    for i in range(max_new_tokens):
        new, cache = _next_token(
            model,
            params,
            jnp.asarray(tokens),
            cache,
            jnp.int32(count),
            jax.random.fold_in(key, i),
            jnp.float32(temperature),
            greedy=temperature == 0,
        )
        token = int(new[0])
        if token in stop_ids:
            return
        yield token
        tokens, count = np.asarray(new)[:, None], 1


def _cache_size(config: LlamaConfig, needed: int) -> int:
    """Returns `needed` rounded up, not past a length where rotary angles change."""
    original = config.rope_parameters.original_max_position_embeddings
    limits = (original, config.max_position_embeddings)
    return min(_round_up(needed), *(limit for limit in limits if needed <= limit))


def _round_up(count: int) -> int:
    return -(-count // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
