"""Keeps control strings in data plain text: `<|im_end|>` typed by a user ends no turn.

Before a template runs, control strings in its input are wrapped in marks. Afterwards the
marks say which control tokens of the rendered text the template itself wrote. The marks
are lone surrogates, which no valid text contains.
"""

import json
import re
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from jlora.data.chat.jinja_sandbox import CLOSE_GENERATION, OPEN_GENERATION
from jlora.data.read.bad_rows import RowError

_START, _END = "\udc01", "\udc02"
_MARKS = re.compile("([\udc01-\udc04])")
_MAX_BITS = 14_000  # Python converts about as many to text
_SURROGATE = re.compile("[\ud800-\udfff]")
# Unicode noncharacters, which are reserved for use inside a program.
_GUARD = "\ufdd0\ufdd1\ufdd0"

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Rendered:
    """A rendered conversation; spans are of characters.

    Compared by identity, so that using one as a key does not hash its text.
    """

    text: str
    generated: tuple[Span, ...] = ()
    """The contents of the template's generation blocks."""
    data_controls: tuple[Span, ...] = ()
    """Control strings that came from the data."""
    boundaries: tuple[int, ...] = ()
    """Where a mark of a control string was removed; no control token may cross one."""


@dataclass(frozen=True)
class Encoded:
    """Token ids and, where asked for, the span of characters that each covers."""

    ids: list[int]
    offsets: list[Span]
    shared: int = 0
    """Of a prefix of a longer text: its ids are that text's first `shared` ids, then `ids`."""

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
    """Returns a copy of plain JSON data with marks around control strings."""
    if isinstance(value, str):
        check_text(value)
        # Searched first, because `sub` is slow to start and most texts have no match.
        found = pattern.search(value)
        return pattern.sub(f"{_START}\\g<0>{_END}", value) if found else value
    if isinstance(value, dict):
        return {str(key): mark(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, pattern) for item in value]
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise RowError(f"an integer of {value.bit_length():,} bits in a conversation")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise RowError(f"{type(value).__name__} in a conversation; expected JSON values")


def without_marks(marked: str) -> str:
    """Returns a rendered text without its marks."""
    return _MARKS.sub("", marked)


def unmark(marked: str, controls: Set[str]) -> Rendered:
    """Removes the marks from a rendered text and returns what they say."""
    if marked.isascii() or not _MARKS.search(marked):
        return Rendered(marked)
    pieces = _MARKS.split(marked)
    generated: list[Span] = []
    data_controls: list[Span] = []
    boundaries: list[int] = []
    position, opened = 0, 0
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            position += len(piece)
        elif piece == OPEN_GENERATION:
            opened = position
        elif piece == CLOSE_GENERATION:
            generated.append((opened, position))
        else:
            boundaries.append(position)
            # A template may cut a text between its marks. Only a whole control string
            # between both marks counts as one; a single mark is just a boundary.
            inside, both = pieces[index + 1], pieces[index : index + 3 : 2]
            if both == [_START, _END] and inside in controls:
                data_controls.append((position, position + len(inside)))
    text = "".join(pieces[::2])
    return Rendered(text, tuple(generated), tuple(data_controls), tuple(boundaries))


def add_guard(
    source: tokenizers.Tokenizer, *, added_tokens: bool
) -> tokenizers.Tokenizer:
    """Returns a copy for `encode_guarded`, with or without the tokenizer's added tokens."""
    document = json.loads(source.to_str())
    if not added_tokens:
        document["added_tokens"] = []
    copy = tokenizers.Tokenizer.from_str(json.dumps(document))
    guard = tokenizers.AddedToken(_GUARD, normalized=False, special=True)
    copy.add_special_tokens([guard])
    return copy


def encode_guarded(
    tokenizer: tokenizers.Tokenizer, text: str, *, in_the_middle: bool = True
) -> Encoded:
    """Returns ids and offsets of a text that continues another one.

    Some tokenizers put a space before the first word of a string. A guard token in front
    of the text, removed afterwards, prevents that (not at the start of a text).
    """
    if _GUARD in text:
        raise RowError("the text holds noncharacters (U+FDD0) reserved for jlora")
    if not in_the_middle:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)
    encoding = tokenizer.encode(_GUARD + text, add_special_tokens=False)
    shift = len(_GUARD)
    offsets = [(a - shift, b - shift) for a, b in encoding.offsets[1:]]
    return Encoded(encoding.ids[1:], offsets)


def encode_data_as_text(
    rendered: Rendered,
    encoded: Encoded,
    *,
    added_ids: Set[int],
    control_ids: Set[int],
    plain: tokenizers.Tokenizer,
) -> Encoded:
    """Returns `encoded` with text in place of the control tokens that data forged.

    The template's own added tokens split the text. A stretch between two of them that
    holds a forged one is encoded again by `plain`, which knows no added tokens.

    Raises:
        RowError: the tokenizer makes a control token even of plain text.
    """
    ids: list[int] = []
    offsets: list[Span] = []
    begin, begin_char = 0, 0

    def close_stretch(end: int, end_char: int) -> None:
        if added_ids.isdisjoint(encoded.ids[begin:end]):
            ids.extend(encoded.ids[begin:end])
            offsets.extend(encoded.offsets[begin:end])
            return
        stretch = rendered.text[begin_char:end_char]
        again = encode_guarded(plain, stretch, in_the_middle=begin_char > 0)
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
    return any(a < end and b > start for a, b in rendered.data_controls) or any(
        start < boundary < end for boundary in rendered.boundaries
    )
