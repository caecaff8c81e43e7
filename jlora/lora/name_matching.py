"""How entries and patterns of PEFT's settings match the names of modules.

Source: PEFT's `tuners/tuners_utils.py`, `check_target_module_exists`, and
`utils/other.py`, `get_pattern_key`.
"""

import re
from collections.abc import Mapping

from jlora.errors import UsageError, listing


def matches(entries: list[str] | str | None, name: str, used: set[str]) -> bool:
    """Returns whether a regular expression, or an entry of a list, matches the name."""
    if isinstance(entries, str):
        hits = {entries} if entries and matches_whole(entries, name) else set()
    else:
        hits = {x for x in entries or [] if f".{name}".endswith(f".{x}")}
    used |= hits
    return bool(hits)


def matches_whole(pattern: str, name: str) -> bool:
    """Returns whether a regular expression matches all of a name.

    Raises:
        UsageError: it is not one.
    """
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UsageError(
            f"lora: {pattern!r} is not a regular expression ({error})"
        ) from error


def layer_index(name: str, patterns: list[str] | str | None) -> int | None:
    """Returns the index of the layer that a module is in, in the list of that name."""
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(match.group(1)) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1))
    return None


def pattern_value(
    patterns: Mapping[str, float],
    name: str,
    default: float,
    used: set[str],
    strict: bool,
) -> float:
    """Returns the value of the first pattern that matches, in the dictionary's order."""
    hits = [key for key in patterns if matches_whole(rf"(.*\.)?({key})", name)]
    used |= set(hits)
    if strict and len({patterns[key] for key in hits}) > 1:
        raise UsageError(
            f"lora: the patterns {listing(hits)} give {name} different values; "
            "make them exclude each other"
        )
    return patterns[hits[0]] if hits else default
