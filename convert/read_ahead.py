"""Has the system read a file from disk while what came before is being worked on."""

import contextlib
import os
from pathlib import Path

AHEAD_BYTES = 64 << 20  # of a file, which the system reads while blocks are turned
_ASKED_BYTES = 1 << 20  # Linux cuts requests that are much longer short


def open_file(path: Path) -> int:
    """Returns a descriptor of a file that is read from start to end."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def ask_for(descriptor: int, probe: int, start: int, stop: int) -> None:
    """Asks the system to read this part of a file meanwhile; it may do so or not.

    `probe` is a descriptor of its own: to look ahead would end the reading of the other
    from start to end, in the system's eyes.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for first in range(start, stop, _ASKED_BYTES):
        size = min(_ASKED_BYTES, stop - first)
        if not _is_cached(probe, first):
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)


def open_probe(path: Path) -> int:
    """Returns a descriptor of which the system reads nothing ahead by itself."""
    descriptor = open_file(path)
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte of a file is in memory, if the system can tell (Linux can).

    To be asked for what it has takes Linux as long as a tenth of all that loading does.
    """
    with contextlib.suppress(AttributeError, OSError):
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    return False
