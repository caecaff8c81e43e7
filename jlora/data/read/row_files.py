"""Files of any kind to chunks of rows; what a file is, its first bytes say."""

import gzip
import io
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.read import columnar
from jlora.errors import CorruptError, UnsupportedError

MAX_LINE_BYTES = 16 << 20
# A fraction of a second's work, so that all cores end at about the same time.
CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 20
# gzip can reach 1000 to 1 and zstd far more, text hardly 30 to 1: what unpacks to more
# than this is a trap, not data.
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


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: numbers from 1, and JSON text or a row of columns each."""

    path: Path
    rows: list[tuple[int, bytes | dict[str, Any]]]


def place(path: Path, number: int) -> str:
    """Returns where a row stands, for messages."""
    unit = "row" if path.suffix in (".parquet", ".arrow") else "line"
    return f"{path}, {unit} {number}"


def read_chunks(path: Path, columns: Collection[str]) -> Iterator[Chunk]:
    """Yields the rows of a JSONL (plain, gzip, zstd), Parquet or Arrow file in order.

    Blank lines are left out. Of columns that are not in `columns`, Parquet and Arrow
    rows keep the name only where the file has none of `columns`.

    Raises:
        UnsupportedError: another kind of file, or one whose library is not installed.
        CorruptError: a damaged file, or a line over the cap.
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
        rows: Any = columnar.parquet_rows(path, columns)
    elif head.startswith((_ARROW_FILE, _ARROW_STREAM)):
        rows = columnar.arrow_rows(path, columns, stream=head[0] == 0xFF)
    else:
        rows = _lines(path, head)
    yield from _in_chunks(path, rows)


def _in_chunks(
    path: Path, rows: Iterator[tuple[int, bytes | dict[str, Any]]]
) -> Iterator[Chunk]:
    chunk: list[tuple[int, bytes | dict[str, Any]]] = []
    size = 0
    for number, row in rows:
        chunk.append((number, row))
        size += len(row) if isinstance(row, bytes) else 0
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield Chunk(path, chunk)
            chunk, size = [], 0
    if chunk:
        yield Chunk(path, chunk)


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
                # Only the file's own line ends go: a CR in a JSON string is escaped.
                if stripped := raw.strip(b" \t\r\n"):
                    yield number, stripped
    except (EOFError, zlib.error, gzip.BadGzipFile, columnar.Damaged) as error:
        raise CorruptError(
            f"{path}: damaged after line {number} ({error}); get the file again"
        ) from error


def _open(path: Path, head: bytes) -> io.BufferedIOBase:
    if head.startswith(_GZIP):
        return gzip.open(path)
    if head.startswith(_ZSTD):
        return columnar.open_zstd(path)
    return path.open("rb")
