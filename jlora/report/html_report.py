"""report.html: one or more runs on one page that needs no network and no scripts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jlora.errors import about_file, printable
from jlora.report.charts import HEIGHT, WIDTH, Chart, Line, smoothed
from jlora.report.ranking import ranked, ranking
from jlora.report.run_folder import RunFolder

TARGET = "report.html"
_TEMPLATE = "report_page.html"
_COLORS = 8
_GIB = 2**30
_SPEED, _MEMORY = "tokens per second", "peak memory, GiB"
_FROM_ZERO = (_SPEED, _MEMORY, "learning rate")


def write_report(folders: Sequence[Path], target: Path) -> list[RunFolder]:
    """Writes the page of some runs; returns them, the best first.

    Raises:
        UsageError: a folder holds no run.
    """
    runs = ranked([RunFolder.read(folder) for folder in folders])
    page = render(runs)
    temporary = target.with_name(f".{target.name}.partial")
    with about_file(target):
        temporary.write_text(page, "utf-8")
        os.replace(temporary, target)
    return runs


def render(runs: Sequence[RunFolder]) -> str:
    """Returns the page as HTML; whatever the runs hold is escaped."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(_TEMPLATE).render(
        title=f"{len(runs)} runs" if len(runs) > 1 else runs[0].name,
        width=WIDTH,
        height=HEIGHT,
        ranking=ranking(runs) if len(runs) > 1 else None,
        charts=_compared(runs) if len(runs) > 1 else [],
        runs=[_section(run) for run in runs],
    )


def _section(run: RunFolder) -> dict[str, Any]:
    """Returns what the template shows of one run."""
    before = next((y for x, y in run.points("eval_loss") if x == 0), None)
    figures = {
        "steps": f"{run.steps:,}",
        "loss": _text(run.last("loss"), "{:.4f}"),
        "best eval_loss": f"{run.best[1]:.4f} at step {run.best[0]:,}"
        if run.best
        else "",
        "before the first step": _text(before, "{:.4f}"),
        "tokens per second": _text(run.last("tokens_per_second"), "{:,.0f}"),
        "MFU": _text(run.last("mfu"), "{:.1%}"),
        "peak memory": _text(run.last("peak_memory_bytes"), "{:.2f} GiB", 1 / _GIB),
    }
    versions = run.facts.get("versions", {})
    origin = run.facts.get("identity", {})
    return {
        "name": run.name,
        "figures": {name: text for name, text in figures.items() if text},
        "charts": _charts(run),
        "summary": run.facts.get("summary", []),
        "samples": run.facts.get("samples", []),
        "answers": _answers(run),
        "versions": versions,
        "origin": origin,
        "config": yaml.safe_dump(run.settings, sort_keys=False) if run.settings else "",
        "command": run.facts.get("command", ""),
    }


def _answers(run: RunFolder) -> list[tuple[str, dict[str, str]]]:
    """Returns each held-out prompt with what the data and the model say after it."""
    told = {
        f"after step {step:,}" if step else "before training": texts
        for step, texts in run.generated.items()
    }
    return [
        (
            same[0].prompt,
            {"reference": same[0].reference}
            | {title: text.text for title, text in zip(told, same, strict=True)},
        )
        for same in zip(*told.values(), strict=False)
    ]


def _charts(run: RunFolder) -> list[Chart]:
    losses, held_out = run.points("loss"), run.points("eval_loss")
    mark = run.best and (*run.best, f"best {run.best[1]:.4f}")
    lines = [
        Line(losses, "raw"),
        Line(smoothed(losses), "smooth", 0, "training, smoothed"),
        Line(held_out, "dotted", 1, "held out", mark),
    ]
    charts = {
        "loss, nats per supervised token": lines,
        "learning rate": [Line(run.points("learning_rate"))],
        "gradient norm": _both(run.points("grad_norm")),
        _SPEED: _both(run.points("tokens_per_second")),
        _MEMORY: [Line([(x, y / _GIB) for x, y in run.points("peak_memory_bytes")])],
    }
    return _drawn(charts)


def _compared(runs: Sequence[RunFolder]) -> list[Chart]:
    names = {
        "training loss, smoothed": lambda run: smoothed(run.points("loss")),
        "loss on held-out data": lambda run: run.points("eval_loss"),
    }
    return _drawn(
        {
            title: [
                Line(points(run), "smooth", index % _COLORS, run.name)
                for index, run in enumerate(runs)
            ]
            for title, points in names.items()
        }
    )


def _drawn(charts: dict[str, list[Line]]) -> list[Chart]:
    """Returns the charts that have something to show."""
    shown = {
        title: [line for line in lines if line.points]
        for title, lines in charts.items()
    }
    return [
        Chart(title, lines, from_zero=title in _FROM_ZERO)
        for title, lines in shown.items()
        if lines
    ]


def _both(points: list[tuple[int, float]]) -> list[Line]:
    return [Line(points, "raw"), Line(smoothed(points))]


def _text(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)
