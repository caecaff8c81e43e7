"""The flags of a command, as its dataclass tells them: names, types, defaults, help."""

import dataclasses
import difflib
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import docstring_parser


@dataclasses.dataclass(frozen=True)
class Setting:
    """One flag or positional argument, as the dataclass tells it."""

    key: str
    kind: Any
    help: str
    default: Any
    group: str
    """First line of the docstring of the dataclass that it is a field of."""
    is_hidden: bool = False
    """Whether --help leaves it out: the dataclass judges the value and does not keep it."""

    @property
    def flag(self) -> str:
        """The flag's name, with its dashes."""
        return f"--{self.key}"

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        """Whether the bare flag means true."""
        return self.kind in (bool, bool | None)


def join_lists(words: Sequence[str], settings: Iterable[Setting]) -> list[str]:
    """Returns the words with `--flag a b`, as a shell writes a glob, as `--flag ["a","b"]`."""
    takes_list = {setting.flag for setting in settings if _has_list(setting.kind)}
    joined: list[str] = []
    values: list[str] = []
    for word in [*words, "--"]:
        if values and word.startswith("--"):
            joined.append(values[0] if len(values) == 1 else json.dumps(values))
            values = []
        elif values or (joined and joined[-1] in takes_list):
            values.append(word)
            continue
        joined.append(word)
    return joined[:-1]


def _has_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list or any(
        _has_list(part) for part in typing.get_args(kind)
    )


def all_settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Yields the fields of a dataclass and, after them, of those inside it."""
    documents = docstring_parser.parse_from_object(cls).params
    helps = {document.arg_name: document.description for document in documents}
    groups = []
    for item in cls.__dataclass_fields__.values():  # init-only ones, too
        # A field that would be a Python keyword ends in "_"; its flag does not.
        key = prefix + item.name.rstrip("_")
        if dataclasses.is_dataclass(item.type):
            groups += all_settings(typing.cast(type, item.type), f"{key}.")
            continue
        is_hidden = isinstance(item.type, dataclasses.InitVar)
        kind = item.type.type if is_hidden else item.type
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        help = " ".join((helps.get(item.name) or "").split())
        yield Setting(key, kind, help, default, summary_of(cls), is_hidden)
    yield from groups


def summary_of(cls: type) -> str:
    """Returns the first line of a class's docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def help_text(
    program: str, summary: str, positional: Sequence[str], settings: dict[str, Setting]
) -> str:
    """Returns the answer to --help: usage, then meaning, type and default per flag."""
    required = [
        f"{s.flag} {s.key.upper()}"
        for s in settings.values()
        if s.is_required and s.key not in positional
    ]
    usage = [program, *map(str.upper, positional), *required, "[flags]"]
    rows = {f"usage: {' '.join(usage)}\n\n{summary}": []}
    for s in settings.values():
        if s.is_hidden:
            continue
        default = "required" if s.is_required else f"default {as_text(s.default)}"
        first = s.key in positional or s.is_required or s.group == summary
        rows.setdefault("" if first else s.group.rstrip("."), []).append(
            (
                s.key.upper() if s.key in positional else s.flag,
                f"{s.help} ({re.sub(r'^an? ', '', describe(s.kind))}, {default})",
            )
        )
    rows[""].append(
        (
            "--config",
            "YAML file with the same keys; flags beat it, later flags earlier ones.",
        )
    )
    rows[""].append(("--help", "Print this."))
    indent = 4 + max(len(name) for group in rows.values() for name, _ in group)
    width = max(shutil.get_terminal_size().columns, indent + 40)
    lines = []
    for title, group in rows.items():
        lines += [title] if title else []
        lines += [
            textwrap.fill(
                f"  {name:<{indent - 2}}{text}",
                width,
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            for name, text in group
        ]
        lines.append("")
    return "\n".join(lines)


def describe(kind: Any) -> str:
    """Returns what a value of this type looks like, with its article."""
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        type(None): "null",
        Any: "anything",
    }
    if kind in names:
        return names[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(part) for part in parts if part is not type(None))
    if origin is list:
        return "a list such as " + ("[0,1]" if int in parts else "[first,second]")
    return "a mapping such as {name: value}"


def as_text(value: Any) -> str:
    """Returns a value as it is written after a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def nearest_setting(name: str, known: Iterable[str]) -> str | None:
    """Returns the known key closest to `name`, with or without its group's name."""
    keys = list(known)
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.7)
    return last[close[0]] if close else None
