"""Runs a command: its flags come from a dataclass, its failures end in one message.

A command is a dataclass (fields are flags, the strings below them are help texts) and a
`main` that takes an instance of it.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from jlora.cli.arguments import parse
from jlora.cli.flags import flags_of
from jlora.cli.help_page import help_page
from jlora.cli.json_schema import json_schema
from jlora.cli.printing import EscapedOutput
from jlora.cli.process_setup import take_gpu_memory
from jlora.cli.unread_output import allow_closed_output, say_error
from jlora.errors import (
    JloraError,
    ResourceError,
    UsageError,
    is_out_of_memory,
    lacking,
)

_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_PATH_NUMBERS = (errno.ELOOP, errno.ENAMETOOLONG)


@allow_closed_output
def run_command(
    main: Callable[[Any], None],
    arguments_class: type,
    *,
    argv: Sequence[str] | None = None,
    program: str | None = None,
) -> int:
    """Runs `main(arguments)`, prints one message if it fails, and returns the exit status.

    Args:
        main: the command.
        arguments_class: dataclass of its flags; dataclasses inside it are flag groups.
        argv: the words of the command line; None takes them from sys.argv.
        program: what --help calls the command; None finds out how it was started.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _hide_library_errors()
    take_gpu_memory()
    if {"-h", "--help"} & set(words):
        print(help_page(program or _program(), arguments_class))
        return 0
    if "--schema" in words:
        print(json.dumps(json_schema(arguments_class), indent=1))
        return 0
    try:
        check_versions()
        arguments = parse(arguments_class, words)
        with contextlib.redirect_stdout(cast(Any, EscapedOutput(sys.stdout))):
            main(arguments)
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130
    except Exception as error:
        explained = _explain(error, arguments_class)
        if explained is None:
            raise
        message = in_own_flags(str(explained), arguments_class)
        say_error(message, explained.label)
        return explained.exit_status
    return 0


def _explain(error: Exception, arguments_class: type) -> JloraError | None:
    """Returns what to say about an error; None if it is a bug, which keeps its traceback."""
    if isinstance(error, JloraError):
        return error
    if isinstance(error, MemoryError):
        why = str(error) or "the system has no more"
        return ResourceError(
            f"out of memory: {why}; end other programs or take a larger machine"
        )
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        first = str(error).splitlines()[0]
        return ResourceError(
            f"out of device memory ({first}); use {_less_memory(arguments_class)}"
        )
    name = error.filename if isinstance(error, OSError) else None
    if problem := lacking(error):
        return ResourceError(f"{problem} at {name}" if name else problem)
    mistake = _path_mistake(error)
    return UsageError(mistake) if mistake else None


def in_own_flags(text: str, arguments_class: type) -> str:
    """Returns a message with the names that a command without flag groups has for its flags.

    The library calls a setting compute.dtype, as train.py does; evaluate.py has --dtype.
    """
    own = {field.name for field in dataclasses.fields(arguments_class)}
    groups = _groups(arguments_class)

    def name(match: re.Match[str]) -> str:
        return match[2] if match[2] in own and match[1] not in groups else match[0]

    return re.sub(r"\b(data|train|compute)\.([a-z_]+)\b", name, text)


def _groups(arguments_class: type) -> set[str]:
    return {
        field.name
        for field in dataclasses.fields(arguments_class)
        if dataclasses.is_dataclass(field.default_factory)
    }


def _less_memory(arguments_class: type) -> str:
    """Returns what a user of the command can do against a full device."""
    if "train" in _groups(arguments_class):
        return (
            "fewer rows at a time (train.grad_accum_steps), a shorter data.seq_len, or "
            "compute.remat full or offload"
        )
    own = flags_of(arguments_class)
    smaller = [n for n in ("batch_size", "data.seq_len", "max_new_tokens") if n in own]
    return f"a smaller {' or '.join(smaller)}" if smaller else "a larger device"


def _path_mistake(error: Exception) -> str | None:
    """Returns what is wrong with a path that the user gave, whoever notices it."""
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return str(error)  # Path.resolve before Python 3.13
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError) and not error.filename:  # of os.getcwd
        return "the current folder no longer exists; change to another one"
    is_path = isinstance(error, _PATH_ERRORS) or error.errno in _PATH_NUMBERS
    return f"{error.filename}: {error.strerror}" if is_path and error.filename else None


def _hide_library_errors() -> None:
    """Hides what Orbax and TensorStore print of failures that end in one message here."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        # Of TensorStore's threads, after Orbax has given up at the first error; and of a
        # loop that could not be opened.
        text = str(unraisable.exc_value)
        if text != "Event loop is closed" and "'_ssock'" not in text:
            show(unraisable)

    if getattr(show, "__name__", "") != show_others.__name__:
        sys.unraisablehook = show_others


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python {f'-m {spec.name}' if spec else Path(sys.argv[0]).name}"


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
