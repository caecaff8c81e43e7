"""Regular expressions of someone else's settings, matched in a process with limits.

They are Python's, as in PEFT, where one like (a+)+$ runs for years.
"""

import re
from collections.abc import Sequence

from jlora.errors import UsageError, listing
from jlora.limited_process import CallError, LimitedProcess, LimitExceeded

CPU_SECONDS = 3.0
_PROCESS = LimitedProcess("jlora.limited_regex", memory_bytes=1 << 28)
# Nothing to repeat and nothing to choose from, so these cannot take long.
_PLAIN = re.compile(r"(?:[\w.^$]|\\\W)*")


def first_groups(
    patterns: Sequence[tuple[str, str, str]], names: Sequence[str], *, whole: bool
) -> list[list[str | None]]:
    """Returns for each pattern and name the first group of a match, "" without groups.

    It is None for a name that the pattern does not match, at its beginning or as a whole.

    Args:
        patterns: each of someone else, between two parts that are ours.
        names: what to match.
        whole: match all of a name.

    Raises:
        UsageError: a pattern is no regular expression, or takes too long.
    """
    joined = ["".join(parts) for parts in patterns]
    given = [pattern for _, pattern, _ in patterns]
    if all(map(_PLAIN.fullmatch, given)):
        return match_all(joined, names, whole)
    try:
        return _PROCESS.call("match_all", joined, names, whole, cpu_seconds=CPU_SECONDS)
    except CallError as error:
        raise UsageError(
            f"lora: {listing(list(map(repr, given)))} is not a regular expression ({error})"
        ) from error
    except LimitExceeded as error:
        raise UsageError(
            f"lora: the regular expression {listing(list(map(repr, given)))} cannot be "
            f"used: {error}; write a simpler one, or list the modules"
        ) from error


def match_all(
    patterns: Sequence[str], names: Sequence[str], whole: bool
) -> list[list[str | None]]:
    """Returns what `first_groups` does; called in the process with limits."""
    rows: list[list[str | None]] = []
    for pattern in patterns:
        compiled = re.compile(pattern)
        match = compiled.fullmatch if whole else compiled.match
        rows.append([])
        for name in names:
            found = match(name)
            group = found and (found[1] if compiled.groups else "")
            rows[-1].append("" if found and group is None else group)
    return rows
