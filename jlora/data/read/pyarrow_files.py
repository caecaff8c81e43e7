"""Reads Parquet, Arrow and zstd files with pyarrow, which is imported when needed."""

import importlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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
            decoders = _json_decoders(file.schema_arrow, wanted, arrow)
            yield from _rows(file.iter_batches(_BATCH_ROWS, columns=wanted), decoders)
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
            decoders = _json_decoders(reader.schema, wanted, arrow)
            yield from _rows((batch.select(wanted) for batch in batches), decoders)
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


_Decoder = Callable[[Any], Any]


def _rows(
    batches: Iterable[Any], decoders: Mapping[str, _Decoder]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                # A null column stays: "text is null" says more than "no text".
                values = {name: without_nulls(row[name]) for name in row}
                for name, decode in decoders.items():
                    values[name] = decode(values[name])
                yield number, values


def _json_decoders(
    schema: Any, columns: Iterable[str], arrow: Any
) -> dict[str, _Decoder]:
    """Returns a function for each column that holds JSON text, also deep inside."""
    found = {name: _json_decoder(schema.field(name).type, arrow) for name in columns}
    return {name: decode for name, decode in found.items() if decode}


def _json_decoder(type: Any, arrow: Any) -> _Decoder | None:
    if getattr(type, "extension_name", None) == "arrow.json":
        return _decode_json
    if arrow.types.is_struct(type):
        fields = {field.name: _json_decoder(field.type, arrow) for field in type}
        inner = {name: decode for name, decode in fields.items() if decode}
        return partial(_decode_fields, inner) if inner else None
    is_list = arrow.types.is_list(type) or arrow.types.is_large_list(type)
    decode = _json_decoder(type.value_type, arrow) if is_list else None
    return decode and partial(_decode_items, decode)


def _decode_json(value: Any) -> Any:
    """Returns what JSON text says; what is none stays text, for the row's own error."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _decode_fields(decoders: Mapping[str, _Decoder], value: Any) -> Any:
    for name, decode in decoders.items():
        if value and name in value:
            value[name] = decode(value[name])
    return value


def _decode_items(decode: _Decoder, value: Any) -> Any:
    return value and [decode(item) for item in value]


def _names_only(
    names: Iterable[str], rows: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in range(1, rows + 1):
        yield number, dict.fromkeys(names)


def without_nulls(value: Any) -> Any:
    """Drops keys without a value: Arrow gives all objects of a column the same keys.

    So do tools that write JSON from Arrow.
    """
    if isinstance(value, dict):
        return {
            key: without_nulls(item) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _import_pyarrow(path: Path, what: str) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UnsupportedError(
            f"{path} is {what}, for which jlora needs pyarrow; install it with "
            "pip install 'jlora[parquet]', or write the records as plain JSONL"
        ) from error
