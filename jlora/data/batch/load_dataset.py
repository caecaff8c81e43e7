"""From the user's files and a tokenizer to batches: the whole data pipeline."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from jlora.config.run_config import DataConfig, RowConfig, check_seed
from jlora.data.batch.batches import Dataset
from jlora.data.batch.mixing import content_ranks, hold_out, repeat_records
from jlora.data.batch.preview import choose_samples
from jlora.data.batch.truncation import truncate_records
from jlora.data.cache.build_cache import open_token_store, token_cache_folder
from jlora.data.cache.row_counts import RowCounts
from jlora.data.chat.jinja_sandbox import PINNED_DATE
from jlora.data.read.bad_rows import bad_rows_error
from jlora.data.read.data_paths import check_disjoint, find_data_sources
from jlora.data.read.data_source import DataPaths, DataSource
from jlora.data.read.row_files import row_location
from jlora.data.read.splits import TO_EVALUATE, TO_TRAIN
from jlora.data.tokenize.tokenize_rows import Example
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UsageError, counted, listing

# The log says where the token cache is if it takes at least this much.
_LARGE_BYTES = 100_000_000


def load_split(
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
) -> tuple[Dataset, Dataset | None]:
    """Returns the training data, shuffled, and the held-out data (if any), in order.

    Raises:
        UsageError: no such file, a setting that does not fit it, or nothing to train on.
        UnsupportedError: a file format or chat template that jlora cannot use.
        CorruptError: records that cannot be used, or ids that the model does not have.
    """
    if config.train is None:
        raise UsageError("--data.train is missing; give a file to train on")
    sources = find_data_sources(config.train)
    evaluated: list[DataSource] = []
    if config.eval is not None:
        evaluated = find_data_sources(config.eval, TO_EVALUATE)
    elif not config.eval_fraction:
        found = [source.validation() for source in sources]
        evaluated = [source for source in found if source]
    check_disjoint(sources, evaluated)
    rest = tokenizer, config, vocab_size, batch_size, seed
    corpus = _Corpus(sources, *rest)
    held = np.zeros(corpus.num_records, bool)
    if config.eval_fraction:
        held = hold_out(corpus.ranks, config.eval_fraction)
    read = {source.name: source.split for source in evaluated}
    lines = [*_split_lines(sources, read), *corpus.lines()]
    train = corpus.dataset(corpus.epoch(~held), "data.train", lines, shuffle=True)
    held_out = None
    if config.eval_fraction:
        held_out = corpus.dataset(np.flatnonzero(held), "held out", [], shuffle=False)
    elif evaluated:
        held_out = _Corpus(evaluated, *rest).whole(shuffle=False)
    return train, held_out


def _split_lines(
    sources: Sequence[DataSource], evaluated: Mapping[str, str]
) -> list[str]:
    """Returns a line on what is done with each split of each folder."""
    lines = []
    for source in sources:
        others = list(source.other_splits)
        used = [name for name in others if evaluated.get(f"{source.name} ({name})")]
        unused = [name for name in others if name not in used]
        line = f"{source.name}: the split {source.split} is trained on"
        if used:
            line += f", {listing(used)} evaluated on"
        if unused:
            line += f", {listing(unused)} not read"
        lines += [line] if others else []
    return lines


def load_dataset(
    given: DataPaths,
    tokenizer: Tokenizer,
    config: RowConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
    shuffle: bool = False,
    splits: Sequence[str] = TO_TRAIN,
) -> Dataset:
    """Returns the batches of all records of the given files; raises as `load_split`.

    Of a folder with several splits, the first of `splits` that it has is read.
    """
    sources = find_data_sources(given, splits)
    corpus = _Corpus(sources, tokenizer, config, vocab_size, batch_size, seed)
    return corpus.whole(shuffle=shuffle)


class _Corpus:
    """The records of all sources that can be trained on, checked and cut to length."""

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: Tokenizer,
        config: RowConfig,
        vocab_size: int,
        batch_size: int,
        seed: int,
    ) -> None:
        check_seed(seed)
        self._tokenizer, self._config = tokenizer, config
        self._batch_size, self._seed = batch_size, seed
        self._files = [file for source in sources for file in source.files]
        self._store, self.counts = open_token_store(sources, tokenizer, config)
        _check_bad_rows(self.counts, config)
        self._check_ids(vocab_size)
        records = self._store.records
        _check_ends(int((records["supervised"] > 0).sum()), self.counts)
        parts, begin, first_file = [], 0, 0
        for counts in self.counts:
            own = records[begin : begin + counts.records]
            parts.append(
                truncate_records(counts, own, self._store.loss_mask, first_file)
            )
            begin += counts.records
            first_file += len(counts.source.files)
        kept, lengths, supervised = map(np.concatenate, zip(*parts, strict=True))
        # For each kept record: its index in the store, its length, and its source.
        self._kept = np.flatnonzero(kept)
        self._lengths = lengths[kept].astype(np.int64)
        self._supervised = supervised[kept]
        sizes = [counts.records for counts in self.counts]
        self._source = np.repeat(np.arange(len(sizes)), sizes)[kept]
        if not len(self._kept):
            _raise_nothing_to_train_on(self.counts)

    @property
    def num_records(self) -> int:
        """Records that can be trained on."""
        return len(self._kept)

    def lines(self) -> list[str]:
        """Returns the lines of the log about each source."""
        hub = [counts.source for counts in self.counts if counts.source.hub]
        lines = [
            f"{source.name}: {source.hub} of the hub, the split {source.split}, "
            f"{counted(len(source.files), 'file')}"
            for source in hub
        ]
        lines += [line for counts in self.counts for line in counts.lines()]
        if self._store.num_bytes >= _LARGE_BYTES:
            size = self._store.num_bytes / 1e9
            lines.append(
                f"token ids: {size:.1f} GB in {token_cache_folder(self._config)}"
            )
        is_chat = any(counts.row_format.is_chat for counts in self.counts)
        if is_chat and self._tokenizer.template().prints_date:
            lines.append(f"chat template: today is taken as {PINNED_DATE:%d %b %Y}")
        return lines

    @cached_property
    def ranks(self) -> np.ndarray:
        """A pseudo-random rank of each record, before the cut; see `mixing`."""
        tokens = self._store.tokens
        spans = self._store.records[["start", "length"]][self._kept]
        whole = (tokens[start : start + length] for start, length in spans)
        return content_ranks(whole, self._seed)

    def epoch(self, wanted: np.ndarray) -> np.ndarray:
        """Returns the records of one epoch among the wanted ones, by weight."""
        weights = [counts.source.weight for counts in self.counts]
        if set(weights) == {1.0}:
            return np.flatnonzero(wanted)
        parts = []
        for index, weight in enumerate(weights):
            members = np.flatnonzero(wanted & (self._source == index))
            parts.append(members[repeat_records(self.ranks[members], weight)])
        return np.concatenate(parts)

    def whole(self, *, shuffle: bool) -> Dataset:
        """Returns the batches of all records."""
        names = [counts.source.name for counts in self.counts]
        chosen = self.epoch(np.ones(self.num_records, bool))
        name = names[0] if len(names) == 1 else "all"
        lines = [
            f"{c.source.name}: the split {c.source.split} is read, "
            f"{listing(list(c.source.other_splits))} not"
            for c in self.counts
            if c.source.other_splits
        ]
        return self.dataset(chosen, name, [*lines, *self.lines()], shuffle=shuffle)

    def dataset(
        self, chosen: np.ndarray, name: str, lines: list[str], *, shuffle: bool
    ) -> Dataset:
        """Returns the batches of the chosen records; `lines` are the sources' own."""
        starts = self._store.records["start"][self._kept[chosen]]
        lengths = self._lengths[chosen]
        samples = []
        for index in choose_samples(len(chosen)):
            path, number = self._location(int(self._kept[chosen[index]]))
            span = slice(starts[index], starts[index] + lengths[index])
            tokens, mask = self._store.tokens[span], self._store.loss_mask[span]
            samples.append(Example(path, number, tokens, mask))
        return Dataset(
            store=self._store,
            starts=starts,
            lengths=lengths,
            num_supervised=int(self._supervised[chosen].sum()),
            seq_len=self._config.row_length,
            packing=self._config.packing,
            batch_size=self._batch_size,
            pad_id=self._tokenizer.pad_id or 0,
            seed=self._seed,
            shuffle=shuffle,
            name=name,
            source_lines=lines,
            row_counts=self.counts,
            samples=samples,
        )

    def _location(self, index: int) -> tuple[Path, int]:
        """Returns the file of a record of the store, and its line or row."""
        record = self._store.records[index]
        return self._files[record["file"]], int(record["number"])

    def _check_ids(self, vocab_size: int) -> None:
        """Raises CorruptError for ids beyond the embedding, which devices clamp."""
        tokenizer = self._tokenizer
        found: dict[int, str] = {}
        for name in ("bos", "eos", "pad"):
            index = getattr(tokenizer, f"{name}_id")
            if index is not None and index >= vocab_size:
                found[index] = f"the {name} token"
        if max(counts.largest_id for counts in self.counts) >= vocab_size:
            for row, record in enumerate(self._store.records):
                tokens = self._store.tokens[record["start"] :][: record["length"]]
                for index in tokens[tokens >= vocab_size].tolist():
                    found.setdefault(index, row_location(*self._location(row)))
        if found:
            ids = [
                f"{index} {tokenizer.token(index)!r} ({found[index]})"
                for index in sorted(found)
            ]
            raise CorruptError(
                f"the tokenizer has ids that the model's {vocab_size} embeddings do "
                f"not cover: {listing(ids)}; use the tokenizer that belongs to the model"
            )


def _check_bad_rows(counts: Sequence[RowCounts], config: RowConfig) -> None:
    """Raises CorruptError if there are more bad rows than data.on_bad_row allows."""
    bad = sum(c.num_bad for c in counts)
    if bad > (config.max_bad_rows if config.on_bad_row == "skip" else 0):
        name = listing([c.source.name for c in counts if c.num_bad], limit=3)
        listed = [row for c in counts for row in c.bad_rows()]
        rows = sum(c.rows for c in counts)
        raise bad_rows_error(name, listed, bad=bad, rows=rows, config=config)


def _check_ends(answers: int, counts: Sequence[RowCounts]) -> None:
    """Raises UsageError if no answer is trained on up to a token that ends it."""
    without = sum(c.without_end.count for c in counts)
    if answers and without >= answers:
        where = counts[0].without_end.describe(counts[0].source.files)
        raise UsageError(
            f"no end-of-turn token would be trained on ({where}): the chat template "
            "writes no control token after an answer, or leaves it outside its "
            "generation block, so the model would never learn to stop; use a template "
            "that ends each answer with the EOS or an end-of-turn token"
        )


def _raise_nothing_to_train_on(counts: Sequence[RowCounts]) -> NoReturn:
    names = listing([c.source.name for c in counts], limit=3)
    train_on = sorted({c.row_format.train_on for c in counts})
    lines = "".join(f"\n  {line}" for c in counts for line in c.lines())
    raise UsageError(
        f"{names}: nothing to train on with data.train_on={listing(train_on)}:{lines}"
    )
