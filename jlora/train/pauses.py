"""The time that a run spends on something else than training: compiling, evaluating, saving."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class _Timed(Protocol):
    def flush(self) -> None: ...
    def restart_clock(self) -> None: ...


class Pauses:
    """Keeps other work out of the times of steps, and adds up how long it takes.

    Attributes:
        seconds: of each kind of work, by its name.
    """

    def __init__(self, runs: Sequence[_Timed]) -> None:
        """Takes the runs whose steps are timed."""
        self._runs = runs
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def spent(self, work: str) -> Iterator[None]:
        """Times the body, after the steps that still run; their clocks stand still."""
        for run in self._runs:
            run.flush()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[work] += time.perf_counter() - began
            for run in self._runs:
                run.restart_clock()

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Times the body as compiling, and says that it goes on."""
        print(f"compiling {what} ...", flush=True)
        began = time.perf_counter()
        with self.spent("compiling"):
            yield
        print(f"compiled in {duration(time.perf_counter() - began)}", flush=True)


def duration(seconds: float) -> str:
    """Returns a time as a person would say it: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
