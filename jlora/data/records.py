"""Rows to validated records: which columns a format has and what they must hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.jsonl import Problem, RowError, read_rows, type_name
from jlora.errors import CorruptError, UnsupportedError, listing, nearest

_COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True)
class TextRecord:
    """Plain text; the part before `completion` is context ("" for format text)."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation; its first `num_prompt` messages are the prompt, if any are."""

    line: int
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    num_prompt: int


@dataclass(frozen=True)
class Records:
    """The good records of a file in order, the bad lines, and what the file holds."""

    path: Path
    format: str
    is_chat: bool
    good: list[TextRecord] | list[ChatRecord]
    bad: list[Problem]


def read_records(path: Path, format: str) -> Records:
    """Returns every record of a JSONL file; `format` may be auto.

    Raises:
        UnsupportedError: a format that jlora does not read.
        CorruptError: the first record fits no format.
    """
    rows, bad = read_rows(path)
    first_line, first = rows[0]
    if format == "auto":
        format = _detect(first, f"{path}, line {first_line}")
    is_chat = format == "messages" or (
        format == "prompt_completion" and isinstance(first.get("prompt"), list)
    )
    good: list[Any] = []
    for line, row in rows:
        try:
            good.append(_record(line, row, format, is_chat))
        except RowError as error:
            bad.append(Problem(line, str(error)))
    return Records(path, format, is_chat, good, bad)


def _detect(row: Mapping[str, Any], where: str) -> str:
    for format, columns in _COLUMNS.items():
        if all(column in row for column in columns):
            return format
    for name, column in (("sharegpt", "conversations"), ("alpaca", "instruction")):
        if column in row:
            raise UnsupportedError(
                f"{where}: the column {column!r} looks like the {name} format, which "
                "jlora does not read; convert the records to messages"
            )
    expected = " or ".join(" + ".join(columns) for columns in _COLUMNS.values())
    raise CorruptError(
        f"{where}: the keys {listing(sorted(row)) or '(none)'} fit no format; "
        f"expected {expected}"
    )


def _record(
    line: int, row: Mapping[str, Any], format: str, is_chat: bool
) -> TextRecord | ChatRecord:
    if format == "text":
        return TextRecord(line, "", _string(row, "text"))
    if not is_chat:
        return TextRecord(line, _string(row, "prompt"), _string(row, "completion"))
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"tools is {type_name(tools)}; expected a list")
    if format == "messages":
        return ChatRecord(line, _messages(row, "messages"), tools, 0)
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    return ChatRecord(line, prompt + completion, tools, len(prompt))


def _string(row: Mapping[str, Any], column: str) -> str:
    value = _present(row, column)
    if not isinstance(value, str):
        raise RowError(f"{column} is {type_name(value)}; expected a string")
    if not value:
        raise RowError(f"{column} is empty")
    return value


def _messages(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    value = _present(row, column)
    if not isinstance(value, list):
        raise RowError(f"{column} is {type_name(value)}; expected a list of messages")
    if not value:
        raise RowError(f"{column} is an empty list")
    for index, message in enumerate(value):
        _check_message(message, f"{column}[{index}]")
    return value


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise RowError(f"{name} is {type_name(message)}; expected an object")
    for key in ("role", "content"):
        value = message.get(key)
        if key == "content" and value is None and message.get("tool_calls"):
            continue
        if key not in message:
            raise RowError(f"{name} has no {key}")
        if not isinstance(value, str):
            raise RowError(f"{name}.{key} is {type_name(value)}; expected a string")
    # A tool may return nothing and a system turn may be blank; a question or an answer
    # without words is a fault of the data.
    may_be_empty = message["role"] in ("system", "tool") or message.get("tool_calls")
    if not message["role"] or not (message.get("content") or may_be_empty):
        raise RowError(f"{name}.{'content' if message['role'] else 'role'} is empty")


def _present(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError(f"no {column}{nearest(column, row)}")
    return row[column]
