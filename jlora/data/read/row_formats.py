"""The formats that rows may have: their columns, and what the loss may count in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlora.config.run_config import RowConfig
from jlora.errors import CorruptError, UsageError, listing, nearest

# The columns that a row of each format must have; auto takes the first that fits.
_REQUIRED = {
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
COLUMNS = {name: _REQUIRED[name] + _OPTIONAL[name] for name in _REQUIRED}
_CHAT_TRAIN_ON = ("assistant", "last_assistant", "completion", "all")
# By (format, whether rows are conversations): what data.train_on may be; auto: the first.
_TRAIN_ON = {
    ("text", False): ("all",),
    ("prompt_completion", False): ("completion", "all"),
    ("prompt_completion", True): ("completion", "assistant", "last_assistant", "all"),
    ("messages", True): _CHAT_TRAIN_ON,
    ("sharegpt", True): _CHAT_TRAIN_ON,
    ("alpaca", True): _CHAT_TRAIN_ON,
    # The only answer, whatever it is called.
    ("alpaca", False): ("completion", "assistant", "last_assistant", "all"),
}


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a source become examples."""

    name: str
    is_chat: bool
    """Whether a row is a conversation, to be rendered by the chat template."""
    fields: Mapping[str, str]
    """The format's name of a column -> its name in the data, where they differ."""
    train_on: str
    """Which tokens the loss counts; never auto."""
    split_turns: bool = False
    """Whether each answer becomes a sample of its own."""


def detect_format(
    row: Mapping[str, Any],
    config: RowConfig,
    *,
    has_template: bool,
    source: str,
    where: str,
) -> RowFormat:
    """Returns the format of a source by its first good row, which is at `where`.

    Raises:
        UsageError: a field, a choice of data.train_on or turns that it does not have.
        CorruptError: the row fits no format.
    """
    fields = config.fields or {}
    names = _formats_with(fields, config.format)
    name = _match(row, names, fields, where) if config.format == "auto" else names[0]
    is_chat = {
        "text": False,
        "prompt_completion": isinstance(row.get(fields.get("prompt", "prompt")), list),
        "alpaca": has_template,
    }.get(name, True)
    choices = _TRAIN_ON[name, is_chat]
    train_on = choices[0] if config.train_on == "auto" else config.train_on
    if train_on not in choices:
        kind = " with strings" if name == "prompt_completion" else ""
        raise UsageError(
            f"data.train_on={train_on} does not fit {source}, which is of format "
            f"{name}{kind}; choose {listing(['auto', *choices])}"
        )
    if config.split_turns and not is_chat:
        raise UsageError(
            f"data.split_turns has no effect on {source}, which is of format {name} without "
            "conversations; leave it out"
        )
    return RowFormat(name, is_chat, dict(fields), train_on, config.split_turns)


def _formats_with(fields: Mapping[str, str], format: str) -> list[str]:
    """Returns the formats allowed by data.format that have all of data.fields."""
    formats = list(COLUMNS) if format == "auto" else [format]
    fitting = [name for name in formats if set(fields) <= set(COLUMNS[name])]
    if not fitting:
        known = sorted({column for name in formats for column in COLUMNS[name]})
        wrong = next((name for name in fields if name not in known), "")
        what = f"{wrong!r} is no field of" if wrong else "no one format has all of"
        raise UsageError(
            f"data.fields={dict(fields)}: {what} format {listing(formats)}"
            f"{nearest(wrong, known)}; the fields are {listing(known, limit=20)}"
        )
    return fitting


def _match(
    row: Mapping[str, Any], formats: list[str], fields: Mapping[str, str], where: str
) -> str:
    """Returns the first format whose required columns the row has."""
    wanted = {f: [fields.get(name, name) for name in _REQUIRED[f]] for f in formats}
    for format, columns in wanted.items():
        if all(column in row for column in columns):
            return format
    raise CorruptError(
        f"{where}: the keys {listing(sorted(row)) or '(none)'} fit no format; expected "
        f"{' or '.join(' + '.join(columns) for columns in wanted.values())}, or give "
        "the names with data.fields, such as {prompt: question, completion: answer}"
    )
