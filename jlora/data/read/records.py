"""Turns a row into a validated record, by the format of its source."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jlora.data.read.bad_rows import RowError
from jlora.data.read.conversations import (
    Message,
    Row,
    check_type,
    messages_of,
    sharegpt_messages,
    sharegpt_tools,
    take_weights,
    tools_of,
    value_of,
)
from jlora.data.read.row_formats import COLUMNS, RowFormat

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
    untrained: frozenset[int] = frozenset()
    """Indices of the messages that the data says not to train on."""


def split_turns(record: ChatRecord) -> list[ChatRecord]:
    """Returns a record for each answer to train on: it, and the messages before it."""
    return [
        replace(record, messages=record.messages[: index + 1], untrained=frozenset())
        for index, message in enumerate(record.messages)
        if message["role"] == "assistant"
        and index >= record.num_prompt
        and index not in record.untrained
    ]


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
    find_tools = tools_of
    if row_format.name == "sharegpt":
        messages = _system(row, column["system"])
        messages += sharegpt_messages(row, column["conversations"])
        find_tools = sharegpt_tools
    elif row_format.name == "messages":
        messages = messages_of(row, column["messages"])
    else:
        for name in ("prompt", "completion"):  # a string would be plain text
            value = value_of(row, column[name])
            check_type(value, column[name], list, "a list of messages")
        messages = messages_of(row, column["prompt"])
        num_prompt = len(messages)
        messages = messages + messages_of(row, column["completion"])
    messages, untrained = take_weights(messages)
    tools = find_tools(row, column["tools"])
    return ChatRecord(number, messages, tools, num_prompt, untrained)


def _text(row: Row, column: str) -> str:
    value = value_of(row, column)
    check_type(value, column, str, "a string")
    if not value:
        raise RowError(f"{column} is empty")
    return value


def _optional_text(row: Row, column: str) -> str:
    return "" if row.get(column) in (None, "") else _text(row, column)


def _optional_list(row: Row, column: str) -> list[Any] | None:
    value = row.get(column)
    if value is not None:
        check_type(value, column, list, "a list")
    return value


def _system(row: Row, column: str) -> list[Message]:
    system = _optional_text(row, column)
    return [{"role": "system", "content": system}] if system else []


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
