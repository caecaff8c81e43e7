"""Flags, configuration files and exit statuses: the one way a command starts and fails.

A command is a dataclass (fields are flags, docstrings are help) and a `main` that takes
an instance of it. Flags beat the file given by `--config`.
"""

import argparse
import dataclasses
import errno
import importlib.metadata
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import yaml

from jlora.errors import JloraError, ResourceError, UsageError, nearest

MAX_YAML_BYTES = 1 << 20
T = TypeVar("T")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(jsonargparse.ArgumentParser):
    """Raises UsageError, with the nearest name for an unknown flag or key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(" ".join(str(ex or message).split())) from ex


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
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError:
        return _fail("out of memory", ResourceError.exit_status)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        return _fail(f"no space left on the disk{where}", ResourceError.exit_status)
    except RuntimeError as error:  # XLA's out of memory has no class of its own
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        return _fail(
            f"out of device memory ({first}); use fewer rows at a time "
            "(train.grad_accum_steps), a shorter data.seq_len or compute.remat full",
            ResourceError.exit_status,
        )
    return 0


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
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
    parser = _make_parser(cls, positional)
    flags = {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.help != argparse.SUPPRESS
    }
    words = _check_flags(list(words), flags)
    words, file = _take_config_file(words)
    if file is not None:
        words = _words_from_file(file, flags, words) + words
    values = parser.instantiate(parser.parse_args(words)).as_dict()
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _make_parser(cls: type, positional: Sequence[str]) -> _Parser:
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {main.name}" if main else Path(sys.argv[0]).name
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    parser = _Parser(prog=f"python {program}", description=summary, allow_abbrev=False)
    documents = docstring_parser.parse_from_object(cls).params
    helps = {document.arg_name: document.description for document in documents}
    for name in positional:
        parser.add_argument(name, type=str, help=helps.get(name))
    parser.add_class_arguments(cls, skip=set(positional))
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the same keys; flags beat it."
    )
    for action in parser._actions:  # a group takes no file of its own: one way only
        if type(action).__name__ == "_ActionConfigLoad":
            action.help = argparse.SUPPRESS
        # A field that would be a Python keyword ends in "_"; its flag does not.
        action.option_strings = [
            option.rstrip("_") for option in action.option_strings if option[-1] != "+"
        ]
        for option in action.option_strings:
            parser._option_string_actions[option] = action
    return parser


def _check_flags(words: list[str], flags: dict[str, argparse.Action]) -> list[str]:
    """Refuses unknown flags, and spells out bare switches as `--flag=true`."""
    checked = []
    for i, word in enumerate(words):
        name = word.split("=", 1)[0]
        if word.startswith("--") and name not in flags:
            raise UsageError(f"unknown flag {name}{nearest(name, flags)}")
        if word in flags and _is_switch(flags[word]):
            following = words[i + 1] if i + 1 < len(words) else "--"
            if following.lower() not in ("true", "false"):
                word += "=true"
        checked.append(word)
    return checked


def _is_switch(action: argparse.Action) -> bool:
    return getattr(action, "_typehint", action.type) is bool


def _take_config_file(words: list[str]) -> tuple[list[str], Path | None]:
    rest, file = [], None
    remaining = iter(words)
    for word in remaining:
        if word == "--config":
            file = Path(next(remaining, ""))
        elif word.startswith("--config="):
            file = Path(word.removeprefix("--config="))
        else:
            rest.append(word)
    return rest, file


def _words_from_file(
    file: Path, flags: dict[str, argparse.Action], given: list[str]
) -> list[str]:
    """Returns the file's settings as flags, without those that the command line has."""
    taken = {word.split("=", 1)[0] for word in given if word.startswith("--")}
    words = []
    for key, value in _flatten(read_yaml(file), flags).items():
        flag = f"--{key}"
        if flag not in flags or key in ("config", "help"):
            raise UsageError(f"{file}: unknown key {key!r}{nearest(flag, flags)}")
        kind = getattr(flags[flag], "_typehint", flags[flag].type)
        if isinstance(value, str) and kind in (int, float, bool):
            raise UsageError(
                f"{file}: {key} is the string {value!r}; "
                f"expected a plain {kind.__name__}, without quotes"
            )
        if flag not in taken:
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"{flag}={text}")
    return words


def _flatten(
    tree: dict[str, Any], flags: dict[str, argparse.Action], prefix: str = ""
) -> dict[str, Any]:
    """Returns dotted keys; a mapping that is itself a flag's value stays whole."""
    result = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and f"--{name}" not in flags:
            result |= _flatten(value, flags, f"{name}.")
        else:
            result[name] = value
    return result


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's null, booleans and numbers; no anchors, tags or duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent) or self.peek_event().anchor:
            raise yaml.YAMLError("anchors and aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} occurs twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        UsageError: missing, too large, not YAML, not a mapping, duplicate keys.
    """
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise UsageError(f"{file}: more than {MAX_YAML_BYTES:,} bytes of YAML")
        document = yaml.load(file.read_text("utf-8"), _StrictLoader)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file}: not valid: {' '.join(str(error).split())}"
        ) from error
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deeply") from error
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected keys and values")
    return document
