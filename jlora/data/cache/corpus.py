"""How a source is read, which of its rows are bad, and what its records are cut to."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from jlora.config.run_config import DataConfig
from jlora.data.cache.row_counts import MAX_LISTED, Account
from jlora.data.read.data_paths import Source
from jlora.data.read.jsonl import Problem, parse_rows
from jlora.data.read.records import detect_layout, known_columns
from jlora.data.read.row_files import Chunk, place, read_chunks
from jlora.data.tokenize.tokenized_rows import Reading, resolve_train_on
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, JloraError, UsageError, counted, listing

_MAX_SKIPPED_CHUNKS = 32  # of bad rows alone, 8192


def open_source(
    source: Source, tokenizer: Tokenizer, config: DataConfig
) -> tuple[Reading, Iterator[Chunk]]:
    """Returns how to read a source, by its first good row, and all of its rows.

    Raises:
        UsageError: nothing in it, a setting that does not fit it, or no template.
        UnsupportedError: a kind of file that jlora cannot use.
        CorruptError: a damaged file, or rows that fit no format.
    """
    chunks = _chunks(source, known_columns(config.fields or {}))
    begin: list[Chunk] = []
    for chunk in chunks:
        begin.append(chunk)
        if reading := _find_reading(source, chunk, tokenizer, config):
            return reading, itertools.chain(begin, chunks)
        if len(begin) == _MAX_SKIPPED_CHUNKS:
            break  # not a file of records, whatever its end may hold
    raise _empty(source, begin, config)


def _chunks(source: Source, columns: frozenset[str]) -> Iterator[Chunk]:
    for file in source.files:
        yield from read_chunks(file, columns)


def _find_reading(
    source: Source, chunk: Chunk, tokenizer: Tokenizer, config: DataConfig
) -> Reading | None:
    """Returns how to read a source, by its first good row; None if here is none."""
    rows, _ = parse_rows(chunk)
    if not rows:
        return None
    number, first = rows[0]
    layout = detect_layout(
        first,
        format=config.format,
        fields=config.fields or {},
        has_template=tokenizer.has_chat_template,
        where=place(chunk.path, number),
    )
    return Reading(layout, resolve_train_on(layout, config.train_on, source.name))


def _empty(source: Source, chunks: Sequence[Chunk], config: DataConfig) -> JloraError:
    bad = [problem for chunk in chunks for problem in parse_rows(chunk)[1]]
    if bad:
        return _bad_rows(source.name, bad, len(bad), len(bad), config)
    return UsageError(
        f"{source.name}: no records; expected one JSON object per line, "
        "or a Parquet or Arrow file with rows"
    )


def check_bad_rows(accounts: Sequence[Account], config: DataConfig) -> None:
    """Applies data.on_bad_row.

    Raises:
        CorruptError: bad rows, and they are to stop the run or are too many.
    """
    total = sum(account.num_bad for account in accounts)
    limit = config.max_bad_rows if config.on_bad_row == "skip" else 0
    if total <= limit:
        return
    listed = [problem for account in accounts for problem in account.bad]
    rows = sum(account.rows for account in accounts)
    name = listing([a.source.name for a in accounts if a.num_bad], limit=3)
    raise _bad_rows(name, listed, total, rows, config)


def _bad_rows(
    name: str, problems: Sequence[Problem], count: int, rows: int, config: DataConfig
) -> JloraError:
    lines = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED])
    rest = count - min(len(problems), MAX_LISTED)
    more = f"\n  and {rest:,} more" if rest > 0 else ""
    what = f"{name}: {count:,} of {counted(rows, 'record')} cannot be used"
    if config.on_bad_row == "fail":
        what += "; correct or remove them, or leave them out with data.on_bad_row=skip"
    elif count > config.max_bad_rows:
        what = f"more than data.max_bad_rows={config.max_bad_rows} bad rows: {what}"
    else:
        return UsageError(f"{what}, so nothing is left to learn from:{lines}{more}")
    return CorruptError(f"{what}:{lines}{more}")


def fit(
    account: Account, records: np.ndarray, loss_mask: np.ndarray, first_file: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each record cut to account.seq_len: is it kept, its length, tokens learnt.

    A record with nothing to learn (left) is not kept.

    Args:
        account: of the records' source; counts what is cut and dropped.
        records: RECORD [n], of this source only.
        loss_mask: of all records.
        first_file: the number of the source's first file in the records.
    """
    limit = account.seq_len
    length, first = records["length"], records["first_learnt"]
    empty = records["learnt"] == 0
    cut = ~empty & (length > limit)
    emptied = cut & (first >= limit)
    kept = ~(empty | emptied)
    fitted = np.minimum(length, limit)
    for places, which in (
        (account.empty, empty),
        (account.cut, cut),
        (account.emptied, emptied),
    ):
        places.count = int(which.sum())
        for record in records[np.flatnonzero(which)[: places.MOST]]:
            file = account.source.files[record["file"] - first_file]
            places.first.append((file, int(record["number"])))
    bits, counts = np.unique(np.frexp(length)[1], return_counts=True)
    account.lengths = Counter(dict(zip(bits.tolist(), counts.tolist(), strict=True)))
    account.tokens_lost = int((length - limit)[cut].sum())
    account.kept = int(kept.sum())
    account.tokens = int(fitted[kept].sum())
    learnt = records["learnt"].copy()
    for index in np.flatnonzero(cut).tolist():
        start = records["start"][index]
        learnt[index] = loss_mask[start : start + limit].sum()
    account.supervised = int(learnt[kept].sum())
    return kept, fitted, learnt
