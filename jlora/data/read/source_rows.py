"""Opens a source: its format, decided by the first good row, and all of its rows."""

import itertools
from collections.abc import Iterator

from jlora.config.run_config import RowConfig
from jlora.data.read.bad_rows import BadRow, bad_rows_error
from jlora.data.read.data_source import DataSource
from jlora.data.read.jsonl import parse_rows
from jlora.data.read.row_files import RowChunk, read_row_chunks, row_location
from jlora.data.read.row_formats import COLUMNS, RowFormat, detect_format
from jlora.errors import UsageError

# A file that begins with so many chunks of bad rows alone (8192 rows) is given up.
_MAX_BAD_CHUNKS = 32


def open_rows(
    source: DataSource, config: RowConfig, *, has_template: bool
) -> tuple[RowFormat, Iterator[RowChunk]]:
    """Returns the format of a source and all of its rows, in order.

    Raises:
        UsageError: no rows, or a setting that does not fit them.
        UnsupportedError: a kind of file that jlora cannot read.
        CorruptError: a damaged file, or rows that fit no format.
    """
    columns = {*(config.fields or {}).values(), *itertools.chain(*COLUMNS.values())}
    chunks = itertools.chain.from_iterable(
        read_row_chunks(file, columns) for file in source.files
    )
    seen: list[RowChunk] = []
    bad: list[BadRow] = []
    for chunk in itertools.islice(chunks, _MAX_BAD_CHUNKS):
        seen.append(chunk)
        rows, bad_here = parse_rows(chunk)
        if rows:
            number, first = rows[0]
            row_format = detect_format(
                first,
                config,
                has_template=has_template,
                source=source.name,
                where=row_location(chunk.path, number),
            )
            return row_format, itertools.chain(seen, chunks)
        bad += bad_here
    if bad:
        count = len(bad)
        raise bad_rows_error(source.name, bad, bad=count, rows=count, config=config)
    raise UsageError(
        f"{source.name}: no records; expected one JSON object per line, a JSON array, "
        "or a table (CSV, TSV, Parquet, Arrow) with rows"
    )
