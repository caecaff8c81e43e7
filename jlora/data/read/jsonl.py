"""Rows as they stand in a file to objects; what cannot be read is kept with its place."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.read.row_files import Chunk, place
from jlora.errors import CorruptError

_TYPE_NAMES = {
    type(None): "null",
    str: "a string",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}


class RowError(CorruptError):
    """One record or conversation that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Problem:
    """A bad row (numbered from 1), why, and the column where that is known."""

    path: Path
    number: int
    reason: str
    column: int | None = None

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{place(self.path, self.number)}{column}: {self.reason}"


def parse_rows(chunk: Chunk) -> tuple[list[tuple[int, dict[str, Any]]], list[Problem]]:
    """Returns (number, object) of every good row, and the bad ones."""
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[Problem] = []
    for number, raw in chunk.rows:
        try:
            rows.append((number, raw if isinstance(raw, dict) else _parse(raw)))
        except json.JSONDecodeError as error:
            reason = f"not JSON, {error.msg}"
            bad.append(Problem(chunk.path, number, reason, error.colno))
        except UnicodeDecodeError as error:
            bad.append(Problem(chunk.path, number, "not UTF-8 text", error.start + 1))
        except RecursionError:
            bad.append(Problem(chunk.path, number, "JSON nested too deeply"))
        except ValueError as error:  # an integer of more digits than Python converts
            bad.append(Problem(chunk.path, number, f"not JSON, {error}"))
        except RowError as error:
            bad.append(Problem(chunk.path, number, str(error)))
    return rows, bad


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
