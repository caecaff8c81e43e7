"""Log lines from the metrics of steps, read one step late so that no step waits."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.errors import DivergedError
from jlora.report.run_report import Report
from jlora.train.flops import peak_flops
from jlora.train.memory_estimate import peak_memory_bytes
from jlora.train.progress import Progress

MAX_SKIPPED_IN_A_ROW = 5
# Below it a gradient may be exactly zero because every token has a probability of 1.
LOSS_WITHOUT_GRADIENT = 1e-3
NOT_FINITE = "loss or gradient is not finite"
NO_TOKEN = "the batch has no supervised token"


class StepLog:
    """Logs every step, or every few, of one run; tells when training has diverged.

    JAX runs ahead of Python. Reading a step's metrics waits for that step, so they are
    read when the next step has been started. A step's time is from the end of the one
    before, or of a pause after it, to its own end.
    """

    def __init__(
        self,
        report: Report,
        progress: Progress,
        schedule: Callable[[Any], Any],
        *,
        flops_per_token: float,
        steps_per_epoch: int,
        log_every: int,
        total_steps: int,
        devices: int,
        index: int = 0,
    ) -> None:
        """Takes what a line says besides a step's metrics.

        Args:
            report: where lines go.
            progress: of the run, which holds the mean of the loss.
            schedule: learning rates of an array of steps.
            flops_per_token: of the model and its adapter.
            steps_per_epoch: of the run's data.
            log_every: steps between lines.
            total_steps: of the run; its last step is always logged.
            devices: that compute it.
            index: of this run where the metrics are those of several.
        """
        self._report, self._progress, self._index = report, progress, index
        self._log_every, self._total_steps = log_every, total_steps
        # Computed now: asked for late, a rate would queue behind the running step.
        self._rates = np.asarray(schedule(np.arange(total_steps)))
        self._flops, self._steps_per_epoch = flops_per_token, steps_per_epoch
        self._peak = peak_flops(devices)
        self._pending: tuple[int, dict[str, Any], float, float | None] | None = None
        self._newest: tuple[int, dict[str, Any], int, float] | None = None
        self._zero_gradients = 0
        self._reasons: set[str] = set()  # why the latest steps in a row were skipped
        self._clock = time.perf_counter()  # where the time of the next step begins
        # Since the last line: tokens, steps, the time of these, and waiting for batches.
        self._tokens, self._steps, self._seconds, self._waited_s = 0, 0, 0.0, 0.0
        self.training_s = 0.0  # of all steps

    def add(self, step: int, metrics: dict[str, Any], waited_s: float) -> None:
        """Takes the metrics of a step that may still run, and logs the one before.

        `waited_s` is how long the batches of all steps so far were waited for.
        """
        # On a CPU a step is done when it returns; else its end is seen when it is read.
        is_done = all(array.is_ready() for array in metrics.values())
        ended = time.perf_counter() if is_done else None
        self.flush()
        self._pending = step, metrics, waited_s, ended

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what came before it."""
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """Logs the pending step, waiting until it is done.

        Raises:
            DivergedError: several steps in a row were skipped, or had no gradient.
        """
        if self._pending is None:
            return
        (step, arrays, waited_s, ended), self._pending = self._pending, None
        metrics = {
            name: np.ravel(array)[self._index].item() for name, array in arrays.items()
        }
        skipped, in_a_row = metrics.pop("skipped"), metrics.pop("in_a_row")
        ended = ended or time.perf_counter()
        self._seconds += ended - self._clock
        self.training_s += ended - self._clock
        self._clock = ended
        self._tokens, self._steps = self._tokens + metrics["tokens"], self._steps + 1
        self._progress.add_loss(metrics["loss"], metrics["supervised_tokens"])
        self._report_trouble(step, metrics, skipped, in_a_row)
        self._newest = step, metrics, skipped, waited_s
        if is_due(step, self._log_every, self._total_steps):
            self._write_line(*self._newest)

    def end(self) -> None:
        """Writes a line of the steps since the last one, as no more will come.

        Raises:
            DivergedError: as `flush`.
        """
        self.flush()
        if self._steps and self._newest:
            self._write_line(*self._newest)

    def _report_trouble(
        self, step: int, metrics: dict[str, Any], skipped: int, in_a_row: int
    ) -> None:
        """Prints why a step changed nothing; raises DivergedError, see `flush`."""
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if in_a_row <= 1:
            self._reasons.clear()
        if in_a_row:
            reason = NO_TOKEN if finite else NOT_FINITE
            self._reasons.add(reason)
            self._report.say(f"step {step}: {reason}; nothing was changed")
        # A and B are never both zero, so a gradient of exactly zero means that the loss no
        # longer depends on the adapter: earlier updates were too large. A loss of 0 has no
        # gradient either, but then nothing is left to train.
        zero = finite and not in_a_row and metrics["grad_norm"] == 0
        zero = zero and metrics["loss"] > LOSS_WITHOUT_GRADIENT
        self._zero_gradients = self._zero_gradients + 1 if zero else 0
        if self._zero_gradients == 1:
            self._report.say(
                f"step {step}: the gradient is exactly zero, so nothing is trained; "
                "lower optim.learning_rate"
            )
        if self._zero_gradients >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"training diverged: the gradient was exactly zero for "
                f"{self._zero_gradients} steps in a row up to step {step}, at a loss of "
                f"{metrics['loss']:.4f}. Lower optim.learning_rate"
            )
        # One such step at the very end is like one before, if any step was good.
        at_end = step == self._total_steps and (in_a_row > 1 or in_a_row == step)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW or at_end:
            advice = "Lower optim.learning_rate, or look at the data"
            if self._reasons == {NO_TOKEN}:
                advice = "Look at the data, and at data.train_on"
            raise DivergedError(
                f"training diverged: {in_a_row} steps in a row up to step {step} changed "
                f"nothing ({skipped} in all), as {' or '.join(sorted(self._reasons))}; "
                f"step {step - in_a_row} was the last good one. {advice}"
            )

    def _write_line(
        self, step: int, metrics: dict[str, Any], skipped: int, waited_s: float
    ) -> None:
        rate = self._tokens / max(self._seconds, 1e-9)
        step_time_s = self._seconds / self._steps
        data_wait_s = (waited_s - self._waited_s) / self._steps
        self._tokens, self._steps, self._seconds = 0, 0, 0.0
        self._waited_s = waited_s
        metrics["step_loss"] = metrics.pop("loss")
        self._report.log(
            step=step,
            epoch=step / self._steps_per_epoch,
            loss=self._progress.take_mean_loss(),
            **metrics,
            # The optimizer counts the steps that it applied.
            learning_rate=self._rates[max(0, step - 1 - skipped)].item(),
            skipped=skipped,
            tokens_per_second=rate,
            step_time_s=step_time_s,
            data_wait_s=data_wait_s,
            mfu=self._flops * rate / self._peak if self._peak else None,
            peak_memory_bytes=peak_memory_bytes(),
        )


def is_due(step: int, every: int, last: int = 0) -> bool:
    """Whether something that happens every so many steps, and after the last, is due."""
    return step == last or (every > 0 and step % every == 0)
