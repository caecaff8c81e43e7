"""Reads the rows of any kind of file; its first bytes decide the kind, not its name."""

import gzip
import io
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.read import pyarrow_files
from jlora.errors import CorruptError, UnsupportedError

MAX_LINE_BYTES = 16 << 20
# A fraction of a second's work, so that all cores end at about the same time.
CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 20
# gzip can reach 1000 to 1 and zstd far more, text hardly 30 to 1: a file that unpacks to
# more than this is an attack (a "zip bomb"), not data.
MAX_RATIO = 200
RATIO_FROM_BYTES = 1 << 28
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
    b"<!DOC": "a web page",
    b"<html": "a web page",
}
# A row with its number from 1: JSON text, or the values of its columns.
NumberedRow = tuple[int, bytes | dict[str, Any]]


@dataclass(frozen=True)
class RowChunk:
    """Some successive rows of a file."""

    path: Path
    rows: list[NumberedRow]


def row_location(path: Path, number: int) -> str:
    """Returns "FILE, line 3" or "FILE, row 3", for messages."""
    unit = "row" if path.suffix in (".parquet", ".arrow") else "line"
    return f"{path}, {unit} {number}"


def read_row_chunks(path: Path, columns: Collection[str]) -> Iterator[RowChunk]:
    """Yields the rows of a JSONL (plain, gzip, zstd), Parquet or Arrow file in order.

    Skips blank lines. Reads only the given columns of Parquet and Arrow files; of a file
    that has none of them, only the names of its columns.

    Raises:
        UnsupportedError: another kind of file, or one whose library is not installed.
        CorruptError: a damaged file, or a line that is too long.
    """
    with path.open("rb") as file:
        head = file.read(32)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UnsupportedError(
                f"{path} is {what}; jlora reads JSONL (one object per line; plain, .gz "
                "or .zst), Parquet and Arrow files"
            )
    if head.startswith(_PARQUET):
        rows: Iterator[NumberedRow] = pyarrow_files.parquet_rows(path, columns)
    elif head.startswith((_ARROW_FILE, _ARROW_STREAM)):
        rows = pyarrow_files.arrow_rows(path, columns, stream=head[0] == 0xFF)
    else:
        rows = _lines(path, head)
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


def _lines(path: Path, head: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes) of every line that is not blank."""
    limit = max(path.stat().st_size * MAX_RATIO, RATIO_FROM_BYTES)
    number = size = 0
    try:
        with _open(path, head) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                size += len(raw)
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if len(raw) > MAX_LINE_BYTES:
                    raise CorruptError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; "
                        "expected one JSON object per line"
                    )
                if size > limit:
                    raise CorruptError(
                        f"{path} unpacks to more than {limit:,} bytes, {MAX_RATIO} "
                        "times its size; unpack it yourself if that is meant"
                    )
                # White space around the JSON text; a CR inside a string is escaped.
                if stripped := raw.strip(b" \t\r\n"):
                    yield number, stripped
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk, not of the content
        raise CorruptError(
            f"{path}: damaged after line {number} ({error}); get the file again"
        ) from error


def _open(path: Path, head: bytes) -> io.BufferedIOBase:
    if head.startswith(_GZIP):
        return gzip.open(path)
    if head.startswith(_ZSTD):
        return pyarrow_files.open_zstd(path)
    return path.open("rb")
