"""Reads the rows of text files: JSON lines, one JSON array, CSV and TSV, also compressed."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jlora.data.read import pyarrow_files
from jlora.errors import CorruptError, listing

MAX_LINE_BYTES = 16 << 20
# gzip can reach 1000 to 1 and zstd far more, text hardly 30 to 1: a file that unpacks to
# more than this is an attack (a "zip bomb"), not data.
MAX_RATIO = 200
RATIO_FROM_BYTES = 1 << 28
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"
_TABLE = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?$")
_BLOCK = 1 << 16
_SPACE = " \t\r\n"
# A row with its number from 1: JSON text, or the values of its columns.
NumberedRow = tuple[int, bytes | dict[str, Any]]


def text_rows(path: Path) -> Iterator[NumberedRow]:
    """Yields number and content of every row: JSON text, or the columns of a table.

    Lines are numbered as in the file; the records of a JSON array from 1.

    Raises:
        UnsupportedError: zstd without its library.
        CorruptError: a damaged file, or a line or record that is too long.
    """
    if _TABLE.search(path.name):
        return _table_rows(path)
    return _array_rows(path) if is_array(path) else _lines(path)


def is_array(path: Path) -> bool:
    """Returns whether a text file is one JSON array; False if it cannot be read."""
    try:
        with _Text(path) as text:
            return text.read(_BLOCK).lstrip(_SPACE)[:1] == "["
    except (EOFError, zlib.error, OSError, ValueError):
        return False


class _Text:
    """The text of a file, unpacked, as UTF-8 or UTF-16 with its mark; counts its size."""

    def __init__(self, path: Path) -> None:
        """Opens the file."""
        self._path = path
        self._limit = max(path.stat().st_size * MAX_RATIO, RATIO_FROM_BYTES)
        self._size = 0
        with path.open("rb") as file:
            head = file.read(4)
        self._binary: BinaryIO = _open(path, head)
        with _open(path, head) as unpacked:
            start = unpacked.read(3)
        self._encoding = "utf-16" if start[:2] in _UTF16 else "utf-8"
        if start == _UTF8_MARK:
            self._binary.read(3)
        self._text: io.TextIOWrapper | None = None

    def __enter__(self) -> "_Text":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self._binary.close()

    def readline(self) -> bytes:
        """Returns the next line as UTF-8, at most one byte longer than it may be."""
        if self._encoding == "utf-8":
            return self._counted(self._binary.readline(MAX_LINE_BYTES + 1))
        return self._counted(self.text.readline(MAX_LINE_BYTES + 1).encode())

    def read(self, count: int) -> str:
        """Returns the next characters."""
        text = self.text.read(count)
        self._counted(text)
        return text

    @property
    def text(self) -> io.TextIOWrapper:
        """The decoded file, in which only line feeds end lines."""
        if self._text is None:
            encoding = self._encoding
            self._text = io.TextIOWrapper(self._binary, encoding, newline="\n")
        return self._text

    def _counted(self, piece: Any) -> Any:
        self._size += len(piece)
        if self._size > self._limit:
            raise CorruptError(
                f"{self._path} unpacks to more than {self._limit:,} bytes, {MAX_RATIO} "
                "times its size; unpack it yourself if that is meant"
            )
        return piece


def _open(path: Path, head: bytes) -> Any:
    if head.startswith(_GZIP):
        return gzip.open(path)
    if head.startswith(_ZSTD):
        return pyarrow_files.open_zstd(path)
    return path.open("rb")


def _damaged(path: Path, where: str, error: Exception) -> CorruptError:
    if isinstance(error, OSError) and error.errno:
        raise error  # of the disk, not of the content
    return CorruptError(f"{path}: damaged after {where} ({error}); get the file again")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes) of every line that is not blank."""
    number = 0
    try:
        with _Text(path) as text:
            while raw := text.readline():
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise CorruptError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; "
                        "expected one JSON object per line"
                    )
                # White space around the JSON text; a CR inside a string is escaped.
                if stripped := raw.strip(b" \t\r\n"):
                    yield number, stripped
    except (EOFError, zlib.error, OSError, UnicodeError) as error:
        raise _damaged(path, f"line {number}", error) from error


def _array_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, JSON text) of the items of the one array in a file."""
    number = 0
    try:
        with _Text(path) as text:
            items = _Items(path, text.read)
            while (item := items.next(number + 1)) is not None:
                number += 1
                yield number, item.encode()
    except (EOFError, zlib.error, OSError, UnicodeError) as error:
        raise _damaged(path, f"record {number}", error) from error


class _Items:
    """Splits the text of an array into that of its items, holding little of it."""

    def __init__(self, path: Path, read: Callable[[int], str]) -> None:
        self._path, self._read = path, read
        self._rest, self._start, self._is_first = "", 0, True
        self._decode = json.JSONDecoder().raw_decode
        self._skip_space()
        self._start += 1  # the opening bracket

    def next(self, number: int) -> str | None:
        """Returns the text of the next item, None after the last."""
        letter = self._skip_space()
        if letter == "]":
            self._start += 1
            if self._skip_space():
                raise CorruptError(f"{self._path}: text follows the JSON array")
            return None
        if not self._is_first:
            if letter != ",":
                raise self._error(number, "expected a comma or the array's end")
            self._start += 1
            self._skip_space()
        self._is_first = False
        size = _BLOCK
        while True:
            try:
                _, end = self._decode(self._rest, self._start)
            except RecursionError as error:
                raise self._error(number, "JSON nested too deeply") from error
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                if len(self._rest) - self._start > MAX_LINE_BYTES:
                    raise self._error(
                        number, f"longer than {MAX_LINE_BYTES:,} bytes, or {reason}"
                    ) from error
                if not self._more(size):
                    raise self._error(number, f"not JSON, {reason}") from error
                size *= 2  # so that a long item is tried a few times only
                continue
            # A number may go on in the next block.
            if end < len(self._rest) or not self._more(size):
                item = self._rest[self._start : end]
                self._start = end
                return item

    def _skip_space(self) -> str:
        """Returns the next letter that is no white space, "" at the end."""
        while True:
            while self._rest[self._start : self._start + 1] in (" ", "\t", "\r", "\n"):
                self._start += 1
            if self._start < len(self._rest) or not self._more(_BLOCK):
                return self._rest[self._start : self._start + 1]

    def _more(self, size: int) -> bool:
        piece = self._read(size)
        self._rest, self._start = self._rest[self._start :] + piece, 0
        return piece != ""

    def _error(self, number: int, reason: str) -> CorruptError:
        return CorruptError(f"{self._path}, record {number} of the array: {reason}")


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of its last line, {column: text}) of each row of a CSV or TSV file."""
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if ".tsv" in path.name else ","
    number = 0
    try:
        with _Text(path) as text:
            lines = iter(lambda: text.readline().decode(), "")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(reader, None) or []
            if not all(header) or len({*header}) < len(header):
                raise CorruptError(
                    f"{path}: the first line does not name each column once: "
                    f"{listing([repr(name) for name in header])}"
                )
            for fields in reader:
                number = reader.line_num
                if fields and len(fields) != len(header):
                    raise CorruptError(
                        f"{path}, line {number}: {len(fields)} fields, where the first "
                        f"line names {len(header)}; quote a field that holds the delimiter"
                    )
                if fields:
                    yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise CorruptError(f"{path}, line {number + 1}: {error}") from error
    except (EOFError, zlib.error, OSError, UnicodeError) as error:
        raise _damaged(path, f"line {number}", error) from error
