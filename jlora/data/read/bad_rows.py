"""Rows that cannot be used: where they are, why, and the error that lists them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jlora.config.run_config import RowConfig
from jlora.data.read.row_files import row_location
from jlora.errors import CorruptError, JloraError, UsageError, counted

MAX_LISTED = 12


class RowError(CorruptError):
    """One record or conversation cannot be used; the message is the reason."""


@dataclass(frozen=True)
class BadRow:
    """A row (numbered from 1) that cannot be used, and the column of the error if known."""

    path: Path
    number: int
    reason: str
    column: int | None = None

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{row_location(self.path, self.number)}{column}: {self.reason}"


def bad_rows_error(
    name: str, listed: Sequence[BadRow], *, bad: int, rows: int, config: RowConfig
) -> JloraError:
    """Returns the error for `bad` of `rows` rows, of which the first are `listed`."""
    lines = "".join(f"\n  {row}" for row in listed[:MAX_LISTED])
    rest = bad - min(len(listed), MAX_LISTED)
    more = f"\n  and {rest:,} more" if rest > 0 else ""
    what = f"{name}: {bad:,} of {counted(rows, 'record')} cannot be used"
    if config.on_bad_row == "fail":
        what += "; correct or remove them, or leave them out with data.on_bad_row=skip"
    elif bad > config.max_bad_rows:
        what = f"more than data.max_bad_rows={config.max_bad_rows} bad rows: {what}"
    else:
        return UsageError(f"{what}, so nothing is left to train on:{lines}{more}")
    return CorruptError(f"{what}:{lines}{more}")
