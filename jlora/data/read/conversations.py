"""Turns the columns of a conversation into messages and tools, as chat templates take them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.data.read.bad_rows import RowError
from jlora.data.read.jsonl import type_name
from jlora.data.read.pyarrow_files import without_nulls
from jlora.errors import nearest

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
# Keys of a message that say whether the loss counts it: of OpenAI and Mistral, of Axolotl.
_WEIGHT_KEYS = ("weight", "train", "training")
_NO_TOOLS = ("", "[]", "null")
Row = Mapping[str, Any]
Message = dict[str, Any]


def check_type(value: Any, name: str, kind: type, expected: str) -> None:
    """Raises RowError if a value is not of the type."""
    if not isinstance(value, kind):
        raise RowError(f"{name} is {type_name(value)}; expected {expected}")


def value_of(row: Row, column: str) -> Any:
    """Returns the value of a column; raises RowError if the row has none."""
    if column not in row:
        raise RowError(f"no {column}{nearest(column, row)}")
    return row[column]


def messages_of(row: Row, column: str) -> list[Message]:
    """Returns the messages of a column `[{role, content}]`; they may be JSON text.

    Raises:
        RowError: something that is no message.
    """
    messages = []
    for index, item in enumerate(_items(row, column)):
        name = f"{column}[{index}]"
        message = dict(_object(item, name))
        if calls := message.get("tool_calls"):
            message["tool_calls"] = _parsed_items(calls, f"{name}.tool_calls")
        if isinstance(message.get("content"), list):
            message["content"] = without_nulls(message["content"])
        _check_message(message, name)
        messages.append(message)
    return messages


def sharegpt_messages(row: Row, column: str) -> list[Message]:
    """Returns the messages of a column `[{from, value}]`, which may be JSON text.

    Raises:
        RowError: something that is no turn.
    """
    messages = []
    for index, item in enumerate(_items(row, column)):
        name = f"{column}[{index}]"
        turn = _object(item, name)
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
        message = {"role": role, "content": turn["value"]}
        if turn["from"] == "function_call":
            calls = _sharegpt_calls(turn["value"], f"{name}.value")
            message = {"role": role, "tool_calls": calls}
        weights = {key: turn[key] for key in _WEIGHT_KEYS if key in turn}
        messages.append(message | weights)
    return messages


def tools_of(row: Row, column: str) -> list[Any] | None:
    """Returns the tools of a column, None without any; they may be JSON text.

    Raises:
        RowError: no list.
    """
    value = row.get(column)
    # LLaMA-Factory writes "[]" where there are no tools.
    if value is None or (isinstance(value, str) and value.strip() in _NO_TOOLS):
        return None
    return _parsed_items(value, column)


def sharegpt_tools(row: Row, column: str) -> list[Any] | None:
    """Returns `tools_of`, each in the form that chat templates know."""
    tools = tools_of(row, column)
    return tools and [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "name" in tool and "function" not in tool
        else tool
        for tool in tools
    ]


def take_weights(messages: list[Message]) -> tuple[list[Message], frozenset[int]]:
    """Returns the messages without the keys that weigh them, and which are not trained on.

    Raises:
        RowError: a weight other than 0 and 1, true and false.
    """
    untrained = set()
    for index, message in enumerate(messages):
        for key in _WEIGHT_KEYS:
            value = message.get(key)
            if value is None:
                continue
            is_flag = isinstance(value, bool)
            if is_flag if key == "weight" else not is_flag:
                expected = "0 or 1" if key == "weight" else "true or false"
                raise RowError(
                    f"message {index} has {key} {value!r}; expected {expected}"
                )
            if value not in (0, 1):
                raise RowError(
                    f"message {index} has {key} {value!r}; expected 0 or 1, as jlora "
                    "counts a turn whole or not at all"
                )
            if not value:
                untrained.add(index)
    if any(key in message for message in messages for key in _WEIGHT_KEYS):
        messages = [
            {key: value for key, value in message.items() if key not in _WEIGHT_KEYS}
            for message in messages
        ]
    return messages, frozenset(untrained)


def _items(row: Row, column: str) -> list[Any]:
    value = value_of(row, column)
    if isinstance(value, str):
        value = _parsed(value, column, "a list of messages")
    check_type(value, column, list, "a list of messages")
    if not value:
        raise RowError(f"{column} is an empty list")
    return value


def _parsed_items(value: Any, name: str) -> list[Any]:
    """Returns a list whose items may be JSON text, as may be the whole.

    Only nulls outside of JSON text are dropped: those stand for what other rows have.
    """
    is_text = isinstance(value, str)
    if is_text:
        value = _parsed(value, name, "a list")
    check_type(value, name, list, "a list")
    return [
        _parsed(item, f"{name}[{index}]", "an object")
        if isinstance(item, str)
        else (item if is_text else without_nulls(item))
        for index, item in enumerate(value)
    ]


def _object(item: Any, name: str) -> dict[str, Any]:
    if isinstance(item, str):
        item = _parsed(item, name, "an object")
    check_type(item, name, dict, "an object")
    return item


def _parsed(text: str, name: str, expected: str) -> Any:
    """Returns the value that a string holds as JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RowError(
            f"{name} is a string; expected {expected}, or the JSON text of one ({reason})"
        ) from error


def _check_strings(item: Row, name: str, keys: Iterable[str], hint: str = "") -> None:
    for key in keys:
        if key not in item:
            raise RowError(f"{name} has no {key}{hint}")
        check_type(item[key], f"{name}.{key}", str, "a string")


def _check_message(message: Message, name: str) -> None:
    has_calls = message.get("tool_calls")
    is_call_only = message.get("content") is None and has_calls
    is_parts = isinstance(message.get("content"), list)
    only_role = is_call_only or is_parts
    _check_strings(message, name, ("role",) if only_role else ("role", "content"))
    if not message["role"]:
        raise RowError(f"{name}.role is empty")
    text = message.get("content")
    if is_parts:
        text = "".join(_part_texts(message["content"], f"{name}.content"))
    # A tool may return nothing and a system turn may be blank; a question or an answer
    # without words is a fault of the data.
    may_be_empty = message["role"] in ("system", "tool") or has_calls
    if not (text or may_be_empty):
        raise RowError(f"{name}.content is empty")


def _part_texts(parts: list[Any], name: str) -> list[str]:
    """Returns the texts of a content `[{type: text, text: ...}]`."""
    texts = []
    for index, part in enumerate(parts):
        where = f"{name}[{index}]"
        check_type(part, where, dict, "an object with type and text")
        if part.get("type") != "text":
            raise RowError(
                f"{where} is of type {part.get('type')!r}; jlora trains on text only"
            )
        _check_strings(part, where, ("text",))
        texts.append(part["text"])
    return texts


def _sharegpt_calls(text: str, name: str) -> list[dict[str, Any]]:
    """Returns the tool calls of a turn `{"name": ..., "arguments": ...}`, or several."""
    calls = _parsed(text, name, "a tool call")
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError(
                f"{name} is no tool call; expected the JSON text of an object with name "
                "and arguments, or of a list of them"
            )
        function = {"name": call["name"], "arguments": call.get("arguments", {})}
        result.append({"type": "function", "function": function})
    if not result:
        raise RowError(f"{name} is an empty list of tool calls")
    return result
