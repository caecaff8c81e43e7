"""Runs in order of their loss, with the settings in which they differ."""

from collections.abc import Sequence
from typing import Any

from jlora.cli.flag_values import as_text
from jlora.errors import printable
from jlora.report.run_folder import RunFolder

# Where a run is, and what it does first, is no difference that explains a loss.
_PLACES = ("output_dir", "resume", "plan", "sweep")
Table = tuple[list[str], list[list[str]]]


def ranked(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Returns the runs by their best evaluation, or without one by their newest loss."""

    def key(run: RunFolder) -> tuple[bool, float]:
        loss = run.last("loss")
        if run.best:
            return (False, run.best[1])
        return (True, float("inf") if loss is None else loss)

    return sorted(runs, key=key)


def ranking(runs: Sequence[RunFolder]) -> Table:
    """Returns head and rows of a table of `ranked` runs."""
    settings = [_flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    texts = {key: [as_text(each.get(key)) for each in settings] for key in keys}
    differing = [
        key
        for key, values in texts.items()
        if len(set(values)) > 1 and key not in _PLACES
    ]
    head = ["", "run", "best eval_loss", "at step", "loss", "steps", *differing]
    rows = [
        [
            str(place),
            run.name,
            _number(run.best and run.best[1]),
            str(run.best[0]) if run.best else "-",
            _number(run.last("loss")),
            f"{run.steps:,}",
            *(printable(texts[key][index]) for key in differing),
        ]
        for index, (place, run) in enumerate(enumerate(runs, 1))
    ]
    return head, rows


def table_lines(table: Table) -> list[str]:
    """Returns the lines of a table as plain text."""
    head, rows = table
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): item for name, item in inner.items()}
    return flat
