"""What a run folder says about its run: settings, facts from its start, and metrics."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jlora.cli.strict_yaml import read_yaml
from jlora.errors import UsageError, about_file, printable
from jlora.report.metrics_file import read_metrics
from jlora.report.trackers import GeneratedText

FACTS, GENERATED = "facts.json", "generated.json"


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder shows it, finished or not.

    Attributes:
        name: of the folder, which can be printed.
        settings: of config.yaml.
        facts: what `write_facts` wrote; empty for a run of an earlier version.
        metrics: lines of metrics.jsonl.
        generated: {step: texts} of what the model wrote, the earliest step first.
    """

    name: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    generated: dict[int, list[GeneratedText]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "RunFolder":
        """Returns the run in a folder.

        Raises:
            UsageError: it holds none.
        """
        if not (folder / "metrics.jsonl").is_file():
            raise UsageError(
                f"{folder}: holds no metrics.jsonl; give the folder of a run"
            )
        config, facts = folder / "config.yaml", folder / FACTS
        try:
            found = json.loads(facts.read_text("utf-8"))
        except (OSError, ValueError):
            found = {}
        return cls(
            name=readable(folder.absolute().name),
            settings=read_yaml(config) if config.is_file() else {},
            facts=found if isinstance(found, dict) else {},
            metrics=read_metrics(folder / "metrics.jsonl"),
            generated=_read_generated(folder / GENERATED),
        )

    def points(self, key: str) -> list[tuple[int, float]]:
        """Returns (step, value) of every line that has a finite number under `key`."""
        lines = self.metrics
        return [(m["step"], m[key]) for m in lines if _is_number(m.get(key))]

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest evaluation after the first step."""
        after = [point for point in self.points("eval_loss") if point[0]]
        return min(after, key=lambda point: (point[1], point[0]), default=None)

    def last(self, key: str) -> float | None:
        """Returns the newest value of a metric."""
        return next((value for _, value in reversed(self.points(key))), None)

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((m["step"] for m in self.metrics), default=0)


def write_facts(run: Path, facts: dict[str, Any]) -> None:
    """Writes what a report tells of a run's start: JSON, with lists of lines and numbers."""
    with about_file(run / FACTS):
        (run / FACTS).write_text(json.dumps(facts, indent=1), "utf-8")


def write_generated(run: Path, step: int, texts: Sequence[GeneratedText]) -> None:
    """Keeps what the model writes after a step, beside what it wrote before the first one."""
    before = {
        k: v for k, v in _read_generated(run / GENERATED).items() if k == 0 < step
    }
    lines = {k: [asdict(t) for t in v] for k, v in {**before, step: texts}.items()}
    with about_file(run / GENERATED):
        (run / GENERATED).write_text(json.dumps(lines, indent=1), "utf-8")


def _read_generated(path: Path) -> dict[int, list[GeneratedText]]:
    """Returns what `write_generated` wrote; nothing of a file that is not like that."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return {int(k): [GeneratedText(**t) for t in v] for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def run_folders(folder: Path) -> Iterator[Path]:
    """Yields the folder, or those of the members if it is a sweep's."""
    members = [path.parent for path in folder.glob("*/metrics.jsonl")]
    if (folder / "metrics.jsonl").exists() or not members:
        members = [folder]
    yield from sorted(members)


def readable(text: str) -> str:
    """Returns a name without control characters or halves of characters."""
    return printable(os.fsencode(text).decode("utf-8", "replace"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
