"""All rows of some sources as examples, with an account of every row that is not one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from jlora.data.account import MAX_LISTED, Account
from jlora.data.files import Chunk, place, read_chunks
from jlora.data.jsonl import Problem, parse_rows
from jlora.data.records import detect_layout, known_columns
from jlora.data.sources import Source
from jlora.data.tokenizer import Tokenizer
from jlora.data.tokens import Example, Reading, resolve_train_on, tokenize
from jlora.errors import CorruptError, UsageError, listing
from jlora.settings import DataConfig

_MAX_SKIPPED_CHUNKS = 8


def read_source(
    source: Source, tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[Example], Account]:
    """Returns the examples of a source in order, uncut, and what became of its rows.

    Raises:
        UsageError: nothing in it, a setting that does not fit it, or no template.
        UnsupportedError: a kind of file or template that jlora cannot use.
        CorruptError: a damaged file, or rows that fit no format.
    """
    columns = known_columns(config.fields or {})
    chunks = _chunks(source, columns)
    account = None
    examples: list[Example] = []
    skipped: list[Chunk] = []  # before the first good row nothing is known yet
    for chunk in chunks:
        if account is None:
            reading = _find_reading(source, chunk, tokenizer, config)
            if reading is None:
                skipped.append(chunk)
                if len(skipped) == _MAX_SKIPPED_CHUNKS:
                    break  # not a file of records, whatever its end may hold
                continue
            account = Account(source, reading, config.seq_len)
        for part in [*skipped, chunk]:
            examples += _read_chunk(part, account, tokenizer)
        skipped.clear()
    if account is None:
        _refuse_empty(source, skipped)
    return examples, account


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


def _read_chunk(chunk: Chunk, account: Account, tokenizer: Tokenizer) -> list[Example]:
    tokenized = tokenize(chunk, account.reading, tokenizer)
    account.rows += len(chunk.rows)
    for problem in tokenized.problems:
        account.add_bad(problem)
    for number in tokenized.encoded_apart:
        account.encoded_apart.add(chunk.path, number)
    for number in tokenized.without_end:
        account.without_end.add(chunk.path, number)
    return tokenized.examples


def _refuse_empty(source: Source, chunks: Sequence[Chunk]) -> NoReturn:
    bad = [problem for chunk in chunks for problem in parse_rows(chunk)[1]]
    if bad:
        raise CorruptError(_list_bad(source.name, bad, len(bad), len(bad)))
    raise UsageError(
        f"{source.name}: no records; expected one JSON object per line, "
        "or a Parquet or Arrow file with rows"
    )


def check_bad_rows(accounts: Sequence[Account], config: DataConfig) -> None:
    """Applies data.on_bad_row.

    Raises:
        CorruptError: bad rows, and they are to stop the run or are too many.
    """
    total = sum(account.num_bad for account in accounts)
    if not total:
        return
    limit = config.max_bad_rows if config.on_bad_row == "skip" else 0
    if total <= limit:
        return
    listed = [problem for account in accounts for problem in account.bad]
    rows = sum(account.rows for account in accounts)
    name = listing([a.source.name for a in accounts if a.num_bad], limit=3)
    message = _list_bad(name, listed, total, rows)
    if limit:
        message = f"more than data.max_bad_rows={limit} bad rows: {message}"
    raise CorruptError(message)


def _list_bad(name: str, problems: Sequence[Problem], count: int, rows: int) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED])
    rest = count - min(len(problems), MAX_LISTED)
    more = f"\n  and {rest} more" if rest > 0 else ""
    return (
        f"{name}: {count} of {rows} records cannot be used; correct or remove them, or "
        f"leave them out with data.on_bad_row=skip:{lines}{more}"
    )


def fit(example: Example, account: Account) -> Example | None:
    """Returns an example cut to account.seq_len; None if nothing in it is learnt."""
    length, limit = len(example.tokens), account.seq_len
    account.lengths[length.bit_length()] += 1
    if not example.loss_mask.any():
        account.empty.add(example.path, example.number)
        return None
    if length > limit:
        account.tokens_lost += length - limit
        account.cut.add(example.path, example.number)
        example = replace(
            example,
            tokens=example.tokens[:limit],
            loss_mask=example.loss_mask[:limit],
        )
        if not example.loss_mask.any():
            account.emptied.add(example.path, example.number)
            return None
    account.kept += 1
    account.tokens += len(example.tokens)
    account.supervised += int(example.loss_mask.sum())
    return example
