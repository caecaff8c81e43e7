"""Reads metrics.jsonl, the log of a run: one JSON object per line."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jlora.errors import about_file, counted, warn


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without those that are damaged.

    Every line has a "step"; "loss", "learning_rate" and "eval_loss" are numbers or None.
    """
    return [metrics for _, metrics in _lines(path) if metrics is not None]


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a metrics.jsonl without the lines of later steps.

    Damaged lines, such as one that a kill has cut, are moved into metrics.damaged.
    """
    lines = _lines(path)
    damaged = [text for text, metrics in lines if metrics is None]
    if damaged:
        aside = path.with_suffix(".damaged")
        with about_file(aside), aside.open("ab") as file:
            file.write(b"".join(text + b"\n" for text in damaged))
        lost = counted(len(damaged), "damaged line")
        warn(f"{path}: {lost} moved to {aside.name}; the run goes on")
    kept = [text + b"\n" for text, m in lines if m is not None and m["step"] <= step]
    if path.exists() and b"".join(kept) != path.read_bytes():
        temporary = path.with_suffix(".tmp")
        with about_file(temporary):
            temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Returns every line as it is in the file, and parsed; None if it is damaged."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    return [(text, _parse(text)) for text in lines]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    # What the plot takes beside a step; null stands for a number that is not finite.
    needed = ("loss", "learning_rate") if "loss" in line else ("eval_loss",)
    return line if all(_is_number(line.get(key, "")) for key in needed) else None


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and math.isfinite(value))
