"""A file and a tokenizer to batches: the pipeline from end to end."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jlora.data.batches import Dataset, make_dataset
from jlora.data.jsonl import refuse
from jlora.data.records import Records, read_records
from jlora.data.tokenizer import Tokenizer
from jlora.data.tokens import Example, Tokenized, resolve_train_on, tokenize
from jlora.errors import CorruptError, UsageError, listing
from jlora.settings import DataConfig, check_seed

_LEARNT = {
    "assistant": "every assistant turn",
    "completion": "the completion",
    "all": "every token",
}


def load_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
    shuffle: bool,
) -> Dataset:
    """Returns the batches of a JSONL file.

    Raises:
        UsageError: no such file, a setting that does not fit it, or nothing to learn.
        UnsupportedError: a file format or chat template that jlora cannot use.
        CorruptError: records that cannot be used, or ids the model does not have.
    """
    check_seed(seed)
    path = Path(path)
    records = read_records(path, config.format)
    train_on = resolve_train_on(records, config.train_on)
    if records.is_chat:
        tokenizer.template()  # one message now instead of one per record
    tokenized = tokenize(records, tokenizer, train_on)
    total = len(records.good) + len(records.bad)
    if problems := records.bad + tokenized.problems:
        refuse(path, problems, total)
    _check_ids(path, tokenized.examples, tokenizer, vocab_size)
    kept, notes = _fit(tokenized.examples, config.seq_len)
    if not kept:
        raise UsageError(
            f"{path}: nothing to learn with data.train_on={train_on}"
            + "".join(f"; {note}" for note in notes)
        )
    dataset = make_dataset(
        kept,
        seq_len=config.seq_len,
        packing=config.packing,
        batch_size=batch_size,
        pad_id=tokenizer.pad_id or 0,
        seed=seed,
        shuffle=shuffle,
        summary=[],
    )
    lines = [*_facts(records, train_on, dataset), *notes, *_remarks(tokenized)]
    return replace(dataset, summary=[f"{path}: {line}" for line in lines])


def _check_ids(
    path: Path, examples: Sequence[Example], tokenizer: Tokenizer, vocab_size: int
) -> None:
    """An id beyond the embedding is clamped in silence on a device: not there."""
    found: dict[int, str] = {}
    for name in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and index >= vocab_size:
            found[index] = f"the {name} token"
    for example in examples:
        if example.tokens.max(initial=0) >= vocab_size:
            for index in example.tokens[example.tokens >= vocab_size].tolist():
                found.setdefault(index, f"{path}, line {example.line}")
    if found:
        ids = [
            f"{index} {tokenizer.token(index)!r} ({found[index]})"
            for index in sorted(found)
        ]
        raise CorruptError(
            f"the tokenizer has ids that the model's {vocab_size} embeddings do not "
            f"cover: {listing(ids)}; use the tokenizer that belongs to the model"
        )


def _fit(examples: Sequence[Example], seq_len: int) -> tuple[list[Example], list[str]]:
    """Returns the examples cut at `seq_len` that still teach something, and notes."""
    kept: list[Example] = []
    cut: list[int] = []
    lost = 0
    empty: list[int] = []
    emptied: list[int] = []
    for example in examples:
        if not example.loss_mask.any():
            empty.append(example.line)
            continue
        if len(example.tokens) > seq_len:
            lost += len(example.tokens) - seq_len
            cut.append(example.line)
            example = Example(
                example.line, example.tokens[:seq_len], example.loss_mask[:seq_len]
            )
            if not example.loss_mask.any():
                emptied.append(example.line)
                continue
        kept.append(example)
    notes = []
    if cut:
        notes.append(
            f"cut {_count(cut)} at data.seq_len={seq_len}, {lost:,} tokens lost "
            f"({_line_list(cut)})"
        )
    if emptied:
        notes.append(
            f"dropped {len(emptied)} of them, which had nothing to learn left "
            f"({_line_list(emptied)})"
        )
    if empty:
        notes.append(
            f"dropped {_count(empty)} with nothing to learn ({_line_list(empty)})"
        )
    return kept, notes


def _facts(records: Records, train_on: str, dataset: Dataset) -> list[str]:
    share = dataset.num_supervised / dataset.num_tokens
    fill = dataset.num_tokens / (dataset.num_rows * dataset.row_length)
    packed = ", packed" if dataset.packing else ""
    return [
        f"format {records.format}, the loss counts {_LEARNT[train_on]}",
        f"{dataset.num_records:,} records, {dataset.num_tokens:,} tokens, "
        f"{dataset.num_supervised:,} of them learnt ({share:.1%})",
        f"{dataset.num_rows:,} rows of {dataset.row_length:,} tokens{packed}, "
        f"{fill:.1%} full",
    ]


def _remarks(tokenized: Tokenized) -> list[str]:
    remarks = []
    if lines := tokenized.encoded_apart:
        remarks.append(
            f"prompt and completion encoded apart in {_count(lines)}, where they "
            f"would share a token ({_line_list(lines)})"
        )
    if lines := tokenized.without_end:
        remarks.append(
            f"no control token ends the answer in {_count(lines)}; the model may "
            f"not learn to stop ({_line_list(lines)})"
        )
    return remarks


def _count(lines: Sequence[int]) -> str:
    return f"{len(lines):,} record{'s' * (len(lines) != 1)}"


def _line_list(lines: Sequence[int]) -> str:
    return f"line {listing(lines, limit=8)}"
