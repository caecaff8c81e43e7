"""Read typed values from a JSON object, and collect all problems for one message.

A bool or a string is not accepted for a number, although Python would convert it.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

# About the largest number of float32.
MAX_FLOAT = 3e38
# Far above any real size, and so small that sums of sizes cannot overflow.
MAX_SIZE = 2**31 - 1


def is_int(value: object) -> TypeGuard[int]:
    """Returns whether the value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether the value is a finite number that a float can hold."""
    if is_int(value):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


class Fields:
    """The keys of one object; a wrong value adds to `problems` and gives a default.

    The caller raises `problems` after the last key, so that no problem hides another.
    """

    def __init__(self, values: dict[str, Any], problems: list[str]) -> None:
        """Takes the object, and the list to which problems are added."""
        self._values = values
        self.problems = problems

    def size(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Returns an integer from 1 to `most`; the default if it is null or absent."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not is_int(value) or value <= 0:
            self._add(key, value, "an integer above 0")
        elif value > most:
            self._add(key, value, f"at most {most:,}")
        else:
            return value
        return default or 1

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        least: float | None = None,
        above: float | None = None,
        most: float = math.inf,
    ) -> float:
        """Returns a number in these bounds; the default if it is null or absent."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        bound = "" if least is None else f" of at least {least:g}"
        bound += "" if above is None else f" above {above:g}"
        bound += "" if most == math.inf else f", at most {most:g}"
        if (
            not is_number(value)
            or (least is not None and value < least)
            or (above is not None and value <= above)
            or value > most
        ):
            self._add(key, value, f"a number{bound}")
            return 1.0 if default is None else default
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Returns a list of `count` numbers above 0 that float32 can divide by."""
        value = self._values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(is_number(item) and 1e-30 < item < 1e30 for item in value)
        ):
            found = f"a list of {len(value)}" if isinstance(value, list) else value
            self._add(key, found, f"{count} numbers above 0 (head_dim / 2)")
            return ()
        return tuple(float(item) for item in value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """Returns true or false; the default if it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._add(key, value, "true or false")
            return default
        return value

    def token_id(self, key: str) -> int | None:
        """Returns a token id or None."""
        value = self._values.get(key)
        if value is not None and not is_int(value):
            self._add(key, value, "a token id")
            return None
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Returns a tuple of token ids, of which one may also be given without a list."""
        value = self._values.get(key)
        if isinstance(value, list) and all(map(is_int, value)):
            return tuple(value)
        one = self.token_id(key)
        return () if one is None else (one,)

    def _add(self, key: str, value: object, expected: str) -> None:
        self.problems.append(f"{key}={value!r:.80}, expected {expected}")


def joined(problems: Iterable[str], limit: int = 12) -> str:
    """Returns the problems as one sentence, capped with a count."""
    problems = list(dict.fromkeys(problems))
    rest = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {rest} more" if rest > 0 else "")
