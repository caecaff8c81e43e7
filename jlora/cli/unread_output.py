"""Output that cannot be written: nobody reads it any more, or its terminal or disk is gone.

A short command ends then, quietly; a training goes on.
"""

import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, cast

from jlora.cli.printing import EscapedOutput, unescaped_output
from jlora.errors import ResourceError, lacking, printable

P = ParamSpec("P")


def allow_closed_output(run: Callable[P, int]) -> Callable[P, int]:
    """Makes a command end quietly when nobody reads its output, as in `... | head -1`."""

    @functools.wraps(run)
    def run_and_flush(*args: P.args, **kwargs: P.kwargs) -> int:
        _open_closed_streams()
        status = 0
        try:
            status = run(*args, **kwargs)
            print(end="", flush=True)
        except OSError as error:
            is_closed = isinstance(error, BrokenPipeError)
            problem = lacking(error)
            if not is_closed and (error.filename or not problem):
                raise
            # Python flushes what is left at exit, and would print a traceback then.
            _discard(sys.stdout.fileno())
            if not is_closed:
                say_error(f"the output cannot be written: {problem}")
                return status or ResourceError.exit_status
            status = status or 128 + signal.SIGPIPE  # as a shell reports it
        return status

    return run_and_flush


def say_error(message: str, label: str = "error") -> None:
    """Prints what ended a command, after what it has printed so far."""
    said = f"{label}: {printable(message)}\n"
    for file, text in ((sys.stdout, ""), (sys.stderr, said)):
        with suppress(OSError):
            print(text, end="", flush=True, file=file)


@contextmanager
def unread_output_is_discarded() -> Iterator[None]:
    """Lets the body go on, and its output go nowhere, when that cannot be written."""
    before, stdout = (sys.stdout, sys.stderr), unescaped_output()
    if (stdout, sys.stderr) != (sys.__stdout__, sys.__stderr__):
        yield  # somebody else takes the output
        return
    sys.stdout = cast(Any, EscapedOutput(_like(stdout)))
    sys.stderr = _like(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _like(stream: Any) -> io.TextIOWrapper:
    """Returns a stream to the same place, written line by line."""
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
    )


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            _discard(self.fileno())
            return len(data)


def _discard(number: int) -> None:
    """Makes a file descriptor one of /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _open_closed_streams() -> None:
    """Opens /dev/null as the standard streams that are closed, as with `>&-`.

    A file that is opened later would take their numbers, and get what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
