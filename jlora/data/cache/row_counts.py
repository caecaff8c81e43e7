"""Counts the rows of a source and says what happened to them, for the log and --plan."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jlora.data.cache.token_store import TokenBlock
from jlora.data.read.bad_rows import MAX_LISTED, BadRow
from jlora.data.read.data_source import DataSource
from jlora.data.read.row_files import row_location
from jlora.data.read.row_formats import RowFormat
from jlora.data.tokenize.tokenize_rows import TokenizedRows
from jlora.errors import counted, listing

_LOSS_COUNTS = {
    "assistant": "every assistant turn",
    "last_assistant": "the last assistant turn",
    "completion": "the completion",
    "all": "every token",
}


@dataclass
class Occurrences:
    """How many rows something happened to, and which of them were the first."""

    MOST: ClassVar[int] = 8
    count: int = 0
    first: list[list[int]] = field(default_factory=list)
    """[index of the file in its source, number of the row]."""

    def add(self, file: int, number: int) -> None:
        """Counts one more row."""
        self.count += 1
        if len(self.first) < self.MOST:
            self.first.append([file, number])

    def describe(self, files: Sequence[Path]) -> str:
        """Returns where the first rows are, such as "line 1, 5 and 3 more"."""
        rows = [(files[file], number) for file, number in self.first]
        if len({path for path, _ in rows}) == 1:
            path = rows[0][0]
            unit = row_location(path, 0).removeprefix(f"{path}, ").removesuffix(" 0")
            shown = f"{unit} {', '.join(str(number) for _, number in rows)}"
        else:
            shown = "; ".join(row_location(path, number) for path, number in rows)
        rest = self.count - len(self.first)
        return f"{shown} and {rest:,} more" if rest else shown


@dataclass
class RowCounts:
    """The rows of one source: how many there are, and what happened to them."""

    source: DataSource
    row_format: RowFormat
    seq_len: int
    """Tokens that examples are cut to."""
    # Counted while tokenising, and stored with the token ids:
    rows: int = 0
    records: int = 0
    """Rows that became records, even if they are cut or dropped later."""
    largest_id: int = 0
    bad: list[list[Any]] = field(default_factory=list)
    """The first bad rows: index of the file, number, reason, column."""
    bad_reasons: dict[str, Occurrences] = field(default_factory=dict)
    """By the reason, in which numbers and quotations are left out."""
    encoded_separately: Occurrences = field(default_factory=Occurrences)
    without_end: Occurrences = field(default_factory=Occurrences)
    opened_thoughts: Occurrences = field(default_factory=Occurrences)
    # Counted by `truncate_records`:
    cut: Occurrences = field(default_factory=Occurrences)
    tokens_lost: int = 0
    cut_away: Occurrences = field(default_factory=Occurrences)
    """Dropped: cut before the first token that the loss counts."""
    unsupervised: Occurrences = field(default_factory=Occurrences)
    """Dropped: the loss counts no token."""
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    """Tokens that the loss counts in the kept records, after the cut."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Bits of the length before the cut -> records: a histogram by powers of two."""

    @property
    def num_bad(self) -> int:
        """Rows that cannot be used."""
        return sum(rows.count for rows in self.bad_reasons.values())

    @property
    def num_dropped(self) -> int:
        """Good rows in which nothing is to be trained on."""
        return self.cut_away.count + self.unsupervised.count

    def bad_rows(self) -> list[BadRow]:
        """Returns the first bad rows."""
        return [BadRow(self.source.files[file], *rest) for file, *rest in self.bad]

    def add(self, rows: TokenizedRows, block: TokenBlock) -> None:
        """Counts the rows of a chunk and its records."""
        file = self.source.files.index(rows.path)
        self.rows += rows.num_rows
        self.records += len(block.records)
        self.largest_id = max(self.largest_id, int(block.tokens.max(initial=0)))
        for row in rows.bad_rows:
            if len(self.bad) < MAX_LISTED:
                self.bad.append([file, row.number, row.reason, row.column])
            reason = re.sub(r"'[^']*'|\"[^\"]*\"", "...", row.reason)
            reason = re.sub(r"\d+", "N", reason)
            self.bad_reasons.setdefault(reason, Occurrences()).add(file, row.number)
        for number in rows.encoded_separately:
            self.encoded_separately.add(file, number)
        for number in rows.without_end:
            self.without_end.add(file, number)
        for number in rows.opened_thoughts:
            self.opened_thoughts.add(file, number)

    def to_json(self) -> dict[str, Any]:
        """Returns what was counted while tokenising; files only by their index."""
        return {
            "row_format": asdict(self.row_format),
            "rows": self.rows,
            "records": self.records,
            "largest_id": self.largest_id,
            "bad": self.bad,
            "bad_reasons": {name: asdict(x) for name, x in self.bad_reasons.items()},
            "encoded_separately": asdict(self.encoded_separately),
            "without_end": asdict(self.without_end),
            "opened_thoughts": asdict(self.opened_thoughts),
        }

    @classmethod
    def from_json(
        cls, stored: Mapping[str, Any], source: DataSource, seq_len: int
    ) -> "RowCounts":
        """Returns the counts that `to_json` stored; nothing is cut or dropped yet."""
        reasons = stored["bad_reasons"].items()
        parts = {
            "row_format": RowFormat(**stored["row_format"]),
            "bad_reasons": {name: Occurrences(**x) for name, x in reasons},
            "encoded_separately": Occurrences(**stored["encoded_separately"]),
            "without_end": Occurrences(**stored["without_end"]),
            "opened_thoughts": Occurrences(**stored["opened_thoughts"]),
        }
        return cls(source=source, seq_len=seq_len, **{**stored, **parts})

    def lines(self) -> list[str]:
        """Returns the lines of the log about this source, one fact in each."""
        source, row_format = self.source, self.row_format
        files = f"{len(source.files):,} files, " if len(source.files) > 1 else ""
        passes = "" if source.weight == 1 else f", {source.weight:g} passes per epoch"
        lines = [
            f"format {row_format.name}, the loss counts "
            f"{_LOSS_COUNTS[row_format.train_on]}, {files}"
            f"{counted(self.rows, 'record')}{passes}"
        ]
        if row_format.split_turns:
            lines.append("each answer is a sample of its own")
        if source.ignored:
            lines.append(f"not data, ignored: {listing(source.ignored, limit=5)}")
        lost = counted(self.tokens_lost, "token")
        events = [
            *((rows, "left out", f": {why}") for why, rows in self.bad_reasons.items()),
            (self.cut, "cut", f" at data.seq_len={self.seq_len}, {lost} lost"),
            (self.cut_away, "dropped", ", as the cut left nothing to train on"),
            (self.unsupervised, "dropped", " with nothing to train on"),
            (
                self.encoded_separately,
                "prompt and completion encoded separately in",
                ", where they would share a token",
            ),
            (
                self.without_end,
                "no control token ends the answer in",
                "; the model may not learn to stop",
            ),
            (
                self.opened_thoughts,
                "the chat template opens a thought and drops it from finished answers, in",
                "; the thought of the answer trained on is kept, earlier ones are dropped",
            ),
        ]
        lines += [
            f"{what} {counted(rows.count, 'record')}{why} ({rows.describe(source.files)})"
            for rows, what, why in events
            if rows.count
        ]
        return [f"{source.name}: {line}" for line in lines]
