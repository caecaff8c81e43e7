"""Reads Parquet, Arrow and zstd files with pyarrow, which is imported when needed."""

import importlib
import io
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jlora.errors import CorruptError, UnsupportedError

_BATCH_ROWS = 1024


def parquet_rows(
    path: Path, columns: Collection[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row) of a Parquet file, one row group at a time."""
    arrow = _import_pyarrow(path, "a Parquet file")
    parquet = importlib.import_module("pyarrow.parquet")
    with _errors_of(path, arrow), parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = [name for name in names if name in columns]
        if wanted:
            yield from _rows(file.iter_batches(_BATCH_ROWS, columns=wanted))
        else:
            yield from _names_only(names, file.metadata.num_rows)


def arrow_rows(
    path: Path, columns: Collection[str], *, stream: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row) of an Arrow file, or stream as datasets saves."""
    arrow = _import_pyarrow(path, "an Arrow file")
    ipc = importlib.import_module("pyarrow.ipc")
    with _errors_of(path, arrow), arrow.memory_map(str(path)) as file:
        reader = (ipc.open_stream if stream else ipc.open_file)(file)
        names = reader.schema.names
        wanted = [name for name in names if name in columns]
        batches: Iterable[Any] = reader
        if not stream:
            batches = map(reader.get_batch, range(reader.num_record_batches))
        if wanted:
            yield from _rows(batch.select(wanted) for batch in batches)
        else:
            yield from _names_only(names, sum(batch.num_rows for batch in batches))


def open_zstd(path: Path) -> io.BufferedReader:
    """Returns the unpacked bytes of a zstd file; reading damaged data raises OSError."""
    arrow = _import_pyarrow(path, "compressed with zstd")
    stream = arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream, 1 << 18)


@contextmanager
def _errors_of(path: Path, arrow: Any) -> Iterator[None]:
    """Turns what pyarrow raises about a file into an error that names the file."""
    try:
        yield
    except (arrow.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptError(f"{path}: damaged ({reason}); get the file again") from error


def _rows(batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                # A null column stays: "text is null" says more than "no text".
                yield number, {name: _without_nulls(row[name]) for name in row}


def _names_only(
    names: Iterable[str], rows: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in range(1, rows + 1):
        yield number, dict.fromkeys(names)


def _without_nulls(value: Any) -> Any:
    """Drops keys without a value: Arrow gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(item) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _import_pyarrow(path: Path, what: str) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UnsupportedError(
            f"{path} is {what}, for which jlora needs pyarrow; install it with "
            "pip install 'jlora[parquet]', or write the records as plain JSONL"
        ) from error
