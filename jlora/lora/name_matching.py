"""How entries and patterns of PEFT's settings match the names of modules.

Source: PEFT's `tuners/tuners_utils.py`, `check_target_module_exists`, and
`utils/other.py`, `get_pattern_key`.
"""

from collections.abc import Mapping, Sequence

from jlora.errors import UsageError, listing
from jlora.limited_regex import first_groups


def matching(
    entries: list[str] | str | None, names: Sequence[str], used: set[str]
) -> set[str]:
    """Returns the names that a regular expression, or an entry of a list, matches."""
    if isinstance(entries, str):
        found = set(matching_whole(entries, names) if entries else ())
        used |= {entries} if found else set()
        return found
    hits = {n: [x for x in entries or [] if f".{n}".endswith(f".{x}")] for n in names}
    used |= {entry for found in hits.values() for entry in found}
    return {name for name, found in hits.items() if found}


def matching_whole(pattern: str, names: Sequence[str]) -> list[str]:
    """Returns the names that a regular expression matches as a whole.

    Raises:
        UsageError: it is not one, or takes too long.
    """
    (groups,) = first_groups([("", pattern, "")], names, whole=True)
    return [
        name for name, group in zip(names, groups, strict=True) if group is not None
    ]


def inside(entries: Sequence[str], names: Sequence[str]) -> set[str]:
    """Returns the names of modules that an entry matches, or that are inside of one."""
    patterns = [(r"(^|.*\.)", entry, r"($|\..*)") for entry in entries]
    rows = first_groups(patterns, names, whole=False)
    return {
        n
        for row in rows
        for n, group in zip(names, row, strict=True)
        if group is not None
    }


def layer_indices(
    names: Sequence[str], patterns: list[str] | str | None
) -> dict[str, int | None]:
    """Returns the index of the layer that each module is in, in the list of that name."""
    given = [patterns] if isinstance(patterns, str) else patterns or []
    around = [(r"(?:^|.*?\.)", pattern, r"\.(\d+)\.") for pattern in given]
    if not around:
        around = [(r".*?\.", "", r"[^.]*\.(\d+)\.")]
    result: dict[str, int | None] = dict.fromkeys(names)
    for row in reversed(first_groups(around, names, whole=False)):
        for name, group in zip(names, row, strict=True):
            if group is not None:
                result[name] = int(group) if group.isdecimal() else None
    return result


def pattern_values(
    patterns: Mapping[str, float],
    names: Sequence[str],
    default: float,
    used: set[str],
    *,
    strict: bool,
) -> dict[str, float]:
    """Returns for each name the value of the first pattern that matches it."""
    around = [(r"(.*\.)?(", key, ")") for key in patterns]
    rows = first_groups(around, names, whole=True)
    result = {}
    for index, name in enumerate(names):
        hits = [
            k for k, row in zip(patterns, rows, strict=True) if row[index] is not None
        ]
        used |= set(hits)
        if strict and len({patterns[key] for key in hits}) > 1:
            raise UsageError(
                f"lora: the patterns {listing(hits)} give {name} different values; "
                "make them exclude each other"
            )
        result[name] = patterns[hits[0]] if hits else default
    return result
