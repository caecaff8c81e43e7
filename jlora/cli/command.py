"""Runs a command: its flags come from a dataclass, its failures end in one message.

A command is a dataclass (fields are flags, the strings below them are help texts) and a
`main` that takes an instance of it.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, cast

from jlora.cli.arguments import parse
from jlora.cli.help_page import help_page
from jlora.cli.printing import EscapedOutput
from jlora.errors import (
    JloraError,
    ResourceError,
    UsageError,
    is_out_of_memory,
    printable,
)

# Mistakes in a path that the user gave, whoever notices them.
_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
P = ParamSpec("P")


def allow_closed_output(run: Callable[P, int]) -> Callable[P, int]:
    """Makes a command end quietly when nobody reads its output, as in `... | head -1`."""

    @functools.wraps(run)
    def run_and_flush(*args: P.args, **kwargs: P.kwargs) -> int:
        status = 0
        try:
            status = run(*args, **kwargs)
            print(end="", flush=True)
        except OSError as error:
            is_closed = isinstance(error, BrokenPipeError)
            if not is_closed and (error.filename or error.errno != errno.ENOSPC):
                raise
            # Python flushes what is left at exit, and would print a traceback then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not is_closed:
                full = "the output cannot be written: no space left on the disk"
                return status or _fail(full, ResourceError.exit_status)
            status = status or 128 + signal.SIGPIPE  # as a shell reports it
        return status

    return run_and_flush


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
    # Orbax and TensorStore log tracebacks of failures that end in one message here.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if {"-h", "--help"} & set(words):
        print(help_page(program or _program(), arguments_class))
        return 0
    try:
        check_versions()
        arguments = parse(arguments_class, words)
        with contextlib.redirect_stdout(cast(Any, EscapedOutput(sys.stdout))):
            main(arguments)
    except JloraError as error:
        message = in_own_flags(str(error), arguments_class)
        return _fail(message, error.exit_status, error.label)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError as error:
        why = str(error) or "the system has no more"
        return _fail(
            f"out of memory: {why}; end other programs or take a larger machine",
            ResourceError.exit_status,
        )
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the disk{where}", ResourceError.exit_status)
        is_path = isinstance(error, _PATH_ERRORS) or error.errno == errno.ENAMETOOLONG
        if not is_path or not where:
            raise
        return _fail(f"{error.filename}: {error.strerror}", UsageError.exit_status)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        return _fail(
            f"out of device memory ({first}); use {_less_memory(arguments_class)}",
            ResourceError.exit_status,
        )
    return 0


def in_own_flags(text: str, arguments_class: type) -> str:
    """Returns a message with the names that a command without flag groups has for its flags.

    The library calls a setting data.seq_len, as train.py does; evaluate.py has --seq_len.
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
    own = {field.name for field in dataclasses.fields(arguments_class)}
    smaller = [n for n in ("batch_size", "seq_len", "max_new_tokens") if n in own]
    return f"a smaller {' or '.join(smaller)}" if smaller else "a larger device"


def _fail(message: str, status: int, label: str = "error") -> int:
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    print(f"{label}: {printable(message)}", file=sys.stderr)
    return status


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
