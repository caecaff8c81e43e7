"""Failures by exit status, warnings, and phrases that messages share."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

# All but line breaks and tabs: C0 and C1 with ESC, line and paragraph separators, overrides
# of the writing direction, halves of characters.
_CONTROL = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class JloraError(Exception):
    """A failure that a user can understand and act on; printed without a traceback."""

    exit_status = 1
    label = "error"


class UsageError(JloraError):
    """Wrong flag, configuration or combination of them."""

    exit_status = 2


class UnsupportedError(JloraError):
    """Valid input that jlora does not support."""

    exit_status = 3


class CorruptError(JloraError):
    """Input that is damaged or contradicts itself."""

    exit_status = 4


class ResourceError(JloraError):
    """Out of memory or disk."""

    exit_status = 5


class DivergedError(JloraError):
    """Training produced non-finite numbers too often."""

    exit_status = 6


class StopRequested(JloraError):
    """Asked to stop from outside; the state is saved."""

    exit_status = 75
    label = "stopped"


_warnings_are_shown = True


def warn(text: str) -> None:
    """Prints a warning of something that still works."""
    if _warnings_are_shown:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Returns the text with control characters escaped, which could steer a terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps `warn` silent: of several processes, the first says what all would."""
    global _warnings_are_shown
    _warnings_are_shown = False
    try:
        yield
    finally:
        _warnings_are_shown = True


def is_out_of_memory(error: Exception) -> bool:
    """Whether XLA or NCCL lacked device memory, for which neither has a class."""
    text = str(error).lower()
    return "resource_exhausted" in text or "out of memory" in text


# What the system lacks, by the number of its error.
_LACKS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full up to your quota",
    errno.EFBIG: "a file may not become larger (ulimit -f)",
    errno.EMFILE: "no more files may be open (ulimit -n)",
    errno.ENFILE: "no more files may be open on this system",
    errno.ENOMEM: "out of memory",
}
# The same by the text of errors that have no number: Python's and the dynamic linker's.
_LACKING_TEXTS = {os.strerror(number): said for number, said in _LACKS.items()} | {
    "can't start new thread": "no more threads may be started (ulimit -u, ulimit -v)",
    "failed to map segment": "out of memory while a library was loaded (ulimit -v)",
}


def lacking(error: Exception) -> str | None:
    """Returns what the system lacked, or None if an error is about something else.

    Some libraries wrap the system's error in a class of their own, or give only its text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _LACKS:
        return _LACKS[number]
    text = str(error)
    return next((said for t, said in _LACKING_TEXTS.items() if t in text), None)


@contextmanager
def about_file(path: object) -> Iterator[None]:
    """Names the file in an OSError of the body that names none, as those of writing do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def closest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """Returns the known name that is most like `name`, if any is like it enough."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns a hint such as "; did you mean 'q_proj'?", or an empty string."""
    close = closest(str(name), known, 0.6)
    return f"; did you mean {close!r}?" if close is not None else ""


def nearest_path(path: str) -> str:
    """Returns a hint with the existing path that is most like `path`, or an empty string."""
    found = "/" if path.startswith("/") else ""
    for part in filter(None, path.split("/")):
        step = os.path.join(found, part)
        if not os.path.exists(step):
            try:
                names = [n for n in os.listdir(found or ".") if not n.startswith(".")]
            except OSError:  # a file, or not readable
                return ""
            close = closest(part, names, 0.6)
            if close is None:
                return ""
            step = os.path.join(found, close)
        found = step
    return f"; did you mean {found!r}?"


def counted(number: int, noun: str) -> str:
    """Returns "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listing(items: Sequence[object], limit: int = 12) -> str:
    """Returns the items joined by commas, capped with a count."""
    shown = ", ".join(str(item) for item in items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
