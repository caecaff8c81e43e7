"""The log of a run: a progress bar or plain lines, and metrics.jsonl."""

import json
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from jlora.cli.printing import unescaped_output
from jlora.errors import about_file, printable
from jlora.parallel.processes import is_first
from jlora.report.metrics_file import drop_lines_after
from jlora.report.notebook_progress import NotebookProgress, notebook
from jlora.report.tracking import Tracking


class Report:
    """The log of one run; a context manager that owns the progress bar."""

    def __init__(
        self,
        run: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        name: str = "",
        beside: "Report | None" = None,
    ) -> None:
        """Opens metrics.jsonl and drops its lines of steps after `start_step`.

        Args:
            run: run folder.
            total_steps: end of the progress bar.
            start_step: steps done before.
            name: of this run, if several train together.
            beside: the report of the first of them, whose progress display all share.
        """
        self.path = run / "metrics.jsonl"
        if is_first():
            # A run that begins evaluates at step 0 itself.
            drop_lines_after(self.path, start_step or -1)
        target = self.path if is_first() else Path(os.devnull)
        self._file = target.open("a", encoding="utf-8")
        self._total, self._label = total_steps, f"{name}: " if name else ""
        self.tracking = Tracking()
        self._owns_display = beside is None
        self._progress = beside._progress if beside else _make_progress()
        if self._progress:
            self._task = self._progress.add_task(
                name or "training", total=total_steps, completed=start_step, note=""
            )

    def __enter__(self) -> "Report":
        """Shows the progress bar."""
        if self._progress and self._owns_display:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the progress bar and closes the file."""
        if self._progress and self._owns_display:
            self._progress.stop()
        with about_file(self.path):
            self._file.close()
        self.tracking.close(failed=kind is not None)

    def log(self, **metrics: Any) -> None:
        """Appends one line of a step's metrics and shows it, on a terminal in the bar."""
        self._write(metrics)
        formats = {
            "loss": "loss {:.4f}",
            "learning_rate": "lr {:.2e}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}",
        }
        note = "  ".join(
            text.format(metrics[key])
            for key, text in formats.items()
            if metrics.get(key) is not None
        )
        step = metrics["step"]
        if self._progress:
            self._progress.update(self._task, completed=step, note=note)
        else:
            self.say(f"step {step}/{self._total}  {note}")

    def log_evaluation(self, step: int, eval_loss: float, *, is_best: bool) -> None:
        """Appends a line with the loss on held-out data; it stays on the screen."""
        self._write({"step": step, "eval_loss": eval_loss})
        best = "  best so far" if is_best else ""
        self.say(f"step {step}/{self._total}  eval_loss {eval_loss:.4f}{best}")

    def _write(self, metrics: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl; NaN and infinities become null."""
        broken = sorted(
            key
            for key, value in metrics.items()
            if isinstance(value, float) and not math.isfinite(value)
        )
        line = {**metrics, **dict.fromkeys(broken)}
        if broken:
            line["non_finite"] = broken
        with about_file(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self.tracking.log(line)

    def say(self, message: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        message = self._label + message
        if self._progress:
            self._progress.console.print(
                printable(message), markup=False, highlight=False
            )
        else:
            print(message, flush=True)


def _make_progress() -> Progress | None:
    """Returns a display for a terminal or a notebook, and None where there is neither."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        TextColumn("{task.fields[note]}"),
    )
    if ipython := notebook():
        return NotebookProgress(ipython, *columns)
    if not sys.stdout.isatty():
        return None
    return Progress(*columns, console=Console(file=unescaped_output()))
