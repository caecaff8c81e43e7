"""What became of every row of a source: counted, named and told."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jlora.data.read.data_paths import Source
from jlora.data.read.jsonl import Problem
from jlora.data.read.records import Layout
from jlora.data.read.row_files import place
from jlora.data.tokenize.tokenized_rows import Reading
from jlora.errors import counted, listing

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

    MOST: ClassVar[int] = 8
    count: int = 0
    first: list[tuple[Path, int]] = field(default_factory=list)

    def add(self, path: Path, number: int) -> None:
        """Counts one more row."""
        self.count += 1
        if len(self.first) < self.MOST:
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

    def note(self, files: Sequence[Path]) -> list[Any]:
        """Returns this as JSON, files by their index."""
        return [self.count, [[files.index(path), n] for path, n in self.first]]

    @classmethod
    def from_note(cls, note: Sequence[Any], files: Sequence[Path]) -> "Places":
        """Returns what `note` was made of."""
        count, first = note
        return cls(count, [(files[index], number) for index, number in first])

    @property
    def records(self) -> str:
        """The count with its noun."""
        return counted(self.count, "record")


@dataclass
class Account:
    """The rows of one source."""

    source: Source
    reading: Reading
    seq_len: int
    """Tokens that examples are cut at."""
    rows: int = 0
    records: int = 0
    """Rows that became records, whatever is cut or dropped later."""
    largest_id: int = 0
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

    def note(self) -> dict[str, Any]:
        """Returns what tokenising found out, as JSON; what `fit` counts is left out."""
        files, reading = self.source.files, self.reading
        return {
            "format": reading.layout.format,
            "is_chat": reading.layout.is_chat,
            "fields": dict(reading.layout.fields),
            "train_on": reading.train_on,
            "rows": self.rows,
            "records": self.records,
            "largest_id": self.largest_id,
            "bad": [
                [files.index(bad.path), bad.number, bad.reason, bad.column]
                for bad in self.bad
            ],
            "bad_reasons": {
                reason: places.note(files)
                for reason, places in self.bad_reasons.items()
            },
            "encoded_apart": self.encoded_apart.note(files),
            "without_end": self.without_end.note(files),
        }

    @classmethod
    def from_note(
        cls, note: Mapping[str, Any], source: Source, seq_len: int
    ) -> "Account":
        """Returns the account that `note` was made of, nothing cut or dropped yet."""
        files = source.files
        layout = Layout(note["format"], note["is_chat"], note["fields"])
        return cls(
            source,
            Reading(layout, note["train_on"]),
            seq_len,
            rows=note["rows"],
            records=note["records"],
            largest_id=note["largest_id"],
            bad=[Problem(files[file], *rest) for file, *rest in note["bad"]],
            bad_reasons={
                reason: Places.from_note(places, files)
                for reason, places in note["bad_reasons"].items()
            },
            encoded_apart=Places.from_note(note["encoded_apart"], files),
            without_end=Places.from_note(note["without_end"], files),
        )

    def lines(self) -> list[str]:
        """Returns what there is to say about the source, one fact per line."""
        source, reading = self.source, self.reading
        files = f"{len(source.files):,} files, " if len(source.files) > 1 else ""
        passes = "" if source.weight == 1 else f", {source.weight:g} passes per epoch"
        lines = [
            f"format {reading.layout.format}, the loss counts "
            f"{_LEARNT[reading.train_on]}, {files}{counted(self.rows, 'record')}{passes}"
        ]
        if source.ignored:
            lines.append(f"not data, ignored: {listing(source.ignored, limit=5)}")
        lines += [f"{text} ({places})" for places, text in self._told() if places.count]
        return [f"{source.name}: {line}" for line in lines]

    def _told(self) -> list[tuple[Places, str]]:
        """Returns what can happen to records, and where it did."""
        left_out = [
            (places, f"left out {places.records}: {reason}")
            for reason, places in self.bad_reasons.items()
        ]
        return [
            *left_out,
            (
                self.cut,
                f"cut {self.cut.records} at data.seq_len={self.seq_len}, "
                f"{counted(self.tokens_lost, 'token')} lost",
            ),
            (
                self.emptied,
                f"dropped {self.emptied.count:,} of them, which had nothing to learn left",
            ),
            (self.empty, f"dropped {self.empty.records} with nothing to learn"),
            (
                self.encoded_apart,
                f"prompt and completion encoded apart in {self.encoded_apart.records}, "
                "where they would share a token",
            ),
            (
                self.without_end,
                f"no control token ends the answer in {self.without_end.records}; the "
                "model may not learn to stop",
            ),
        ]
