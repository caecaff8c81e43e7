"""Reads metrics.jsonl, the log of a run: one JSON object per line."""

import json
import os
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl; a line cut off by a kill is skipped."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a metrics.jsonl without the lines of later steps, or damaged lines."""
    lines = [json.dumps(m) for m in read_metrics(path) if m.get("step", 0) <= step]
    if path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
        os.replace(temporary, path)
