"""Rows to validated records: which columns a format has and what they must hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlora.data.read.jsonl import RowError, type_name
from jlora.errors import CorruptError, UsageError, listing, nearest

# The columns that a row of each format must have; auto takes the first that fits.
REQUIRED = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL = {
    "messages": ("tools",),
    "prompt_completion": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "text": (),
}
COLUMNS = {name: REQUIRED[name] + _OPTIONAL[name] for name in REQUIRED}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
# As published with Stanford Alpaca; nothing stands between them and the answer.
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
    """Plain text; the part before `completion` is context ("" for format text)."""

    number: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation; its first `num_prompt` messages are the prompt, if any are."""

    number: int
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    num_prompt: int


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read."""

    format: str
    is_chat: bool
    """Whether a row is a conversation, to be rendered by the chat template."""
    fields: Mapping[str, str]
    """The format's name of a column -> its name in the rows, where they differ."""

    def column(self, name: str) -> str:
        """Returns what the rows call the format's column `name`."""
        return self.fields.get(name, name)


def known_columns(fields: Mapping[str, str]) -> frozenset[str]:
    """Returns all column names that any format would read."""
    names = {name for columns in COLUMNS.values() for name in columns}
    return frozenset(names | set(fields.values()))


def detect_layout(
    row: Mapping[str, Any],
    *,
    format: str,
    fields: Mapping[str, str],
    has_template: bool,
    where: str,
) -> Layout:
    """Returns the layout of a source from its first row; `format` may be auto.

    Raises:
        UsageError: a field that no format has, or not the named one.
        CorruptError: the row fits no format.
    """
    formats = list(REQUIRED) if format == "auto" else [format]
    fitting = [name for name in formats if set(fields) <= set(COLUMNS[name])]
    if not fitting:
        known = sorted({name for f in formats for name in COLUMNS[f]})
        wrong = next((name for name in fields if name not in known), "")
        what = f"{wrong!r} is no field of" if wrong else "no one format has all of"
        raise UsageError(
            f"data.fields={dict(fields)}: {what} format {listing(formats)}"
            f"{nearest(wrong, known)}; the fields are {listing(known, limit=20)}"
        )
    if format == "auto":
        format = _detect(row, fitting, fields, where)
    is_chat = {
        "text": False,
        "prompt_completion": isinstance(row.get(fields.get("prompt", "prompt")), list),
        "alpaca": has_template,
    }.get(format, True)
    return Layout(format, is_chat, dict(fields))


def _detect(
    row: Mapping[str, Any], formats: list[str], fields: Mapping[str, str], where: str
) -> str:
    for format in formats:
        if all(fields.get(name, name) in row for name in REQUIRED[format]):
            return format
    expected = " or ".join(
        " + ".join(fields.get(name, name) for name in REQUIRED[format])
        for format in formats
    )
    raise CorruptError(
        f"{where}: the keys {listing(sorted(row)) or '(none)'} fit no format; expected "
        f"{expected}, or give the names with data.fields, such as "
        "{prompt: question, completion: answer}"
    )


def make_record(
    number: int, row: Mapping[str, Any], layout: Layout
) -> TextRecord | ChatRecord:
    """Returns the record of one row.

    Raises:
        RowError: the row does not hold what its format needs.
    """
    view = _View(row, layout)
    if layout.format == "text":
        return TextRecord(number, "", view.text("text"))
    if layout.format == "alpaca":
        return _alpaca(number, view, layout.is_chat)
    if layout.format == "sharegpt":
        messages = view.optional_system() + _sharegpt_messages(view)
        return ChatRecord(number, messages, view.tools(), 0)
    if layout.format == "messages":
        return ChatRecord(number, view.messages("messages"), view.tools(), 0)
    if not layout.is_chat:
        return TextRecord(number, view.text("prompt"), view.text("completion"))
    prompt, completion = view.messages("prompt"), view.messages("completion")
    return ChatRecord(number, prompt + completion, view.tools(), len(prompt))


class _View:
    """A row under its format's column names; whoever asks gets the right type."""

    def __init__(self, row: Mapping[str, Any], layout: Layout) -> None:
        self._row, self._layout = row, layout

    def value(self, name: str) -> tuple[str, Any]:
        column = self._layout.column(name)
        if column not in self._row:
            raise RowError(f"no {column}{nearest(column, self._row)}")
        return column, self._row[column]

    def text(self, name: str) -> str:
        column, value = self.value(name)
        if not isinstance(value, str):
            raise RowError(f"{column} is {type_name(value)}; expected a string")
        if not value:
            raise RowError(f"{column} is empty")
        return value

    def optional_text(self, name: str) -> str:
        value = self._row.get(self._layout.column(name))
        return "" if value is None or value == "" else self.text(name)

    def optional_system(self) -> list[dict[str, Any]]:
        system = self.optional_text("system")
        return [{"role": "system", "content": system}] if system else []

    def tools(self) -> list[Any] | None:
        has_tools = self._row.get(self._layout.column("tools")) is not None
        return self.optional_list("tools") if has_tools else None

    def optional_list(self, name: str) -> list[Any]:
        column = self._layout.column(name)
        value = self._row.get(column)
        if value is not None and not isinstance(value, list):
            raise RowError(f"{column} is {type_name(value)}; expected a list")
        return value or []

    def items(self, name: str) -> tuple[str, list[Any]]:
        column, value = self.value(name)
        if not isinstance(value, list):
            raise RowError(
                f"{column} is {type_name(value)}; expected a list of messages"
            )
        if not value:
            raise RowError(f"{column} is an empty list")
        return column, value

    def messages(self, name: str) -> list[dict[str, Any]]:
        column, value = self.items(name)
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


def _sharegpt_messages(view: _View) -> list[dict[str, Any]]:
    column, turns = view.items("conversations")
    messages = []
    for index, turn in enumerate(turns):
        name = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f"{name} is {type_name(turn)}; expected an object")
        for key in ("from", "value"):
            if key not in turn:
                hint = ""
                if "role" in turn and "content" in turn:
                    hint = (
                        "; role and content belong to the format messages: give "
                        f"data.format=messages and data.fields={{messages: {column}}}"
                    )
                raise RowError(f"{name} has no {key}{hint}")
            if not isinstance(turn[key], str):
                raise RowError(
                    f"{name}.{key} is {type_name(turn[key])}; expected a string"
                )
        if turn["from"] not in _SHAREGPT_ROLES:
            raise RowError(
                f"{name}.from is {turn['from']!r}"
                f"{nearest(turn['from'], _SHAREGPT_ROLES)}; "
                f"expected one of {', '.join(_SHAREGPT_ROLES)}"
            )
        message = {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        if not turn["value"] and message["role"] not in ("system", "tool"):
            raise RowError(f"{name}.value is empty")
        messages.append(message)
    return messages


def _alpaca(number: int, view: _View, is_chat: bool) -> TextRecord | ChatRecord:
    instruction, output = view.text("instruction"), view.text("output")
    input, system = view.optional_text("input"), view.optional_system()
    history = _history(view)
    if is_chat:
        question = f"{instruction}\n{input}" if input else instruction
        turns = [*history, (question, output)]
        messages = system + [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return ChatRecord(number, messages, None, 0)
    if system or history:
        raise RowError(
            f"{'system' if system else 'history'} needs a chat template, "
            "which the model does not have"
        )
    form = _ALPACA_WITH_INPUT if input else _ALPACA
    return TextRecord(number, form.format(instruction=instruction, input=input), output)


def _history(view: _View) -> list[tuple[str, str]]:
    pairs = view.optional_list("history")
    for index, pair in enumerate(pairs):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text for text in pair):
            raise RowError(
                f"history[{index}] is no pair of question and answer, two strings"
            )
    return [(question, answer) for question, answer in pairs]
