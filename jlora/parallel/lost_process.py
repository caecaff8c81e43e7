"""What a process does when another one of its run has ended: one message, exit status 5.

Python sees an exception if a collective fails. If the coordinator is lost, or a process
sends no heartbeat, a thread of JAX's C++ aborts the process instead, also while it waits
in a collective; so the signal of an abort is handled as well.
"""

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora.errors import (
    DivergedError,
    JloraError,
    ResourceError,
    StopRequested,
    is_out_of_memory,
)

HEARTBEAT_TIMEOUT_S = 20
"""Without a sign of life for so long, a process is lost; at its end, it waits as long."""
# In what JAX raises if another process does not answer: the libraries of collectives, and
# words of its own service.
_LIBRARIES = ("gloo", "nccl")
_LOST = ("coordination", "heartbeat", "connection")
_ENDED = (
    "another process of this run has ended, and may have said why, or cannot be reached"
)
# What is printed on an abort, empty if all is said, and the exit status.
_on_abort = ("", ResourceError.exit_status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handle_abort(_: int) -> None:
    message, status = _on_abort
    if message:
        os.write(2, f"error: {message}\n".encode())
    else:
        time.sleep(HEARTBEAT_TIMEOUT_S)  # the main thread is about to exit
    os._exit(status)


def end_on_abort(message: str | None) -> None:
    """Makes an abort of this process print a message and exit with status 5; None: no more."""
    global _on_abort
    _on_abort = (message or "", ResourceError.exit_status)
    # Handlers of Python's own run in the main thread, which may wait for ever.
    handler = _handle_abort if message else ctypes.c_void_p(None)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Ends this process soon after another one has ended, and the others after this one.

    Raises:
        ResourceError: another process has ended.
    """
    if jax.process_count() == 1:
        end_on_abort(None)
        yield
        return
    end_on_abort(
        f"{_ENDED} (JAX's service was lost; TF_CPP_MIN_LOG_LEVEL=0 shows its log)"
    )
    ended = None
    try:
        try:
            yield
        except (StopRequested, DivergedError) as error:  # of all, at the same step
            ended = error
        # JAX's own wait, at the exit, has a limit, and the first process may be writing. A
        # collective that is used before has none; Gloo gives the first use of one 30 s.
        multihost_utils.process_allgather(np.zeros(1))
    except Exception as error:
        lost = is_lost(error)
        status = error.exit_status if isinstance(error, JloraError) else 1
        _exit_soon(ResourceError.exit_status if lost else status, wait=not lost)
        if not lost:
            raise
        first = str(error).splitlines()[0][:200]
        raise ResourceError(f"{_ENDED} ({first})") from error
    if ended:
        raise ended


def is_lost(error: Exception) -> bool:
    """Whether JAX raised an error because another process does not answer."""
    text = str(error).lower()
    if isinstance(error, ValueError):  # of a collective that its caller waits for
        return any(word in text for word in _LIBRARIES)
    is_jax = isinstance(error, jax.errors.JaxRuntimeError)
    words = (*_LIBRARIES, *_LOST)
    return is_jax and not is_out_of_memory(error) and any(w in text for w in words)


def _exit_soon(status: int, *, wait: bool) -> None:
    """Makes this process end without JAX's clean-up, which aborts if others are gone.

    Args:
        status: what to exit with.
        wait: whether the other processes get time to end with the same error.
    """
    global _on_abort
    _on_abort = ("", status)

    def leave() -> None:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        if wait:
            with suppress(Exception):
                jax.distributed.shutdown()
        os._exit(status)

    if jax.distributed.is_initialized():
        atexit.register(leave)
