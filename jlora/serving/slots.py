"""Continuous batching: requests come and go while the others' texts go on.

A batch has a few slots, each a row of the cache. A thread puts waiting requests into free
slots, advances all rows by some steps, and hands every request its new text. The next steps
already run while the text of the last ones is made.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config.sampling_config import SamplingConfig
from jlora.loading import TextModel
from jlora.lora.adapter_tree import Params
from jlora.model.decoding.engine import DecodeState, Row, advance, start
from jlora.model.decoding.kv_cache import KVCache
from jlora.model.decoding.sampling import STEPS, Settings
from jlora.model.decoding.text_stream import TextStream
from jlora.model.decoding.token_rows import STEPS_AT_ONCE, sample_key
from jlora.model.llama import Llama
from jlora.serving.adapter_rows import Stacked, with_rows

# A request that samples and a greedy one share a program; without any of the first,
# logits are not sorted.
_ALL_STEPS = frozenset(STEPS)


@dataclass
class Request:
    """A prompt, how to continue it, and who wants the text."""

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingConfig
    key: Any
    adapter: int
    """Number of the adapter; 0: none."""
    stream: TextStream
    receive: Callable[[str, str | None], None]
    """Called by the thread with new text, and at the end with "stop" or "length"."""
    tokens: int = 0
    is_ended: bool = field(default=False)


class Slots:
    """The thread and the batch that it advances."""

    def __init__(
        self,
        loaded: TextModel,
        stacked: dict[str, Stacked],
        *,
        count: int,
        size: int,
        failed: Callable[[BaseException], None],
    ) -> None:
        """Makes an empty batch.

        Args:
            loaded: the base.
            stacked: its adapters.
            count: number of slots.
            size: tokens of the longest text, with its prompt.
            failed: called by the thread with what ends it, if that is not `close`.
        """
        model, self._params, tokenizer = loaded
        self._model, self._stacked = model.clone(remat="none"), stacked
        self._stop_ids, self._size, self._failed = tokenizer.stop_ids, size, failed
        self._state = _empty(self._model, count, size)
        self._numbers = np.zeros(count, np.int32)
        self._slots: list[Request | None] = [None] * count
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Slots":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def add(self, request: Request) -> None:
        """Lets a request begin as soon as a slot is free."""
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._failed(error)

    def _serve(self) -> None:
        computed: Any = None
        while True:
            with self._changed:
                while not (computed or self._waiting or any(self._slots)):
                    if self._is_closed:
                        return
                    self._changed.wait()
                if self._is_closed:
                    return
            self._begin_waiting()
            following: Any = None
            if any(self._slots):
                following = self._advance(), list(self._slots)
            if computed:
                self._hand_out(*computed)
            computed = following

    def _begin_waiting(self) -> None:
        """Puts waiting requests into free slots; each gets its first token at once."""
        for slot, owner in enumerate(self._slots):
            while owner is None and self._waiting:
                request = self._waiting.popleft()
                if request.is_ended:
                    continue
                row = Row(request.prompt, request.sampling, request.key)
                number = jnp.array([request.adapter])
                params = with_rows(self._params, self._stacked, number)
                state = start(
                    self._model, params, [row], size=self._size, steps=_ALL_STEPS
                )
                first = int(np.asarray(state.tokens)[0])
                self._take(request, first)
                if not request.is_ended:
                    self._state = _insert(self._state, state, slot)
                    self._slots[slot], self._numbers[slot] = request, request.adapter
                    break

    def _advance(self) -> Any:
        sampled = any(r is not None and r.sampling.steps for r in self._slots)
        self._state, tokens = _advance_slots(
            self._model,
            self._params,
            self._stacked,
            jnp.array(self._numbers),
            self._state,
            steps=_ALL_STEPS if sampled else frozenset(),
            count=STEPS_AT_ONCE[self._model.platform],
        )
        return tokens

    def _hand_out(self, tokens: Any, owners: Sequence[Request | None]) -> None:
        """Gives the tokens [steps, B] to whose they were when they were computed."""
        for column, owner in zip(np.asarray(tokens).T.tolist(), owners, strict=True):
            for token in column:
                if owner is not None and not owner.is_ended:
                    self._take(owner, token)
        for slot, owner in enumerate(self._slots):
            if owner is not None and owner.is_ended:
                self._slots[slot] = None

    def _take(self, request: Request, token: int) -> None:
        """Gives a request its next token, and ends it if that is its last."""
        reason = None
        if token in self._stop_ids:
            text, reason = "", "stop"
        else:
            request.tokens += 1
            text = request.stream.add(token)
            if request.stream.is_stopped:
                reason = "stop"
            elif request.tokens == request.max_new_tokens:
                reason = "length"
        if reason:
            request.is_ended = True
            text += request.stream.end()
        if text or reason:
            request.receive(text, reason)


def _empty(model: Llama, count: int, size: int) -> DecodeState:
    zeros = jnp.zeros(count, jnp.int32)
    return DecodeState(
        cache=KVCache.empty(model.config, count, size, model.dtype),
        tokens=zeros,
        numbers=zeros + 0,
        keys=jnp.stack([sample_key(0)] * count),
        settings=Settings.of([SamplingConfig()] * count),
        seen=jnp.zeros((count, model.config.vocab_size), bool),
    )


@partial(jax.jit, donate_argnames="state")
def _insert(state: DecodeState, row: DecodeState, slot: Any) -> DecodeState:
    """Returns the batch with one row replaced."""

    def set_row(old: Any, new: Any) -> Any:
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jnp.where(jnp.arange(len(old)) == slot, new, old)
        begin = slot * len(new)
        return jax.lax.dynamic_update_slice_in_dim(old, new, begin, axis=0)

    return jax.tree.map(set_row, state, row)


@partial(jax.jit, static_argnames=("model", "steps", "count"), donate_argnames="state")
def _advance_slots(
    model: Llama,
    params: Params,
    stacked: dict[str, Stacked],
    numbers: Any,
    state: DecodeState,
    *,
    steps: frozenset[str],
    count: int,
) -> Any:
    params = with_rows(params, stacked, numbers)
    # A free slot writes into its cache at its end again and again.
    size = state.cache.size
    cache = replace(state.cache, length=jnp.minimum(state.cache.length, size - 1))
    state = replace(state, cache=cache)
    return advance(model, params, state, steps=steps, count=count)
