"""Reads the rows of any kind of file; its first bytes decide the kind, not its name."""

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from jlora.data.read import pyarrow_files
from jlora.data.read.text_rows import NumberedRow, is_array, text_rows
from jlora.errors import UnsupportedError

# A fraction of a second's work, so that all cores end at about the same time.
CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 20
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
    b"<!DOC": "a web page",
    b"<html": "a web page",
}


@dataclass(frozen=True)
class RowChunk:
    """Some successive rows of a file."""

    path: Path
    rows: list[NumberedRow]


def row_location(path: Path, number: int) -> str:
    """Returns "FILE, line 3", "FILE, row 3" or "FILE, record 3", for messages."""
    return f"{path}, {_unit(path)} {number}"


@functools.lru_cache(maxsize=256)
def _unit(path: Path) -> str:
    if path.suffix in (".parquet", ".arrow"):
        return "row"
    return "record" if is_array(path) else "line"


def read_row_chunks(path: Path, columns: Collection[str]) -> Iterator[RowChunk]:
    """Yields the rows of a JSONL, JSON, CSV, TSV, Parquet or Arrow file in order.

    Text files may be compressed with gzip or zstd. Skips blank lines. Reads only the
    given columns of Parquet and Arrow files; of a file that has none of them, only the
    names of its columns.

    Raises:
        UnsupportedError: another kind of file, or one whose library is not installed.
        CorruptError: a damaged file, or a line that is too long.
    """
    with path.open("rb") as file:
        head = file.read(32)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UnsupportedError(
                f"{path} is {what}; jlora reads JSONL (one object per line), JSON arrays, "
                "CSV and TSV (plain, .gz or .zst), Parquet and Arrow files"
            )
    if head.startswith(_PARQUET):
        rows: Iterator[NumberedRow] = pyarrow_files.parquet_rows(path, columns)
    elif head.startswith((_ARROW_FILE, _ARROW_STREAM)):
        rows = pyarrow_files.arrow_rows(path, columns, stream=head[0] == 0xFF)
    else:
        rows = text_rows(path)
    chunk: list[NumberedRow] = []
    size = 0
    for number, row in rows:
        chunk.append((number, row))
        size += len(row) if isinstance(row, bytes) else 0
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield RowChunk(path, chunk)
            chunk, size = [], 0
    if chunk:
        yield RowChunk(path, chunk)
