"""The tokens of one or several prompts, some steps at a time, and when each has ended."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import Params
from jlora.model.decoding.engine import Row, advance, cache_size, start, steps_of
from jlora.model.decoding.kv_cache import KVCache
from jlora.model.llama import Llama

# Steps in one call. A GPU computes the next ones while the host looks at the last; on a
# CPU a step takes longer than a call, and a step too many costs more.
STEPS_AT_ONCE = {"cpu": 1, "gpu": 16, "tpu": 16}


def sample_key(seed: int, prompt: int = 0, sample: int = 0) -> Any:
    """Returns the random key of one of several samples of one of several prompts."""
    key = jax.random.fold_in(jax.random.key(seed), prompt)
    return jax.random.fold_in(key, sample)


@dataclass
class KeptCache:
    """The cache of the last text, for a next one that begins like it, as a chat does.

    `least`: tokens for which it has room, so that few sizes are ever compiled.
    """

    least: int = 2048
    ids: list[int] = field(default_factory=list)
    cache: KVCache | None = None

    def take(self, prompt: list[int], size: int) -> tuple[KVCache | None, int]:
        """Returns the cache, and how many tokens of the prompt it begins with."""
        cache, self.cache = self.cache, None
        pairs = zip(self.ids, prompt[:-1], strict=False)
        known = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        )
        if cache is None or cache.size != size or not known:
            return None, 0
        return cache, known


class Generation:
    """The tokens of several prompts, generated together. To be iterated over once.

    Each item holds every row's new tokens, without the stop id that ends it. The next
    steps are already being computed while an item is looked at.
    """

    def __init__(
        self,
        model: Llama,
        params: Params,
        rows: Sequence[Row],
        max_new_tokens: Sequence[int],
        stop_ids: frozenset[int] = frozenset(),
        kept: KeptCache | None = None,
    ) -> None:
        """Checks the lengths.

        Args:
            model: its remat is not used.
            params: of the model.
            rows: the prompts, and how to continue each.
            max_new_tokens: of each row.
            stop_ids: end a row.
            kept: of an earlier text; then of this one. For one row without a penalty.

        Raises:
            UsageError: an empty prompt, or more positions than the model was made for.
        """
        for row, count in zip(rows, max_new_tokens, strict=True):
            check_room(model.config, len(row.prompt), count)
        self._model = model.clone(remat="none")
        self._params, self._rows = params, rows
        self._left = list(max_new_tokens)
        self._stop_ids, self._kept = stop_ids, kept

    def end(self, row: int) -> None:
        """Ends a row, of which nothing more is wanted."""
        self._left[row] = 0

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Yields every row's new tokens until all rows have ended."""
        lengths = zip(self._rows, self._left, strict=True)
        needed = max(len(row.prompt) + count for row, count in lengths)
        steps, most = steps_of(self._rows), max(self._left)
        config, cache, known = self._model.config, None, 0
        size = cache_size(config, needed)
        if self._kept is not None:
            size = cache_size(config, needed, self._kept.least)
            if "repetition_penalty" not in steps:
                cache, known = self._kept.take(self._rows[0].prompt, size)
        state: Any = start(
            self._model,
            self._params,
            self._rows,
            size=size,
            steps=steps,
            kept=cache,
            known=known,
        )
        count = STEPS_AT_ONCE[self._model.platform]
        # A copy, because the state is given away before it is read.
        text = list(self._rows[0].prompt)
        begun, waiting = 1, jax.numpy.array(state.tokens)[None]
        while True:
            following: Any = None
            if begun < most:
                if self._kept is not None:
                    self._kept.cache = None  # used up
                state, following = advance(
                    self._model, self._params, state, steps=steps, count=count
                )
                begun += count
            new = self._take(np.asarray(waiting))
            text += new[0]
            if self._kept is not None:
                # All but the newest are in the cache, and perhaps later ones.
                self._kept.ids, self._kept.cache = text[:-1], state.cache
            yield new
            if following is None or not any(self._left):
                return
            waiting = following

    def _take(self, tokens: np.ndarray) -> list[list[int]]:
        """Returns what of the tokens [steps, B] belongs to each row."""
        taken: list[list[int]] = []
        for row, column in enumerate(tokens.T.tolist()):
            new = column[: self._left[row]]
            self._left[row] -= len(new)
            ends = [i for i, token in enumerate(new) if token in self._stop_ids]
            if ends:
                new, self._left[row] = new[: ends[0]], 0
            taken.append(new)
        return taken


def check_room(config: LlamaConfig, length: int, max_new_tokens: int) -> None:
    """Checks that a model has room for a prompt and what follows it.

    Raises:
        UsageError: the prompt is empty, or the model has too few positions.
        UnsupportedError: more tokens than its attention window.
    """
    limit = config.max_position_embeddings
    if not length:
        raise UsageError("the prompt is empty; give at least one token")
    if length + max_new_tokens > limit:
        room = limit - length
        hint = f"give at most max_new_tokens={room}" if room > 0 else "shorten it"
        raise UsageError(
            f"the prompt's {length} tokens and max_new_tokens={max_new_tokens} "
            f"exceed the model's max_position_embeddings={limit}; {hint}"
        )
    config.check_length(length + max_new_tokens, "prompt + max_new_tokens")
