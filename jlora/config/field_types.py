"""Whether a value has the type of a dataclass field, and that type in words for users."""

import types
import typing
from typing import Any

from jlora.config.json_fields import is_int

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
}
_PLURALS: dict[Any, str] = {
    int: "integers",
    float: "numbers",
    str: "strings",
    list[int]: "lists of integers",
}


def has_type(value: Any, kind: Any) -> bool:
    """Returns whether the value is of this type; an int is a float, a bool is neither."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(has_type(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(has_type(x, parts[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            has_type(key, parts[0]) and has_type(x, parts[1])
            for key, x in value.items()
        )
    if kind is float and is_int(value):
        return True
    return is_int(value) if kind is int else isinstance(value, kind)


def type_in_words(kind: Any) -> str:
    """Returns what a value of this type is, such as "an integer or a list of integers"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return " or ".join(type_in_words(x) for x in parts if x is not types.NoneType)
    if origin is list:
        return f"a list of {_PLURALS[parts[0]]}"
    if origin is dict:
        return f"an object of {_PLURALS[parts[1]]}"
    return _WORDS[kind]
