"""SIGTERM and Ctrl-C: the first is answered at once and asks to stop, a second one kills.

Python runs handlers of signals in the main thread, between two of its instructions: not
while XLA compiles. So a thread reads what Python's C code writes to the "wakeup fd" as
soon as a signal comes, and answers. It imports no JAX, and works while JAX is imported.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jlora.errors import StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = "Ctrl-C or SIGTERM again ends at once"
BEFORE_TRAINING = f"stopping: no step runs yet, so nothing is lost; {_AGAIN}"
WHILE_TRAINING = (
    "stopping: the step that runs is finished and saved first; "
    f"{_AGAIN}, and loses the steps since the last checkpoint"
)


class StopRequest(threading.Event):
    """Set when asked to stop.

    Attributes:
        answer: what is printed then, at once.
        number: of the signal that asked.
    """

    def __init__(self) -> None:
        """Nothing is asked for yet, and no step runs."""
        super().__init__()
        self.answer = BEFORE_TRAINING
        self.number = 0
        self._ends_body = False

    def ask(self, number: int) -> None:
        """Is what the first signal does, in the main thread."""
        self.number = number
        self.set()
        if self._ends_body:
            self.check()

    @contextmanager
    def ends_body(self) -> Iterator[None]:
        """Lets a request end the body where it is: it takes long, and leaves nothing half done.

        Raises:
            StopRequested: as `check`.
        """
        self.check()
        self._ends_body = True
        try:
            yield
        finally:
            self._ends_body = False

    def check(self) -> None:
        """Ends a run that has nothing to save; one of several processes goes on instead.

        These have to agree, see `jlora.parallel.processes.stop_vote`.

        Raises:
            StopRequested: asked to stop.
        """
        import jax

        if self.is_set() and jax.process_count() == 1:
            raise StopRequested("no step was made; run it again to go on")


@contextmanager
def stop_requests(*, in_notebook: bool = False) -> Iterator[StopRequest]:
    """Yields what the first SIGTERM or Ctrl-C sets; a second, of either, kills.

    In a notebook, whose kernel is to stay, the second one is a KeyboardInterrupt.
    """
    stop = StopRequest()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            if in_notebook:
                raise KeyboardInterrupt
            _die(number)
        stop.ask(number)

    def answer() -> None:
        if reader.recv(1):
            if not in_notebook:
                _use_default_handlers()  # so that nothing needs to run for the second
            print(stop.answer, file=sys.stderr, flush=True)
            for number in b"" if in_notebook else reader.recv(1):  # it came before that
                _die(number)

    before = [signal.signal(number, ask) for number in SIGNALS]
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=answer, name="stop requests", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def _use_default_handlers() -> None:
    """Makes SIGTERM and Ctrl-C kill; Python allows that in its main thread only."""
    for number in SIGNALS:
        ctypes.CDLL(None).signal(number, ctypes.c_void_p(signal.SIG_DFL))


def _die(number: int) -> None:
    _use_default_handlers()
    os.kill(os.getpid(), number)
