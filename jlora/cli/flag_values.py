"""Values of flags and of keys in YAML files: read and checked by the type of the field."""

import contextlib
import json
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from jlora.cli.strict_yaml import parse_yaml

NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    Any: "anything",
}


def from_words(words: Sequence[str], kind: Any) -> Any:
    """Returns the value that one or more words of a command line stand for.

    Raises:
        ValueError: they are not of this type.
    """
    if len(words) == 1:
        return _from_word(words[0], kind)
    item = next(iter(list_items(kind)))
    return [_from_word(word, item) for word in words]


def _from_word(word: str, kind: Any) -> Any:
    """Returns text as it stands, unless it reads as another type that is allowed."""
    kinds = _alternatives(kind)
    is_bool = word.lower() in ("true", "false")
    with contextlib.suppress(ValueError, yaml.YAMLError, RecursionError):
        if word:
            value = parse_yaml(word.lower() if is_bool else word)
            # In one word # begins no comment: `--prompt "# Title"` is that text.
            if not isinstance(value, list | dict) and _has_comment(word, value):
                raise ValueError(word)
            return _first_match(value, [part for part in kinds if part is not str])
    if (str in kinds or Any in kinds) and _is_text(word):
        return word
    raise ValueError(word)


def _is_text(value: str) -> bool:
    """Whether a string can be printed and be a path: UTF-8 without NUL."""
    return "\0" not in value and not any("\ud800" <= x <= "\udfff" for x in value)


def _has_comment(word: str, value: Any) -> bool:
    return "#" in word or (value is None and word not in ("null", "~"))


def from_yaml(value: Any, kind: Any) -> Any:
    """Returns a value of a YAML file; an integer also serves as a number and as text.

    Raises:
        ValueError: it is not of this type.
    """
    if isinstance(value, str) and not _is_text(value):
        raise ValueError(value)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _first_match(value, parts)
    if origin is list and isinstance(value, list):
        return [from_yaml(item, parts[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        key_kind, kind = parts
        read = {from_yaml(k, key_kind): from_yaml(v, kind) for k, v in value.items()}
        if len(read) != len(value):  # 1 and "1" are one name
            raise ValueError(value)
        return read
    if kind is Any or type(value) is kind or (origin is Literal and value in parts):
        return value
    if type(value) is int and kind in (float, str):
        return kind(value)
    raise ValueError(value)


def _first_match(value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return from_yaml(value, kind)
    raise ValueError(value)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union; of another type, itself."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def list_items(kind: Any) -> list[Any]:
    """Returns the type of the items if a list is allowed, else nothing."""
    lists = [part for part in _alternatives(kind) if typing.get_origin(part) is list]
    return [typing.get_args(part)[0] for part in lists]


def describe(kind: Any) -> str:
    """Returns what a value of this type looks like, with its article."""
    if kind in NAMES:
        return NAMES[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is list:
        return "a list such as " + ("[0,1]" if int in parts else "[first,second]")
    if origin is dict:
        return "a mapping such as {name: value}"
    return " or ".join(describe(part) for part in parts if part is not types.NoneType)


def as_text(value: Any) -> str:
    """Returns a value as it is written after a flag."""
    return value if isinstance(value, str) else json.dumps(value, default=repr)
