"""What will be trained on, for a person to look at: a table, a histogram, samples."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from jlora.data.batch.batches import Dataset
from jlora.data.cache.row_counts import Account
from jlora.data.read.row_files import place
from jlora.data.tokenize.tokenized_rows import Example
from jlora.data.tokenize.tokenizer import Tokenizer

NUM_SAMPLES = 3
_BAR = 40
# Of a long sample, this many tokens of each end are shown.
_SHOWN_TOKENS = 400


# A record as the model reads it: a title, stretches of text, whether each is learnt.
Sample = tuple[str, list[tuple[str, bool]]]


def plan_lines(dataset: Dataset) -> list[str]:
    """Returns the counts of each source, and a histogram of the records' lengths."""
    lengths: Counter[int] = Counter()
    for account in dataset.accounts:
        lengths += account.lengths
    return [*_table(dataset.accounts), "", *_histogram(lengths)]


def _table(accounts: Sequence[Account]) -> list[str]:
    rows = [
        *[("source", "format", "rows", "bad", "dropped", "cut", "kept", "passes")],
        *(
            (
                account.source.name,
                account.reading.layout.format,
                f"{account.rows:,}",
                f"{account.num_bad:,}",
                f"{account.num_dropped:,}",
                f"{account.cut.count:,}",
                f"{account.kept:,}",
                f"{account.source.weight:g}",
            )
            for account in accounts
        ),
    ]
    ends = [("tokens", "learnt")]
    ends += [
        (f"{a.tokens:,}", f"{a.supervised / a.tokens:.1%}" if a.tokens else "-")
        for a in accounts
    ]
    rows = [row + end for row, end in zip(rows, ends, strict=True)]
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
        bar = "#" * -(-count * _BAR // most)
        lines.append(f"  {f'{low:,}-{high:,}':>17}  {count:>9,}  {bar}".rstrip())
    return lines


def make_samples(dataset: Dataset, tokenizer: Tokenizer) -> list[Sample]:
    """Returns a few records from the start, the middle and the end of the data."""
    return [_sample(example, tokenizer) for example in dataset.samples]


def choose_samples(count: int) -> list[int]:
    """Returns which of `count` records `make_samples` shows."""
    last = count - 1
    steps = max(NUM_SAMPLES - 1, 1)
    return list(dict.fromkeys(last * step // steps for step in range(NUM_SAMPLES)))


def _sample(example: Example, tokenizer: Tokenizer) -> Sample:
    tokens = example.tokens.tolist()
    learnt = example.loss_mask.astype(bool).tolist()
    title = (
        f"{place(example.path, example.number)}: {len(tokens):,} tokens, "
        f"{sum(learnt):,} of them learnt"
    )
    skipped = len(tokens) - 2 * _SHOWN_TOKENS
    if skipped <= 0:
        return title, _pieces(tokens, learnt, tokenizer)
    gap = (f"\n... {skipped:,} tokens more ...\n", False)
    head = _pieces(tokens[:_SHOWN_TOKENS], learnt[:_SHOWN_TOKENS], tokenizer)
    tail = _pieces(tokens[-_SHOWN_TOKENS:], learnt[-_SHOWN_TOKENS:], tokenizer)
    return title, [*head, gap, *tail]


def _pieces(
    tokens: list[int], learnt: list[bool], tokenizer: Tokenizer
) -> list[tuple[str, bool]]:
    pieces, end, text = [], 0, ""
    for is_learnt, group in groupby(learnt):
        end += len(list(group))
        # What a stretch spells depends on what stands before it: a leading space, say.
        longer = tokenizer.spell(tokens[:end])
        pieces.append((_printable(longer[len(text) :]), is_learnt))
        text = longer
    return pieces


def _printable(text: str) -> str:
    """A text that cannot steer a terminal."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
