"""The words of a command line, and a YAML file, as an instance of a command's dataclass."""

import collections
import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jlora.cli.flag_values import as_text, describe, from_words, from_yaml, list_items
from jlora.cli.flags import Flag, flags_of, nearest_key
from jlora.cli.foreign_config import foreign_keys, name_here
from jlora.cli.strict_yaml import read_yaml
from jlora.errors import UsageError, listing, nearest

T = TypeVar("T")
Flags = Mapping[str, Flag]
_CONFIG = Flag("config", str, "", None, "")


def parse(cls: type[T], words: Sequence[str]) -> T:
    """Returns an instance of `cls`; flags beat the file that --config gives.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong type, or one missing.
    """
    flags = flags_of(cls)
    placed = [flag for flag in flags.values() if flag.is_positional]
    given, free = _split_words(words, flags, may_repeat=not placed)
    named = {key: flag for key, flag in flags.items() if not flag.is_positional}
    by_name = {flag.key for flag, _ in given}
    placed = [flag for flag in placed if flag.key not in by_name]
    rest = free[len(placed) - 1 :]
    takes_rest = placed and len(rest) > 1 and list_items(placed[-1].kind)
    if takes_rest:
        given.append((placed.pop(), rest))
        free = free[: len(placed)]
    if len(free) > len(placed):
        raise UsageError(
            f"unexpected: {' '.join(free[len(placed) :])}; a flag starts with --, "
            "a switch takes true or false, a list is one word: [a,b]"
        )
    given += [(flag, [word]) for flag, word in zip(placed, free, strict=False)]
    values = _read_config([texts[0] for flag, texts in given if flag is _CONFIG], named)
    added: dict[str, Any] = {}
    for flag, texts in given:
        if flag is not _CONFIG:
            before = added.get(flag.key, []) if flag.is_repeated else None
            value = _value_of(flag, texts)
            added[flag.key] = value if before is None else [*before, *value]
    replaced = {key for name in added for key in flags[name].replaces(added[name])}
    values = {k: v for k, v in values.items() if k not in replaced} | added
    missing = [f for f in flags.values() if f.is_required and f.key not in values]
    if missing:
        names = [f"{flag.name} ({flag.help.rstrip('.')})" for flag in missing]
        raise UsageError(f"missing: {listing(names)}; --help lists all")
    return cls(**_fields_of(cls, values))


def with_changes(args: T, changes: Mapping[str, Any], where: str) -> T:
    """Returns a command's arguments with some settings changed, checked as flags are.

    Args:
        args: an instance of the command's dataclass.
        changes: keys as in a file for --config, nested or dotted.
        where: what error messages call the source of the changes.

    Raises:
        UsageError: as `parse`.
    """
    values = _from_mapping(changes, flags_of(type(args)), where)
    fields = _fields_of(type(args), values, args)
    return dataclasses.replace(typing.cast(Any, args), **fields)


def _fields_of(
    cls: type, values: Mapping[str, Any], base: Any = None, prefix: str = ""
) -> dict[str, Any]:
    """Returns {field: value}; groups are made anew, or are those of `base` with changes."""
    fields = {}
    for item in typing.cast(Any, cls).__dataclass_fields__.values():
        key = prefix + item.name.rstrip("_")
        if dataclasses.is_dataclass(item.type):
            kind, group = typing.cast(type, item.type), getattr(base, item.name, None)
            inner = _fields_of(kind, values, group, f"{key}.")
            made = dataclasses.replace(group, **inner) if group else kind(**inner)
            fields[item.name] = made
        elif key in values:
            fields[item.name] = values[key]
    return fields


def _split_words(
    words: Sequence[str], flags: Flags, *, may_repeat: bool
) -> tuple[list[tuple[Flag, list[str]]], list[str]]:
    """Returns the flags with the words of their values, and the words of no flag.

    Args:
        words: the command line.
        flags: what may be given by name.
        may_repeat: whether a list takes all words up to the next flag, as a shell
            writes a glob; then no word can follow it by position.
    """
    known = {**flags, "config": _CONFIG}
    given, free, unknown = [], [], []
    queue = collections.deque(words)
    while queue:
        word = queue.popleft()
        name, has_value, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            free.append(word)
        elif switch := _switch_of_group(name, text, queue, flags):
            given.append((switch, ["true"]))
        elif name not in known:
            unknown.append(name)
        elif has_value:
            given.append((known[name], [text]))
        else:
            given.append((known[name], _take_value(known[name], queue, may_repeat)))
    _refuse_unknown("unknown flag", "--{}".format, unknown, flags)
    return given, free


def _switch_of_group(
    group: str, text: str, queue: collections.deque[str], flags: Flags
) -> Flag | None:
    """Returns the switch that `--group switch` stands for, and takes its word off the queue."""
    switch = flags.get(f"{group}.{text or ''.join([*queue][:1])}")
    if switch is None or not switch.is_switch:
        return None
    if not text:
        queue.popleft()
    return switch


def _take_value(
    flag: Flag, queue: collections.deque[str], may_repeat: bool
) -> list[str]:
    """Takes the words of a flag's value off the queue."""
    if flag.is_switch:
        is_given = queue and queue[0].lower() in ("true", "false")
        return [queue.popleft()] if is_given else ["true"]
    texts = []
    if queue and not re.match(r"--|-[a-zA-Z]\S*$", queue[0]):
        texts.append(queue.popleft())
        is_list = may_repeat and list_items(flag.kind)
        while is_list and queue and not queue[0].startswith("--"):
            texts.append(queue.popleft())
    elif flag is not _CONFIG:
        raise UsageError(
            f"{flag.name} needs a value: {describe(flag.kind)} (one that starts "
            f"with a dash is written {flag.name}=VALUE)"
        )
    return texts or [""]


def _value_of(flag: Flag, texts: list[str]) -> Any:
    try:
        if flag.is_repeated and not texts[0].startswith("["):  # one or more items
            return [from_words([text], str) for text in texts]
        return from_words(texts, flag.kind)
    except ValueError:
        raise UsageError(_mismatch(flag.name, " ".join(texts), flag.kind)) from None


def _mismatch(where: str, text: str, kind: Any) -> str:
    hint = nearest(text, map(str, typing.get_args(kind)))
    return f"{where} is {text!r}; expected {describe(kind)}{hint}"


def _read_config(files: Sequence[str], flags: Flags) -> dict[str, Any]:
    if len(files) > 1:
        raise UsageError(f"--config is given {len(files)} times; give one file")
    if files == [""]:
        raise UsageError("--config needs a YAML file")
    return _from_mapping(read_yaml(Path(files[0])), flags, files[0]) if files else {}


def _from_mapping(
    document: Mapping[str, Any], flags: Flags, where: str
) -> dict[str, Any]:
    """Returns {key: checked value} of what a file says."""
    values = _flatten(document, flags, where)
    unknown = [key for key in values if key not in flags]
    if foreign := foreign_keys(unknown, flags):
        raise UsageError(f"{where}: {foreign}")
    _refuse_unknown(f"{where}: unknown key", repr, unknown, flags)
    for key, value in values.items():
        kind = flags[key].kind
        try:
            values[key] = from_yaml(value, kind)
        except ValueError:
            if isinstance(value, str) and kind in (int, float, bool):
                raise UsageError(
                    f"{where}: {key} is the text {value!r}; "
                    f"expected {describe(kind)}, without quotes"
                ) from None
            said = _mismatch(f"{where}: {key}", as_text(value), kind)
            raise UsageError(said) from None
    return values


def _flatten(
    tree: Mapping[str, Any], flags: Flags, where: str, prefix: str = ""
) -> dict[str, Any]:
    """Returns dotted keys; a mapping that is itself a flag's value stays whole."""
    result = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        members = [
            k.removeprefix(f"{name}.") for k in flags if k.startswith(f"{name}.")
        ]
        # evaluate has --data and --data.seq_len: data is a file, {file: weight} or a group.
        is_dict = isinstance(value, dict)
        if name in flags and value and not (is_dict and {*value} & {*members}):
            members = []
        switch = flags.get(f"{name}.{value}") if isinstance(value, str) else None
        if switch and switch.is_switch:  # `mesh: auto`
            value = {value: True}
        if members and not isinstance(value, dict | None):
            raise UsageError(
                f"{where}: {name} is {value!r}; expected keys below it: "
                f"{listing(members)}"
            )
        if members or (isinstance(value, dict) and name not in flags):
            below = typing.cast(Mapping[str, Any], value or {})
            inner = _flatten(below, flags, where, f"{name}.")
        else:
            inner = {name: value}
        if twice := sorted(result.keys() & inner.keys()):
            raise UsageError(
                f"{where}: {listing(twice)} is given twice, once below a key and once "
                "with a dot; leave one out"
            )
        result |= inner
    return result


def _refuse_unknown(
    what: str, show: Callable[[str], str], names: Sequence[str], known: Flags
) -> None:
    """Raises UsageError that lists all unknown names, each with the nearest known one."""
    near = {n: name_here(n, known) or nearest_key(n, known) for n in names}
    if len(near) == 1:
        [(name, close)] = near.items()
        hint = f"did you mean {show(close)}?" if close else "--help lists all"
        raise UsageError(f"{what} {show(name)}; {hint}")
    if near:
        hinted = [
            show(name) + (f" (did you mean {show(close)}?)" if close else "")
            for name, close in near.items()
        ]
        raise UsageError(f"{what}s {listing(hinted, 100)}")
