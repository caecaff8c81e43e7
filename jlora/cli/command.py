"""Flags, configuration files and exit statuses: the one way a command starts and fails.

A command is a dataclass (fields are flags, docstrings are help) and a `main` that takes
an instance of it. Flags beat the file given by `--config`. Above 300 lines, as what can
be wrong with either is told in one place.
"""

import dataclasses
import difflib
import errno
import functools
import importlib.metadata
import logging
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse

from jlora.cli.flags import (
    Setting,
    all_settings,
    as_text,
    describe,
    help_text,
    join_lists,
    nearest_setting,
    summary_of,
)
from jlora.cli.strict_yaml import read_yaml
from jlora.errors import (
    JloraError,
    ResourceError,
    UsageError,
    is_out_of_memory,
    listing,
)

# What a path of the user's can be guilty of, wherever it is found out.
_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
T = TypeVar("T")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(jsonargparse.ArgumentParser):
    """Raises what it refuses, and prints help of one line per flag."""

    help_text = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _Refused(str(ex or message)) from ex

    def format_help(self, formatter: Any = None) -> str:
        return self.help_text


class _Refused(Exception):
    """What jsonargparse has to say; `_explain` puts it in the user's words."""


def run_command(
    main: Callable[[Any], None],
    arguments_class: type,
    *,
    positional: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Returns the exit status of `main(arguments)`, printing one message for a failure.

    Args:
        main: the command.
        arguments_class: dataclass of its flags; nested dataclasses are flag groups.
        positional: fields given by position instead of by flag.
        argv: the words of the command line; None takes them from sys.argv.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Orbax logs tracebacks of what is told below in one message.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        check_versions()
        main(parse(arguments_class, words, positional=positional))
    except JloraError as error:
        return _fail(str(error), error.exit_status, error.label)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError as error:
        why = str(error) or "no more was to be had"
        return _fail(
            f"out of memory: {why}; end other programs or take a larger machine",
            ResourceError.exit_status,
        )
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the disk{where}", ResourceError.exit_status)
        if not isinstance(error, _PATH_ERRORS) or not where:
            raise
        return _fail(f"{error.filename}: {error.strerror}", UsageError.exit_status)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        return _fail(
            f"out of device memory ({first}); use fewer rows at a time "
            "(train.grad_accum_steps), a shorter data.seq_len, or compute.remat full or offload",
            ResourceError.exit_status,
        )
    return 0


def _fail(message: str, status: int, label: str = "error") -> int:
    sys.stdout.flush()
    print(f"{label}: {message}", file=sys.stderr)
    return status


def check_versions() -> None:
    """Refuses jax >= 0.11.1 with flax < 0.12.9, a pair whose nnx cannot be imported.

    Raises:
        UsageError: the pair is installed.
    """
    jax, flax = (importlib.metadata.version(name) for name in ("jax", "flax"))
    if _version(jax) >= (0, 11, 1) and _version(flax) < (0, 12, 9):
        raise UsageError(
            f"jax {jax} does not work with flax {flax}; "
            "install flax 0.12.9 or newer (pip install -U flax)"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def parse(cls: type[T], words: Sequence[str], *, positional: Sequence[str] = ()) -> T:
    """Returns an instance of `cls` from command line words and an optional YAML file.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong type, or one missing.
    """
    settings = {s.key: s for s in all_settings(cls)}
    flags = {key: s for key, s in settings.items() if key not in positional}
    parser = _make_parser(cls, positional, settings)
    if not positional:  # which could stand after a list
        words = join_lists(words, flags.values())
    words, file = _take_config_file(_check_flags(words, flags))
    taken = {word.split("=", 1)[0] for word in words if word.startswith("--")}
    from_file = {}
    if file is not None:
        from_file = _as_words(read_yaml(file), flags, f"{file}")
    from_file = {k: word for k, word in from_file.items() if f"--{k}" not in taken}
    where = {key: f"{file}: {key}" for key in from_file}
    words = [*from_file.values(), *words]
    return _instantiate(cls, parser, words, settings, positional, where)


def with_changes(args: T, changes: dict[str, Any], where: str) -> T:
    """Returns a command's arguments with some settings changed, checked as flags are.

    Args:
        args: an instance of the command's dataclass.
        changes: keys as in a file for --config, nested or dotted.
        where: what to call the source of the changes.

    Raises:
        UsageError: as `parse`.
    """
    cls = type(args)
    settings = {s.key: s for s in all_settings(cls)}
    changed = _as_words(changes, settings, where)
    values = {key: functools.reduce(getattr, key.split("."), args) for key in settings}
    kept = [f"--{k}={as_text(v)}" for k, v in values.items() if k not in changed]
    parser = _make_parser(cls, (), settings)
    sources = {key: f"{where}: {key}" for key in changed}
    words = [*kept, *changed.values()]
    return _instantiate(cls, parser, words, settings, (), sources)


def _instantiate(
    cls: type[T],
    parser: _Parser,
    words: list[str],
    settings: dict[str, Setting],
    positional: Sequence[str],
    where: dict[str, str],
) -> T:
    try:
        values = parser.parse_args(words)
    except _Refused as error:
        raise UsageError(_explain(str(error), settings, positional, where)) from error
    fields = parser.instantiate(values).as_dict()
    return cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _make_parser(
    cls: type, positional: Sequence[str], settings: dict[str, Setting]
) -> _Parser:
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python {f'-m {main.name}' if main else Path(sys.argv[0]).name}"
    parser = _Parser(prog=program, allow_abbrev=False)
    for name in positional:
        parser.add_argument(name, type=str)
    parser.add_class_arguments(cls, skip=set(positional))
    for action in parser._actions:  # as in `all_settings`: no "_" at the end
        action.option_strings = [
            option.rstrip("_") for option in action.option_strings if option[-1] != "+"
        ]
        for option in action.option_strings:
            parser._option_string_actions[option] = action
    parser.help_text = help_text(program, summary_of(cls), positional, settings)
    return parser


def _explain(
    message: str,
    settings: dict[str, Setting],
    positional: Sequence[str],
    where: dict[str, str],
) -> str:
    """Returns a refusal of jsonargparse's as: where, what came, what was expected."""
    message = " ".join(message.split())
    if match := re.match(
        r'Parser key "([\w.]+?)_?": .*(?:Got|Given) value: ?(.*)', message
    ):
        key, value = match[1], "null" if match[2] == "None" else match[2]
        kind = settings[key].kind
        known = [str(part) for part in typing.get_args(kind)]
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return (
            f"{where.get(key, f'--{key}')} is {value!r}; "
            f"expected {describe(kind)}{hint}"
        )
    if match := re.search(r"arguments are required: (.*)", message):
        missing = [settings[key.rstrip("_")] for key in match[1].split(", ")]
        names = [
            f"{s.key.upper() if s.key in positional else s.flag} ({s.help.rstrip('.')})"
            for s in missing
        ]
        return f"missing: {listing(names)}; --help lists all"
    if match := re.match(r"argument (\S+): expected one argument", message):
        setting = settings[match[1].removeprefix("--")]
        return (
            f"{match[1]} needs a value: {describe(setting.kind)} (one that starts "
            f"with a dash is written {match[1]}=VALUE)"
        )
    if match := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        return (
            f"unexpected: {match[1]}; a flag starts with --, a switch takes true or "
            "false, a list is one word: [a,b]"
        )
    return message


def _check_flags(words: Sequence[str], flags: dict[str, Setting]) -> list[str]:
    """Refuses unknown flags, and spells out bare switches as `--flag=true`."""
    known = {s.flag: s for s in flags.values()}
    checked = []
    for i, word in enumerate(words):
        name = word.split("=", 1)[0]
        if word.startswith("--") and name not in (*known, "--config", "--help"):
            hint = nearest_setting(name[2:], flags)
            raise UsageError(
                f"unknown flag {name}"
                + (f"; did you mean --{hint}?" if hint else "; --help lists all")
            )
        if word in known and known[word].is_switch:
            following = words[i + 1] if i + 1 < len(words) else "--"
            if following.lower() not in ("true", "false"):
                word += "=true"
        checked.append(word)
    return checked


def _take_config_file(words: list[str]) -> tuple[list[str], Path | None]:
    rest, files = [], []
    remaining = iter(words)
    for word in remaining:
        if word == "--config":
            files.append(next(remaining, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(files) > 1:
        raise UsageError(f"--config is given {len(files)} times; give one file")
    if files and (not files[0] or files[0].startswith("--")):
        raise UsageError("--config needs a YAML file")
    return rest, Path(files[0]) if files else None


def _as_words(
    document: dict[str, Any],
    flags: dict[str, Setting],
    where: str,
) -> dict[str, str]:
    """Returns {key: flag with value} of a mapping that a file gives."""
    words = {}
    for key, value in _flatten(document, flags, where).items():
        if key not in flags:
            close = nearest_setting(key, flags)
            hint = f"; did you mean {close!r}?" if close else ""
            raise UsageError(f"{where}: unknown key {key!r}{hint}")
        kind = flags[key].kind
        if isinstance(value, str) and kind in (int, float, bool):
            raise UsageError(
                f"{where}: {key} is the text {value!r}; "
                f"expected {describe(kind)}, without quotes"
            )
        words[key] = f"--{key}={as_text(value)}"
    return words


def _flatten(
    tree: dict[str, Any], flags: dict[str, Setting], where: str, prefix: str = ""
) -> dict[str, Any]:
    """Returns dotted keys; a mapping that is itself a setting's value stays whole."""
    result = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        members = [
            k.removeprefix(f"{name}.") for k in flags if k.startswith(f"{name}.")
        ]
        if members and not isinstance(value, dict | None):
            raise UsageError(
                f"{where}: {name} is {value!r}; expected keys below it: "
                f"{listing(members)}"
            )
        if members or (isinstance(value, dict) and name not in flags):
            result |= _flatten(value or {}, flags, where, f"{name}.")
        else:
            result[name] = value
    return result
