"""The ids of a text's beginnings, from the ids of the whole and of little more.

A control token splits a text before anything is merged, so that up to the last one in a
beginning, its ids are those of the whole; only what follows has to be encoded. Without
this, a conversation of k answers would be encoded about k times over.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jlora.data.chat.control_tokens import Encoded, Rendered
from jlora.data.tokenize.tokenizer import Tokenizer


def encode_beginnings(
    beginnings: Mapping[Rendered, Rendered],
    wholes: Mapping[Rendered, Encoded],
    tokenizer: Tokenizer,
) -> dict[Rendered, Encoded]:
    """Returns the ids of each beginning after those `shared` with the whole it is of.

    Wholes that are not in `wholes` give no help: their beginnings are encoded in full.
    No offsets.
    """
    places = {
        whole: _places(whole, encoded, tokenizer) for whole, encoded in wholes.items()
    }
    split: dict[Rendered, tuple[int, str]] = {}
    for text, whole in beginnings.items():
        index = start = 0
        if whole in places and whole.text.startswith(text.text):
            index, start = places[whole].last_before(len(text.text))
        split[text] = index, text.text[start:]
    unique = list(dict.fromkeys(rest for _, rest in split.values()))
    tails = dict(zip(unique, tokenizer.encode_many(unique), strict=True))
    return {
        text: Encoded(tails[rest], [], shared=index)
        for text, (index, rest) in split.items()
    }


@dataclass(frozen=True)
class _Places:
    """Where the control tokens of a text are."""

    starts: list[int]
    ends: list[int]
    """Characters: the first, and the one after the last."""
    indices: list[int]
    """Of the ids."""

    def last_before(self, length: int) -> tuple[int, int]:
        """Returns index and start of the last one in the first `length` characters.

        Both 0 where there is none.
        """
        count = bisect_right(self.ends, length)
        return (self.indices[count - 1], self.starts[count - 1]) if count else (0, 0)


def _places(whole: Rendered, encoded: Encoded, tokenizer: Tokenizer) -> _Places:
    """Returns nothing where text and ids do not tell of the same control tokens."""
    matches = list(tokenizer.control_pattern.finditer(whole.text))
    is_control = tokenizer.is_control.take(encoded.array, mode="clip")
    indices = np.flatnonzero(is_control).tolist()
    inside = [tokenizer.token(encoded.ids[index]) for index in indices]
    if inside != [match[0] for match in matches]:
        return _Places([], [], [])
    return _Places([m.start() for m in matches], [m.end() for m in matches], indices)
