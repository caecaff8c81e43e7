"""What a run tells: a progress bar or plain lines, metrics.jsonl, and a plot at the end."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from jlora.parallel.processes import is_first


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
        """Opens metrics.jsonl, dropping lines of steps after `start_step`.

        Args:
            run: the run folder.
            total_steps: where the bar ends.
            start_step: where it begins.
            name: of this run among several.
            beside: the first of them, whose progress display they all share.
        """
        self.path = run / "metrics.jsonl"
        if is_first():
            _keep_lines_until(self.path, start_step)
        target = self.path if is_first() else Path(os.devnull)
        self._file = target.open("a", encoding="utf-8")
        self._total, self._label = total_steps, f"{name}: " if name else ""
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
        """Takes the progress bar down and closes the file."""
        if self._progress and self._owns_display:
            self._progress.stop()
        self._file.close()

    def log(self, **metrics: Any) -> None:
        """Appends one line of metrics and shows it; NaN and infinities become null."""
        broken = sorted(
            key
            for key, value in metrics.items()
            if isinstance(value, float) and not math.isfinite(value)
        )
        line = {**metrics, **dict.fromkeys(broken)}
        if broken:
            line["non_finite"] = broken
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._show(metrics)

    def _show(self, metrics: dict[str, Any]) -> None:
        formats = {
            "loss": "loss {:.4f}",
            "eval_loss": "eval_loss {:.4f}",
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
            print(f"{self._label}step {step}/{self._total}  {note}", flush=True)

    def say(self, message: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        message = self._label + message
        if self._progress:
            self._progress.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)


def show_samples(samples: Sequence[tuple[str, Sequence[tuple[str, bool]]]]) -> None:
    """Prints records, each a title and stretches of text that are learnt or not.

    What is learnt is green on a terminal; elsewhere it stands between {+ and +}.
    """
    console = Console(highlight=False, soft_wrap=True)
    for title, pieces in samples:
        text = Text()
        for piece, is_learnt in pieces:
            if console.is_terminal:
                text.append(piece, "bold green" if is_learnt else "dim")
            else:
                text.append(f"{{+{piece}+}}" if is_learnt else piece)
        console.print(Text(title, "bold underline"), text, "", sep="\n")


def _make_progress() -> Progress | None:
    """Returns a display for a terminal, and None where there is none."""
    if not sys.stdout.isatty():
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        TextColumn("{task.fields[note]}"),
        console=Console(),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl; a line cut off by a kill is left out."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _keep_lines_until(path: Path, step: int) -> None:
    lines = [json.dumps(m) for m in read_metrics(path) if m.get("step", 0) <= step]
    if path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
        os.replace(temporary, path)


def plot(run: Path) -> Path | None:
    """Writes report.png: loss and learning rate over the steps; None without any."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(run / "metrics.jsonl")
    train = [m for m in metrics if m.get("loss") is not None]
    held_out = [m for m in metrics if m.get("eval_loss") is not None]
    if not train:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([m["step"] for m in train], [m["loss"] for m in train], label="train")
    if held_out:
        axes.plot(
            [m["step"] for m in held_out],
            [m["eval_loss"] for m in held_out],
            "o-",
            label="held out",
        )
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)", title=run.name)
    axes.legend(loc="upper right")
    rates = axes.twinx()
    rates.plot(
        [m["step"] for m in train], [m["learning_rate"] for m in train], color="0.8"
    )
    rates.set_ylabel("learning rate (grey)")
    target = run / "report.png"
    figure.savefig(target, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return target
