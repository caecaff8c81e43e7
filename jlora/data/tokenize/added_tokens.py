"""Adds the tokens that a model's other files name and tokenizer.json does not have.

As Transformers 4 and 5 do: first those of added_tokens_decoder in tokenizer_config.json,
or, if it has none, of added_tokens.json; then the named special tokens and the list of
additional ones.
"""

from collections.abc import Container, Iterable, Mapping, Set
from typing import Any

import tokenizers

from jlora.errors import CorruptError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_missing_tokens(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    added_json: Mapping[str, Any],
    special: Mapping[str, str],
    additional: Iterable[str],
) -> None:
    """Adds tokens to `backend`, in the order that gives them the ids of Transformers.

    Args:
        backend: the tokenizer.
        settings: of tokenizer_config.json.
        added_json: of added_tokens.json, text -> id.
        special: name -> text of the special tokens, in Transformers' order of names.
        additional: texts of further special tokens.

    Raises:
        CorruptError: an entry that is no token, or a BOS or EOS that is only a name.
    """
    known = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" in settings:
        declared = _parse_decoder(settings["added_tokens_decoder"])
    else:
        named = {*special.values(), *additional}
        declared = _parse_added_json(added_json, named, known)
    same = {repr(token) for token in known.values()}
    new = [declared[i] for i in sorted(declared) if repr(declared[i]) not in same]
    texts = {token.content for token in [*known.values(), *new]}
    for name in ("bos_token", "eos_token"):
        text = special.get(name)
        if text and text not in texts and backend.token_to_id(text) is None:
            raise CorruptError(
                f"tokenizer_config.json: {name} is {text!r}, which tokenizer.json does "
                "not have"
            )
    missing = {text: None for text in [*special.values(), *additional] if text}
    new += [
        tokenizers.AddedToken(text, special=True)
        for text in missing
        if text not in texts
    ]
    backend.add_tokens(new)


def _parse_decoder(decoder: Any) -> dict[int, tokenizers.AddedToken]:
    if not isinstance(decoder, dict):
        raise CorruptError("tokenizer_config.json: added_tokens_decoder is no object")
    result = {}
    for index, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not index.isdecimal() or not isinstance(content, str) or not content:
            raise CorruptError(
                f"tokenizer_config.json: added_tokens_decoder has {index!r}: {entry!r}; "
                "expected an id and an object with content"
            )
        flags = {name: entry[name] for name in _FLAGS if name in entry}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise CorruptError(
                f"tokenizer_config.json: added_tokens_decoder {index} has flags that are "
                f"not true or false: {flags}"
            )
        result[int(index)] = tokenizers.AddedToken(content, **flags)
    return result


def _parse_added_json(
    entries: Mapping[str, Any], special: Set[str], known: Container[int]
) -> dict[int, tokenizers.AddedToken]:
    """Returns {id: token} of added_tokens.json, but for ids that are known already."""
    result = {}
    for content, index in entries.items():
        if type(index) is not int or index < 0 or not content:
            raise CorruptError(f"added_tokens.json: the id of {content!r} is {index!r}")
        is_special = content in special
        if index not in known:
            result[index] = tokenizers.AddedToken(
                content, normalized=not is_special, special=is_special
            )
    return result
