"""Shows a person what will be trained on: a table, a histogram and samples."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from jlora.data.batch.batches import Dataset
from jlora.data.cache.row_counts import RowCounts
from jlora.data.read.row_files import row_location
from jlora.data.tokenize.tokenize_rows import Example
from jlora.data.tokenize.tokenizer import Tokenizer

NUM_SAMPLES = 3
_BAR_WIDTH = 40
# Of a long sample, this many tokens of each end are shown.
_SHOWN_TOKENS = 400


class Piece(NamedTuple):
    """A stretch of a record's text."""

    text: str
    is_supervised: bool
    """Whether the loss counts it."""
    is_token: bool = False
    """Whether it is one added token, such as <|im_end|>, and not the letters of one."""


# A record as the model reads it: a title and the pieces of its text.
Sample = tuple[str, list[Piece]]


def preview_lines(dataset: Dataset) -> list[str]:
    """Returns a table of the sources and a histogram of the records' lengths."""
    lengths = sum((counts.lengths for counts in dataset.row_counts), Counter())
    return [*_table(dataset.row_counts), "", *_histogram(lengths)]


def _table(counts: Sequence[RowCounts]) -> list[str]:
    head = ("source", "format", "rows", "bad", "dropped", "cut", "kept", "passes")
    rows: list[Sequence[str]] = [(*head, "tokens", "supervised")]
    for c in counts:
        numbers = (c.rows, c.num_bad, c.num_dropped, c.cut.count, c.kept)
        share = f"{c.supervised / c.tokens:.1%}" if c.tokens else "-"
        rows.append(
            (
                *(c.source.name, c.row_format.name),
                *(f"{number:,}" for number in numbers),
                *(f"{c.source.weight:g}", f"{c.tokens:,}", share),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _histogram(lengths: Counter[int]) -> list[str]:
    lines = ["tokens per record, before the cut at data.seq_len:"]
    most = max(lengths.values())
    for bits in range(min(lengths), max(lengths) + 1):
        low, high = (1 << bits) >> 1, (1 << bits) - 1
        count = lengths[bits]
        bar = "#" * -(-count * _BAR_WIDTH // most)
        lines.append(f"  {f'{low:,}-{high:,}':>17}  {count:>9,}  {bar}".rstrip())
    return lines


def choose_samples(count: int) -> list[int]:
    """Returns which of `count` records to show: from the start, middle and end."""
    last = count - 1
    steps = max(NUM_SAMPLES - 1, 1)
    return list(dict.fromkeys(last * step // steps for step in range(NUM_SAMPLES)))


def first_prompt(dataset: Dataset, tokenizer: Tokenizer) -> str | None:
    """Returns what comes before the answer in the first sample; None of a conversation.

    Of a text without an answer, its first words.
    """
    if dataset.row_counts[0].row_format.is_chat:
        return None
    example = dataset.samples[0]
    tokens = example.tokens.tolist()
    counted = example.loss_mask.tolist().index(1)
    return tokenizer.decode(tokens[:counted]) or tokenizer.decode(tokens[:8])


def preview_samples(dataset: Dataset, tokenizer: Tokenizer) -> list[Sample]:
    """Returns the text of the dataset's samples, and which parts the loss counts."""
    return [_sample(example, tokenizer) for example in dataset.samples]


def _sample(example: Example, tokenizer: Tokenizer) -> Sample:
    tokens = example.tokens.tolist()
    mask = example.loss_mask.astype(bool).tolist()
    title = (
        f"{row_location(example.path, example.number)}: {len(tokens):,} tokens, "
        f"{sum(mask):,} of them supervised"
    )
    skipped = len(tokens) - 2 * _SHOWN_TOKENS
    if skipped <= 0:
        return title, _pieces(tokens, mask, tokenizer)
    gap = Piece(f"\n... {skipped:,} tokens more ...\n", False)
    head = _pieces(tokens[:_SHOWN_TOKENS], mask[:_SHOWN_TOKENS], tokenizer)
    tail = _pieces(tokens[-_SHOWN_TOKENS:], mask[-_SHOWN_TOKENS:], tokenizer)
    return title, [*head, gap, *tail]


def _pieces(tokens: list[int], mask: list[bool], tokenizer: Tokenizer) -> list[Piece]:
    pieces, end, text = [], 0, ""
    kinds = [
        (is_counted, tokenizer.is_added(token) and index)
        for index, (token, is_counted) in enumerate(zip(tokens, mask, strict=True))
    ]
    for (is_counted, added), group in groupby(kinds):
        end += len(list(group))
        # The text of a token depends on those before it (a leading space, say).
        longer = tokenizer.decode(tokens[:end], skip_special=False)
        text, new = longer, longer[len(text) :]
        pieces.append(Piece(new, is_counted, added is not False))
    return pieces
