"""The plot of a run, written when it ends."""

import os
import warnings
from pathlib import Path

from jlora.errors import about_file
from jlora.report.metrics_file import read_metrics


def plot_run(run: Path) -> Path | None:
    """Writes report.png: loss and learning rate by step; None if no step is logged."""
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
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    title = os.fsencode(run.name).decode("utf-8", "replace")
    axes.set_title(title, parse_math=False)  # a name may hold dollar signs
    axes.legend(loc="upper right")
    rates = axes.twinx()
    rates.plot(
        [m["step"] for m in train], [m["learning_rate"] for m in train], color="0.8"
    )
    rates.set_ylabel("learning rate (grey)")
    target = run / "report.png"
    with about_file(target), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters without a shape
        figure.savefig(target, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return target
