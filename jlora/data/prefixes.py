"""The ids of a text's beginnings, from the ids of the whole and of little more.

A control token splits a text before anything is merged, so that up to the last one in a
beginning, its ids are those of the whole; only what follows has to be encoded. Without
this, a conversation of k answers would be encoded about k times over.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from jlora.data.control import Encoded, Rendered
from jlora.data.tokenizer import Tokenizer


def encode_beginnings(
    beginnings: Mapping[Rendered, Rendered],
    wholes: Mapping[Rendered, Encoded],
    tokenizer: Tokenizer,
) -> dict[Rendered, Encoded]:
    """Returns the ids (no offsets) of each beginning; its value is the whole it is of.

    Wholes that are not in `wholes` give no help: their beginnings are encoded in full.
    """
    controls = {whole: _controls(whole, wholes, tokenizer) for whole in wholes}
    shared: dict[Rendered, list[int]] = {}
    rest: dict[Rendered, Rendered] = {}
    for text, whole in beginnings.items():
        shared[text], start = _shared(text, whole, controls.get(whole, []), wholes)
        rest[text] = Rendered(text.text[start:])
    unique = list(dict.fromkeys(rest.values()))
    tails = dict(zip(unique, tokenizer.encode_rendered(unique), strict=True))
    return {text: Encoded(shared[text] + tails[rest[text]].ids, []) for text in rest}


def _controls(
    whole: Rendered, wholes: Mapping[Rendered, Encoded], tokenizer: Tokenizer
) -> Sequence[tuple[int, int, int]]:
    """Returns (first character, character after, index of the id) of control tokens.

    Nothing where text and ids do not tell of the same ones.
    """
    ids, control_ids = wholes[whole].ids, tokenizer.control_ids
    found = list(tokenizer.control_pattern.finditer(whole.text))
    places = [i for i, index in enumerate(ids) if index in control_ids]
    if [tokenizer.token(ids[place]) for place in places] != [m[0] for m in found]:
        return []
    return [(m.start(), m.end(), i) for m, i in zip(found, places, strict=True)]


def _shared(
    text: Rendered,
    whole: Rendered,
    controls: Sequence[tuple[int, int, int]],
    wholes: Mapping[Rendered, Encoded],
) -> tuple[list[int], int]:
    """Returns the ids before the last control token in `text`, and where it starts."""
    count = bisect_right(controls, len(text.text), key=lambda control: control[1])
    if not count or not whole.text.startswith(text.text):
        return [], 0
    start, _, index = controls[count - 1]
    return wholes[whole].ids[:index], start
