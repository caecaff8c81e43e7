"""Writes the table of docs/performance.md from benchmarks/results/step_time.jsonl.

python benchmarks/table.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step_time.jsonl"
PAGE = ROOT / "docs" / "performance.md"
START, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
COLUMNS = {
    "workload": "workload",
    "framework": "framework",
    "device": "device",
    "tokens_per_second": "tokens/s",
    "step_ms": "step ms",
    "mfu": "MFU",
    "peak_gib": "peak GiB",
    "compile_s": "compile s",
    "loss": "loss, first and last step",
    "grad_norm": "gradient norm",
    "versions": "versions",
}


def cell(key: str, value: Any) -> str:
    """Returns one value as the table shows it."""
    if value is None:
        return "-"
    if key == "mfu":
        return f"{100 * value:.1f} %"
    if key == "versions":
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if key == "loss":
        return " to ".join(str(x) for x in value)
    return f"{value:,.0f}" if key == "tokens_per_second" else str(value)


def table(lines: list[dict[str, Any]]) -> str:
    """Returns a Markdown row for the newest line of each workload, framework and device."""
    keys = ("workload", "framework", "device")
    newest = {tuple(line[key] for key in keys): line for line in lines}
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for _, line in sorted(newest.items()):
        rows.append([cell(key, line.get(key)) for key in COLUMNS])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> None:
    """Replaces the table between the two comments of the page."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(before + START + table(lines) + END + after)


if __name__ == "__main__":
    main()
