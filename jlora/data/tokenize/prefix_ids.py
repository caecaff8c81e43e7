"""Encodes prefixes of a text that is encoded already, at little more cost.

The tokenizer splits a text at control tokens before it merges anything. So up to the last
control token of a prefix, its ids are those of the whole text, and only the rest has to
be encoded. Otherwise a conversation of k answers would be encoded about k times.
"""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

from jlora.data.chat.control_tokens import Encoded, Rendered
from jlora.data.tokenize.tokenizer import Tokenizer

# A control token of a text: index among its ids, first character, the one after the last.
_Control = tuple[int, int, int]


def encode_prefixes(
    prefixes: Mapping[Rendered, Rendered],
    wholes: Mapping[Rendered, Encoded],
    tokenizer: Tokenizer,
) -> dict[Rendered, Encoded]:
    """Returns the ids of each prefix of a whole text after the `shared` ones, no offsets.

    A prefix whose whole is not in `wholes` is encoded in full.
    """
    controls = {
        whole: _find_controls(whole, encoded, tokenizer)
        for whole, encoded in wholes.items()
    }
    split: dict[Rendered, tuple[int, str]] = {}
    for prefix, whole in prefixes.items():
        index = start = 0
        if whole in controls and whole.text.startswith(prefix.text):
            found = controls[whole]
            count = bisect_right(
                found, len(prefix.text), key=lambda control: control[2]
            )
            if count:
                index, start, _ = found[count - 1]
        split[prefix] = index, prefix.text[start:]
    unique = list(dict.fromkeys(rest for _, rest in split.values()))
    tails = dict(zip(unique, tokenizer.encode_many(unique), strict=True))
    return {
        prefix: Encoded(tails[rest], [], shared=index)
        for prefix, (index, rest) in split.items()
    }


def _find_controls(
    whole: Rendered, encoded: Encoded, tokenizer: Tokenizer
) -> list[_Control]:
    """Returns the control tokens of a text, or none if text and ids disagree on them."""
    matches = list(tokenizer.control_pattern.finditer(whole.text))
    is_control = tokenizer.is_control.take(encoded.array, mode="clip")
    indices = np.flatnonzero(is_control).tolist()
    inside = [tokenizer.token(encoded.ids[index]) for index in indices]
    if inside != [match[0] for match in matches]:
        return []
    return [(i, *match.span()) for i, match in zip(indices, matches, strict=True)]
