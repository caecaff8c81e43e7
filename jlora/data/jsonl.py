"""JSONL in, one object per line out; every bad line is kept with its place and reason."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.errors import CorruptError, UnsupportedError, UsageError, nearest

MAX_LINE_BYTES = 16 << 20
_MAX_LISTED = 12
_FOREIGN_BYTES = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
}
_TYPE_NAMES = {type(None): "null", str: "a string", list: "a list", dict: "an object"}


class RowError(CorruptError):
    """One record or conversation that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Problem:
    """A bad line (1-based), why, and the column where that is known."""

    line: int
    reason: str
    column: int | None = None

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"line {self.line}{column}: {self.reason}"


def read_rows(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Problem]]:
    """Returns (line number, object) of every good line, and the bad ones.

    Raises:
        UsageError: no such file, or nothing in it.
        UnsupportedError: not plain JSONL.
        CorruptError: a line over the cap, or no good line at all.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[Problem] = []
    for line, raw in _lines(path):
        try:
            rows.append((line, _parse(raw)))
        except json.JSONDecodeError as error:
            bad.append(Problem(line, f"not JSON, {error.msg}", error.colno))
        except UnicodeDecodeError as error:
            bad.append(Problem(line, "not UTF-8 text", error.start + 1))
        except RecursionError:
            bad.append(Problem(line, "JSON nested too deeply"))
        except ValueError as error:  # an integer of more digits than Python converts
            bad.append(Problem(line, f"not JSON, {error}"))
        except RowError as error:
            bad.append(Problem(line, str(error)))
    if not rows:
        if bad:
            refuse(path, bad, len(bad))
        raise UsageError(f"{path}: no records; expected one JSON object per line")
    return rows, bad


def refuse(path: Path, problems: Sequence[Problem], total: int) -> None:
    """Raises CorruptError with all problems by line, capped."""
    ordered = sorted(problems, key=lambda problem: problem.line)
    lines = "".join(f"\n  {problem}" for problem in ordered[:_MAX_LISTED])
    rest = len(ordered) - _MAX_LISTED
    more = f"\n  and {rest} more" if rest > 0 else ""
    raise CorruptError(
        f"{path}: {len(ordered)} of {total} records cannot be used; "
        f"correct or remove these lines:{lines}{more}"
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes) of every line that is not blank."""
    if not path.is_file():
        if path.is_dir():
            raise UsageError(f"{path} is a folder; expected one JSONL file")
        folder = path.parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        raise UsageError(f"{path}: no such file{nearest(path.name, names)}")
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
                _refuse_foreign(path, raw)
            if len(raw) > MAX_LINE_BYTES:
                raise CorruptError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; "
                    "expected one JSON object per line"
                )
            # Only the file's own line ends go: a CR inside a JSON string is escaped.
            if stripped := raw.strip(b" \t\r\n"):
                yield number, stripped


def _refuse_foreign(path: Path, first_line: bytes) -> None:
    for magic, what in _FOREIGN_BYTES.items():
        if first_line.startswith(magic):
            raise UnsupportedError(
                f"{path} is {what}; jlora reads plain JSONL, one object per line"
            )


def _parse(raw: bytes) -> dict[str, Any]:
    row = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(row, dict):
        hint = ""
        if isinstance(row, list):
            hint = " (a JSON array? write its items one per line)"
        raise RowError(f"expected an object, found {type_name(row)}{hint}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {double!r} occurs twice")
    return result


def type_name(value: object) -> str:
    """Returns the JSON name of a value's type, with its article."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
