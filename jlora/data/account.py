"""What became of every row of a source: counted, named and told."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from jlora.data.files import place
from jlora.data.jsonl import Problem
from jlora.data.sources import Source
from jlora.data.tokens import Reading
from jlora.errors import listing

MAX_LISTED = 12
_LEARNT = {
    "assistant": "every assistant turn",
    "last_assistant": "the last assistant turn",
    "completion": "the completion",
    "all": "every token",
}


@dataclass
class Places:
    """How many rows something happened to, and where the first of them stand."""

    count: int = 0
    first: list[tuple[Path, int]] = field(default_factory=list)

    def add(self, path: Path, number: int) -> None:
        """Counts one more row."""
        self.count += 1
        if len(self.first) < 8:
            self.first.append((path, number))

    def __str__(self) -> str:
        files = {path for path, _ in self.first}
        if len(files) == 1:
            (path,) = files
            unit = place(path, 0).removeprefix(f"{path}, ").removesuffix(" 0")
            shown = f"{unit} {', '.join(str(number) for _, number in self.first)}"
        else:
            shown = "; ".join(place(path, number) for path, number in self.first)
        rest = self.count - len(self.first)
        return f"{shown} and {rest:,} more" if rest else shown

    @property
    def records(self) -> str:
        """The count with its noun."""
        return f"{self.count:,} record{'s' * (self.count != 1)}"


@dataclass
class Account:
    """The rows of one source."""

    source: Source
    reading: Reading
    seq_len: int
    """Tokens that examples are cut at."""
    rows: int = 0
    bad: list[Problem] = field(default_factory=list)
    """The first bad rows."""
    bad_reasons: dict[str, Places] = field(default_factory=dict)
    """Reasons, without what differs from row to row."""
    encoded_apart: Places = field(default_factory=Places)
    without_end: Places = field(default_factory=Places)
    cut: Places = field(default_factory=Places)
    tokens_lost: int = 0
    emptied: Places = field(default_factory=Places)
    """Dropped: cut before anything was to be learnt."""
    empty: Places = field(default_factory=Places)
    """Dropped: nothing to learn."""
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    """Of the examples that are kept, after the cut."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Bits of the length before the cut -> examples: a histogram by powers of two."""

    @property
    def num_bad(self) -> int:
        """Rows that cannot be used."""
        return sum(places.count for places in self.bad_reasons.values())

    @property
    def num_dropped(self) -> int:
        """Good rows with nothing to learn."""
        return self.emptied.count + self.empty.count

    def add_bad(self, problem: Problem) -> None:
        """Counts a bad row under its reason, numbers and quotations left out."""
        if len(self.bad) < MAX_LISTED:
            self.bad.append(problem)
        reason = re.sub(r"'[^']*'|\"[^\"]*\"", "...", problem.reason)
        reason = re.sub(r"\d+", "N", reason)
        self.bad_reasons.setdefault(reason, Places()).add(problem.path, problem.number)

    def lines(self) -> list[str]:
        """Returns what there is to say about the source, one fact per line."""
        source, reading = self.source, self.reading
        files = f"{len(source.files):,} files, " if len(source.files) > 1 else ""
        passes = "" if source.weight == 1 else f", {source.weight:g} passes per epoch"
        lines = [
            f"format {reading.layout.format}, the loss counts "
            f"{_LEARNT[reading.train_on]}, {files}{self.rows:,} records{passes}"
        ]
        if source.ignored:
            lines.append(f"not data, ignored: {listing(source.ignored, limit=5)}")
        for reason, places in self.bad_reasons.items():
            lines.append(f"left out {places.records}: {reason} ({places})")
        lines += self._cuts_and_drops()
        if self.encoded_apart.count:
            lines.append(
                f"prompt and completion encoded apart in {self.encoded_apart.records}, "
                f"where they would share a token ({self.encoded_apart})"
            )
        if self.without_end.count:
            lines.append(
                f"no control token ends the answer in {self.without_end.records}; the "
                f"model may not learn to stop ({self.without_end})"
            )
        return [f"{source.name}: {line}" for line in lines]

    def _cuts_and_drops(self) -> list[str]:
        lines = []
        if self.cut.count:
            lines.append(
                f"cut {self.cut.records} at data.seq_len={self.seq_len}, "
                f"{self.tokens_lost:,} tokens lost ({self.cut})"
            )
        if self.emptied.count:
            lines.append(
                f"dropped {self.emptied.count:,} of them, which had nothing to learn "
                f"left ({self.emptied})"
            )
        if self.empty.count:
            lines.append(
                f"dropped {self.empty.records} with nothing to learn ({self.empty})"
            )
        return lines
