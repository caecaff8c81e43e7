"""SIGTERM and Ctrl-C: the first asks the training loop to save and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or Ctrl-C sets; a second, of either, kills."""
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def ask(*_: object) -> None:
        stop.set()
        for number in signals:
            signal.signal(number, signal.SIG_DFL)

    before = [signal.signal(number, ask) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
