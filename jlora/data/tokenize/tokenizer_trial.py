"""Tries a tokenizer.json out in a process with limits, before it is used in this one.

Its normalizers, patterns, post-processors and decoders are programs: they may double a text
forty times, never end, or crash the library. What a trial of all letters, and of all
strings that the file itself mentions, does not set off is left alone.
"""

import functools
import itertools
import json
import string
from collections.abc import Iterator
from typing import Any

import tokenizers

from jlora.errors import CorruptError
from jlora.limited_process import CallError, LimitedProcess, LimitExceeded

CPU_SECONDS = 5.0
CPU_SECONDS_PER_MIB = 1.0
MEMORY_BYTES = 2 << 30
_PROCESS = LimitedProcess(
    "jlora.data.tokenize.tokenizer_trial", memory_bytes=MEMORY_BYTES
)
# A process that had a large file is not kept.
_KEPT_BYTES = 1 << 20
_MAX_STRINGS = 10_000
_MAX_LENGTH = 1000
# Bytes become tokens one by one at worst, and a token is seldom longer than a word.
_MAX_GROWTH = 16
_MAX_ADDED = 1000
# Long runs set off patterns that try every way to split them.
_TEXTS = (
    string.printable,
    "The quick brown fox jumps over 1,234.5 lazy dogs; isn't it?\n\n  \tx = {y: [z]}\r\n",
    "Größe naïve 日本語の文 русский текст עברית हिन्दी 👩‍🚀 \u3000\ufb01",
    *(
        letter * 100 + "!"
        for letter in ("a", "A", "é", "日", " ", "\n", "1", ".", "_", "ab")
    ),
)


@functools.lru_cache(maxsize=2)
def check_tokenizer(data: bytes) -> None:
    """Returns if a tokenizer.json loads and changes texts within reason.

    Raises:
        CorruptError: it does not.
    """
    seconds = CPU_SECONDS + CPU_SECONDS_PER_MIB * len(data) / 2**20
    try:
        _PROCESS.call("try_out", data.decode(), cpu_seconds=seconds)
    except (UnicodeDecodeError, CallError) as error:
        panic = (
            "the library crashed: " if getattr(error, "name", "")[:5] == "Panic" else ""
        )
        raise CorruptError(f"tokenizer.json: {panic}{error}") from error
    except LimitExceeded as error:
        raise CorruptError(
            f"tokenizer.json: tried on short texts, {error}; use another tokenizer"
        ) from error
    finally:
        if len(data) > _KEPT_BYTES:
            _PROCESS.close()


def try_out(document: str) -> None:
    """Loads a tokenizer and encodes and decodes texts; called in the limited process."""
    tokenizer = tokenizers.Tokenizer.from_str(document)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    parts = json.loads(document)
    programs = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    found = _strings([parts.get(name) for name in programs])
    mentioned = list(itertools.islice(found, _MAX_STRINGS + 1))
    if len(mentioned) > _MAX_STRINGS:
        raise ValueError(f"more than {_MAX_STRINGS:,} items in {', '.join(programs)}")
    for text in (*_TEXTS, *(text[:_MAX_LENGTH] for text in dict.fromkeys(mentioned))):
        most = _MAX_GROWTH * len(text.encode()) + _MAX_ADDED
        for add_special_tokens in (False, True):
            try:
                ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
                decoded = tokenizer.decode(ids, skip_special_tokens=False)
            except Exception:  # not every tokenizer takes every text
                continue
            if len(ids) > most or len(decoded) > most:
                raise ValueError(
                    f"{len(text)} characters become {len(ids):,} tokens, and these "
                    f"{len(decoded):,} characters"
                )


def _strings(value: Any) -> Iterator[str]:
    """Yields every string in JSON data, keys included; "" for a number."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            stack += value
        elif value is not None:
            yield value if isinstance(value, str) else ""
