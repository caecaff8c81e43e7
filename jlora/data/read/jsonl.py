"""Parses the JSON text of rows; every row gives an object or a reason why not."""

import json
from typing import Any

from jlora.data.read.bad_rows import BadRow, RowError
from jlora.data.read.row_files import RowChunk

_TYPE_NAMES = {
    type(None): "null",
    str: "a string",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}


def parse_rows(
    chunk: RowChunk,
) -> tuple[list[tuple[int, dict[str, Any]]], list[BadRow]]:
    """Returns (number, object) of every good row, and the bad rows."""
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[BadRow] = []
    for number, raw in chunk.rows:
        column = None
        try:
            rows.append((number, raw if isinstance(raw, dict) else _parse(raw)))
            continue
        except json.JSONDecodeError as error:
            reason, column = f"not JSON, {error.msg}", error.colno
        except UnicodeDecodeError as error:
            reason, column = "not UTF-8 text", error.start + 1
        except RecursionError:
            reason = "JSON nested too deeply"
        except ValueError as error:  # an integer of more digits than Python converts
            reason = f"not JSON, {error}"
        except RowError as error:
            reason = str(error)
        bad.append(BadRow(chunk.path, number, reason, column))
    return rows, bad


def _parse(raw: bytes) -> dict[str, Any]:
    row = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    if isinstance(row, list):
        raise RowError("expected an object, found a list; write its items one per line")
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found {type_name(row)}")
    return row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {double!r} occurs twice")
    return result


def type_name(value: object) -> str:
    """Returns the JSON name of a value's type, with its article."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
