"""How likely a model holds tokens that follow others, in batches of few shapes."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlora.loading import TextModel
from jlora.lora.adapter_tree import Params
from jlora.lora.embedding_and_head import head_logits, head_parameters
from jlora.model.llama import Llama
from jlora.serving.prompt_files import batches

# Rows are padded to one of few lengths, as each is compiled: 32, 48, 64, 96, 128, ...
_SHORTEST = 32


class Score(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float
    """Summed over its tokens, in nats; float32."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


def score(
    loaded: TextModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_size: int,
) -> list[Score]:
    """Returns the score of each continuation.

    Args:
        loaded: the model.
        pairs: (ids before, ids of the continuation), at least one of each, together at most
            one more than the model takes.
        batch_size: pairs at a time.

    Raises:
        UnsupportedError: more tokens than the model's attention window.
    """
    model, params, _ = loaded
    lengths = [len(before) + len(after) - 1 for before, after in pairs]
    scores = [Score(0.0, True)] * len(pairs)
    for chosen in batches(lengths, batch_size):
        length = padded_length(max(lengths[i] for i in chosen))
        length = max(min(length, model.config.longest), lengths[chosen[-1]])
        tokens = np.zeros((batch_size, length + 1), np.int32)
        counted = np.zeros((batch_size, length), bool)
        for row, i in enumerate(chosen):
            before, after = pairs[i]
            tokens[row, : lengths[i] + 1] = before + after
            counted[row, len(before) - 1 : lengths[i]] = True
        found = jax.device_get(
            _scores(model, params, tokens[:, :-1], tokens[:, 1:], counted)
        )
        for row, i in enumerate(chosen):
            scores[i] = Score(float(found[0][row]), bool(found[1][row]))
    return scores


def padded_length(length: int) -> int:
    """Returns the length that a row is padded to: a power of 2, or 1.5 times one."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@partial(jax.jit, static_argnums=0)
def _scores(
    model: Llama,
    params: Params,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    hidden = model.apply({"params": params}, tokens, method="hidden_states")
    head = head_parameters(params)

    def of_row(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        states, wanted, counts = row
        logits = head_logits(states, head, model.compute).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        found = chosen - jax.nn.logsumexp(logits, axis=-1)
        is_greedy = (jnp.argmax(logits, axis=-1) == wanted) | ~counts
        return jnp.sum(jnp.where(counts, found, 0)), jnp.all(is_greedy)

    # One row after the other: all logits would be a multiple of the model's memory.
    return jax.lax.map(of_row, (hidden, targets, counted))
