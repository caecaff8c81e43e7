"""What goes on around the steps of a run: the late log, and requests to stop."""

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import DivergedError, UsageError
from jlora.report.run_report import Report
from jlora.train.memory_estimate import peak_flops, peak_memory_bytes

MAX_SKIPPED_IN_A_ROW = 5


def is_due(step: int, every: int, last: int = 0) -> bool:
    """Whether something that happens every so many steps, and after the last, is due."""
    return step == last or (every > 0 and step % every == 0)


def check_remaining(run: Path, start: int, total_steps: int) -> None:
    """Says so where a run has done its steps; raises UsageError where it did more."""
    if start > total_steps:
        raise UsageError(
            f"{run}: the run is at step {start} already, and this command ends at step "
            f"{total_steps}; give more steps (train.max_steps, train.num_epochs), or "
            "another output_dir"
        )
    if start == total_steps:
        print(f"all {total_steps} steps are done; only the adapter is written again")


def clear_outcome(run: Path) -> None:
    """Removes the adapter of a run that goes on: its checkpoints are newer from now on."""
    shutil.rmtree(run / "adapter", ignore_errors=True)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or Ctrl-C sets; the second one kills."""
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = [signal.signal(number, ask) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class StepLog:
    """Turns the metrics of steps into lines, one step late so that no step waits."""

    def __init__(
        self,
        report: Report,
        schedule: Callable[[Any], Any],
        *,
        flops_per_token: float,
        steps_per_epoch: int,
        log_every: int,
        total_steps: int,
        index: int = 0,
    ) -> None:
        """Takes what a line tells besides a step's metrics.

        Args:
            report: where lines go.
            schedule: learning rates of an array of steps.
            flops_per_token: of the model and its adapter.
            steps_per_epoch: of the run's data.
            log_every: steps between lines.
            total_steps: of the run; its last step is always logged.
            index: of this run where the metrics are those of several.
        """
        self._last, self._is_still = total_steps, False
        self._index = index
        self._report, self._every = report, log_every
        # At once: asked for late, a rate would queue behind the step that runs.
        self._rates = np.asarray(schedule(np.arange(total_steps)))
        self._flops, self._steps_per_epoch = flops_per_token, steps_per_epoch
        self._peak = peak_flops()
        self._pending: tuple[int, dict[str, Any], float] | None = None
        self._since, self._tokens, self._steps = time.perf_counter(), 0, 0
        self._waited = 0.0

    def add(self, step: int, metrics: dict[str, Any], waited_s: float) -> None:
        """Takes the metrics of a step that may still run, and logs the one before.

        `waited_s` is how long all batches up to this step's were waited for.
        """
        self.flush()
        self._pending = step, metrics, waited_s

    def flush(self) -> None:
        """Logs what is pending, waiting for its step.

        Raises:
            DivergedError: too many steps in a row were not finite, or the last one was not.
        """
        if self._pending is None:
            return
        (step, arrays, waited), self._pending = self._pending, None
        metrics = {
            name: np.ravel(array)[self._index].item() for name, array in arrays.items()
        }
        skipped, in_a_row = metrics.pop("skipped"), metrics.pop("in_a_row")
        self._tokens, self._steps = self._tokens + metrics["tokens"], self._steps + 1
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if in_a_row:
            reason = (
                "no token of the batch is learnt"
                if finite
                else "loss or gradient is not finite"
            )
            self._report.say(f"step {step}: {reason}; nothing was changed")
        elif metrics["grad_norm"] == 0 and not self._is_still:
            self._is_still = True
            self._report.say(
                f"step {step}: the gradient is exactly zero, so nothing is learnt; "
                "if the loss was falling before, lower optim.learning_rate"
            )
        at_end = step == self._last and not finite
        if in_a_row >= MAX_SKIPPED_IN_A_ROW or at_end:
            raise DivergedError(
                f"training diverged: {in_a_row} steps in a row up to step {step} were not "
                f"finite ({skipped} in all); step {step - in_a_row} was the last good one. "
                "Lower optim.learning_rate, or look at the data"
            )
        if not is_due(step, self._every, self._last):
            return
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        rate, self._tokens = self._tokens / elapsed, 0
        per_step, wait = elapsed / self._steps, (waited - self._waited) / self._steps
        self._steps, self._waited = 0, waited
        self._report.log(
            step=step,
            epoch=step / self._steps_per_epoch,
            **metrics,
            learning_rate=self._rates[step - 1].item(),
            skipped=skipped,
            tokens_per_second=rate,
            step_time_s=per_step,
            data_wait_s=wait,
            mfu=self._flops * rate / self._peak if self._peak else None,
            peak_memory_bytes=peak_memory_bytes(),
        )
