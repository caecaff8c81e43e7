"""Turns a row into a validated record, by the format of its source."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jlora.data.read.bad_rows import RowError
from jlora.data.read.jsonl import type_name
from jlora.data.read.row_formats import COLUMNS, RowFormat
from jlora.errors import nearest

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
# As published with Stanford Alpaca; the answer follows without a space.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
Row = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class TextRecord:
    """Plain text: a prompt ("" for format text) and its completion."""

    number: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation; its first `num_prompt` messages come from a prompt column."""

    number: int
    messages: list[Message]
    tools: list[Any] | None
    num_prompt: int


def make_record(
    number: int, row: Row, row_format: RowFormat
) -> TextRecord | ChatRecord:
    """Returns the record of one row.

    Raises:
        RowError: the row does not hold what its format needs.
    """
    columns = COLUMNS[row_format.name]
    # The data's name of each column of the format.
    column = {name: row_format.fields.get(name, name) for name in columns}
    if row_format.name == "text":
        return TextRecord(number, "", _text(row, column["text"]))
    if row_format.name == "alpaca":
        return _alpaca(number, row, column, row_format.is_chat)
    if not row_format.is_chat:
        prompt = _text(row, column["prompt"])
        return TextRecord(number, prompt, _text(row, column["completion"]))
    num_prompt = 0
    if row_format.name == "sharegpt":
        messages = _system(row, column["system"])
        messages += _sharegpt_messages(row, column["conversations"])
    elif row_format.name == "messages":
        messages = _messages(row, column["messages"])
    else:
        messages = _messages(row, column["prompt"])
        num_prompt = len(messages)
        messages = messages + _messages(row, column["completion"])
    tools = _optional_list(row, column["tools"])
    return ChatRecord(number, messages, tools, num_prompt)


def _check_type(value: Any, name: str, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise RowError(f"{name} is {type_name(value)}; expected {expected}")


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise RowError(f"no {column}{nearest(column, row)}")
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    _check_type(value, column, str, "a string")
    if not value:
        raise RowError(f"{column} is empty")
    return value


def _optional_text(row: Row, column: str) -> str:
    return "" if row.get(column) in (None, "") else _text(row, column)


def _optional_list(row: Row, column: str) -> list[Any] | None:
    value = row.get(column)
    if value is not None:
        _check_type(value, column, list, "a list")
    return value


def _items(row: Row, column: str) -> list[Any]:
    value = _value(row, column)
    _check_type(value, column, list, "a list of messages")
    if not value:
        raise RowError(f"{column} is an empty list")
    return value


def _system(row: Row, column: str) -> list[Message]:
    system = _optional_text(row, column)
    return [{"role": "system", "content": system}] if system else []


def _messages(row: Row, column: str) -> list[Message]:
    messages = _items(row, column)
    for index, message in enumerate(messages):
        _check_message(message, f"{column}[{index}]")
    return messages


def _check_strings(item: Row, name: str, keys: Iterable[str], hint: str = "") -> None:
    for key in keys:
        if key not in item:
            raise RowError(f"{name} has no {key}{hint}")
        _check_type(item[key], f"{name}.{key}", str, "a string")


def _check_message(message: Any, name: str) -> None:
    _check_type(message, name, dict, "an object")
    has_calls = message.get("tool_calls")
    is_call_only = message.get("content") is None and has_calls
    _check_strings(message, name, ("role",) if is_call_only else ("role", "content"))
    if not message["role"]:
        raise RowError(f"{name}.role is empty")
    # A tool may return nothing and a system turn may be blank; a question or an answer
    # without words is a fault of the data.
    may_be_empty = message["role"] in ("system", "tool") or has_calls
    if not (message.get("content") or may_be_empty):
        raise RowError(f"{name}.content is empty")


def _sharegpt_messages(row: Row, column: str) -> list[Message]:
    messages = []
    for index, turn in enumerate(_items(row, column)):
        name = f"{column}[{index}]"
        _check_type(turn, name, dict, "an object")
        hint = ""
        if "role" in turn and "content" in turn:
            hint = (
                "; role and content belong to the format messages: give "
                f"data.format=messages and data.fields={{messages: {column}}}"
            )
        _check_strings(turn, name, ("from", "value"), hint)
        role = _SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise RowError(
                f"{name}.from is {turn['from']!r}"
                f"{nearest(turn['from'], _SHAREGPT_ROLES)}; "
                f"expected one of {', '.join(_SHAREGPT_ROLES)}"
            )
        if not turn["value"] and role not in ("system", "tool"):
            raise RowError(f"{name}.value is empty")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _alpaca(
    number: int, row: Row, column: Mapping[str, str], is_chat: bool
) -> TextRecord | ChatRecord:
    instruction, output = (
        _text(row, column["instruction"]),
        _text(row, column["output"]),
    )
    input = _optional_text(row, column["input"])
    system, history = _system(row, column["system"]), _history(row, column["history"])
    if is_chat:
        question = f"{instruction}\n{input}" if input else instruction
        messages = system
        for user, assistant in [*history, (question, output)]:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return ChatRecord(number, messages, None, 0)
    if system or history:
        raise RowError(
            f"{'system' if system else 'history'} needs a chat template, "
            "which the model does not have"
        )
    template = _ALPACA_WITH_INPUT if input else _ALPACA
    prompt = template.format(instruction=instruction, input=input)
    return TextRecord(number, prompt, output)


def _history(row: Row, column: str) -> list[list[str]]:
    pairs = _optional_list(row, column) or []
    for index, pair in enumerate(pairs):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text for text in pair):
            raise RowError(
                f"history[{index}] is no pair of question and answer, two strings"
            )
    return pairs
