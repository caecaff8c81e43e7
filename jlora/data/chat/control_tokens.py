"""Control strings in data stay text: `<|im_end|>` typed by a user never ends a turn.

Before a template runs, control strings in its input are wrapped in marks; afterwards
the marks say which control tokens of the rendered text are the template's own. The
marks are lone surrogates, which no valid text contains.
"""

import json
import re
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from jlora.data.read.jsonl import RowError

OPEN_GENERATION, CLOSE_GENERATION = "\udc03", "\udc04"
_START, _END = "\udc01", "\udc02"
_MARKS = re.compile("([\udc01-\udc04])")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Noncharacters, reserved for use inside a program.
_GUARD = "\ufdd0\ufdd1\ufdd0"

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as text, with character spans of what came from where.

    Each is equal to itself alone, so that looking one up does not read its text.
    """

    text: str
    generated: tuple[Span, ...] = ()
    """The contents of the template's generation blocks."""
    data: tuple[Span, ...] = ()
    """Control strings that came from the data."""
    cuts: tuple[int, ...] = ()
    """Borders that no control token may cross: where a mark was removed."""


@dataclass(frozen=True)
class Encoded:
    """Token ids and, where asked for, the characters each came from."""

    ids: list[int]
    offsets: list[Span]
    shared: int = 0
    """Ids before these, left out because they are the first ones of the whole text."""

    @cached_property
    def array(self) -> np.ndarray:
        """The ids, int32 [n]."""
        return np.array(self.ids, np.int32)


def check_text(text: str) -> None:
    """Raises RowError if the text cannot be written as UTF-8."""
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise RowError(
            f"lone surrogate \\u{ord(found[0]):04x} at character {found.start() + 1}; "
            "not valid text"
        )


def control_pattern(controls: Set[str]) -> re.Pattern[str]:
    """Returns a pattern that finds any control string, the longest first."""
    longest_first = sorted(controls, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """Returns a fresh copy of plain JSON data with marks around control strings."""
    if isinstance(value, str):
        check_text(value)
        # Searched first, as `sub` takes a while to begin and most texts hold none.
        found = pattern.search(value)
        return pattern.sub(f"{_START}\\g<0>{_END}", value) if found else value
    if isinstance(value, dict):
        return {str(key): mark(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, pattern) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise RowError(f"{type(value).__name__} in a conversation; expected JSON values")


def unmark(marked: str, controls: Set[str]) -> Rendered:
    """Returns the text without marks, and what the marks said."""
    if marked.isascii() or not _MARKS.search(marked):
        return Rendered(marked)
    pieces = _MARKS.split(marked)
    text: list[str] = []
    generated: list[Span] = []
    data: list[Span] = []
    cuts: list[int] = []
    position, opened = 0, 0
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            text.append(piece)
            position += len(piece)
        elif piece == OPEN_GENERATION:
            opened = position
        elif piece == CLOSE_GENERATION:
            generated.append((opened, position))
        else:
            cuts.append(position)
            # A template may split a text between its marks: only a whole marked
            # control string counts as one, a single mark is a border.
            inside = pieces[index + 1]
            whole = piece == _START and inside in controls
            if whole and pieces[index + 2 : index + 3] == [_END]:
                data.append((position, position + len(inside)))
    return Rendered("".join(text), tuple(generated), tuple(data), tuple(cuts))


class GuardedTokenizer:
    """Encodes a text as if it stood in the middle of a longer one.

    Some tokenizers put a space before the first word of a string. A guard token in
    front, removed afterwards, keeps that from happening.
    """

    def __init__(self, source: tokenizers.Tokenizer, *, added_tokens: bool) -> None:
        """Copies `source`, without its added tokens if they are not wanted."""
        document = json.loads(source.to_str())
        if not added_tokens:
            document["added_tokens"] = []
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(_GUARD, normalized=False, special=True)]
        )

    def encode(self, text: str, *, in_the_middle: bool = True) -> Encoded:
        """Returns ids and offsets of `text` alone."""
        if _GUARD in text:
            raise RowError("the text holds noncharacters (U+FDD0) reserved for jlora")
        guard = _GUARD if in_the_middle else ""
        encoding = self._tokenizer.encode(guard + text, add_special_tokens=False)
        skip = 1 if guard else 0
        shift = len(guard)
        offsets = [(a - shift, b - shift) for a, b in encoding.offsets[skip:]]
        return Encoded(encoding.ids[skip:], offsets)


def encode_data_as_text(
    rendered: Rendered,
    encoded: Encoded,
    *,
    added_ids: Set[int],
    control_ids: Set[int],
    plain: GuardedTokenizer,
) -> Encoded:
    """Returns `encoded` with every control token that came from the data undone.

    The template's own added tokens split the text; each stretch between two of them
    that holds a forged one is encoded again as plain text.

    Raises:
        RowError: the tokenizer makes a control token even of plain text.
    """
    ids: list[int] = []
    offsets: list[Span] = []
    begin, begin_char = 0, 0

    def close_stretch(end: int, end_char: int) -> None:
        if not any(index in added_ids for index in encoded.ids[begin:end]):
            ids.extend(encoded.ids[begin:end])
            offsets.extend(encoded.offsets[begin:end])
            return
        stretch = rendered.text[begin_char:end_char]
        again = plain.encode(stretch, in_the_middle=begin_char > 0)
        if not control_ids.isdisjoint(again.ids):
            raise RowError(
                f"the tokenizer makes a control token of the plain text {stretch!r:.80}"
            )
        ids.extend(again.ids)
        offsets.extend((a + begin_char, b + begin_char) for a, b in again.offsets)

    for index, (token, (a, b)) in enumerate(
        zip(encoded.ids, encoded.offsets, strict=True)
    ):
        if token in added_ids and not _is_forged(rendered, a, b):
            close_stretch(index, a)
            ids.append(token)
            offsets.append((a, b))
            begin, begin_char = index + 1, b
    close_stretch(len(encoded.ids), len(rendered.text))
    return Encoded(ids, offsets)


def _is_forged(rendered: Rendered, start: int, end: int) -> bool:
    return any(a < end and b > start for a, b in rendered.data) or any(
        start < cut < end for cut in rendered.cuts
    )
