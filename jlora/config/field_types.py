"""Whether a value has the type of a dataclass field, or is in range, in words for users."""

import types
import typing
from collections.abc import Callable
from typing import Any

from jlora.config.json_fields import MAX_FLOAT, MAX_SIZE, is_int
from jlora.errors import UsageError

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


def replaces(
    *others: str, when: Callable[[Any], object] = lambda value: True
) -> dict[str, Any]:
    """Returns the metadata of a field with which others of its class have no effect.

    On a command line such a flag also drops what a file says of the others.

    Args:
        others: names of the fields.
        when: whether a value of this field has that consequence; by default any has.
    """
    return {"replaces": lambda value: others if when(value) else ()}


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


def check_at_least(prefix: str, config: object, name: str, low: int) -> None:
    """Raises UsageError for a number below `low`, or too large; NaN is neither."""
    value = getattr(config, name)
    if not low <= value:  # NaN fails, too
        raise UsageError(f"{prefix}.{name}={value!r}; expected at least {low}")
    most = MAX_SIZE if isinstance(value, int) else MAX_FLOAT
    if value > most:
        text = f"{most:,}" if isinstance(value, int) else f"{most:g}"
        raise UsageError(f"{prefix}.{name}={value!r}; expected at most {text}")
