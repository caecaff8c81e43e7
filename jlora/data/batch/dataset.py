"""Files and a tokenizer to batches: the pipeline from end to end."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from jlora.config.run_config import DataConfig, check_seed
from jlora.data.batch.batches import Dataset, make_dataset
from jlora.data.batch.mixing import content_ranks, hold_out, repeat
from jlora.data.batch.preview import choose_samples
from jlora.data.cache.build_cache import open_corpus, token_cache
from jlora.data.cache.corpus import check_bad_rows, fit
from jlora.data.cache.row_counts import Account
from jlora.data.cache.token_store import Store
from jlora.data.chat.jinja_sandbox import PINNED_DATE
from jlora.data.read.data_paths import Given, find_sources
from jlora.data.read.row_files import place
from jlora.data.tokenize.tokenized_rows import Example
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UsageError, counted, listing

# From here on a user wants to know where the token ids lie.
_LARGE = 100_000_000


def load_split(
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
) -> tuple[Dataset, Dataset | None]:
    """Returns what to train on, shuffled, and what is held out, in order.

    Raises:
        UsageError: no such file, a setting that does not fit it, or nothing to learn.
        UnsupportedError: a file format or chat template that jlora cannot use.
        CorruptError: records that cannot be used, or ids the model does not have.
    """
    if config.train is None:
        raise UsageError("--data.train is missing; give a file to train on")
    corpus = _Corpus(config.train, tokenizer, config, vocab_size=vocab_size, seed=seed)
    held = np.zeros(corpus.num_records, bool)
    if config.eval_fraction:
        held = hold_out(corpus.ranks, config.eval_fraction)
    train = corpus.dataset(
        corpus.epoch(~held), name="data.train", batch_size=batch_size, shuffle=True
    )
    train = replace(train, summary=corpus.lines() + train.summary)
    held_out = None
    if config.eval_fraction:
        held_out = corpus.dataset(
            np.flatnonzero(held), name="held out", batch_size=batch_size, shuffle=False
        )
    elif config.eval is not None:
        held_out = load_dataset(
            config.eval,
            tokenizer,
            config,
            vocab_size=vocab_size,
            batch_size=batch_size,
            seed=seed,
        )
    return train, held_out


def load_dataset(
    given: Given,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
    shuffle: bool = False,
) -> Dataset:
    """Returns the batches of all records of the files given; raises as `load_split`."""
    corpus = _Corpus(given, tokenizer, config, vocab_size=vocab_size, seed=seed)
    everything = np.ones(corpus.num_records, bool)
    names = [account.source.name for account in corpus.accounts]
    dataset = corpus.dataset(
        corpus.epoch(everything),
        name=names[0] if len(names) == 1 else "all",
        batch_size=batch_size,
        shuffle=shuffle,
    )
    return replace(dataset, summary=corpus.lines() + dataset.summary)


class _Corpus:
    """The examples of all sources that teach something, checked and cut to length."""

    def __init__(
        self,
        given: Given,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        vocab_size: int,
        seed: int,
    ) -> None:
        check_seed(seed)
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        sources = find_sources(given)
        self._store, self.accounts = open_corpus(sources, tokenizer, config)
        self._files = [file for source in sources for file in source.files]
        check_bad_rows(self.accounts, config)
        records = self._store.records
        _check_ids(self._store, self.accounts, self._files, tokenizer, vocab_size)
        _check_ends(int((records["learnt"] > 0).sum()), self.accounts)
        parts, begin, first_file = [], 0, 0
        for account in self.accounts:
            end = begin + account.records
            parts.append(
                fit(account, records[begin:end], self._store.loss_mask, first_file)
            )
            begin, first_file = end, first_file + len(account.source.files)
        kept, lengths, learnt = map(np.concatenate, zip(*parts, strict=True))
        # Of the records that are kept: where in the store, how long, of which source.
        self._kept = np.flatnonzero(kept)
        self._lengths, self._learnt = lengths[kept], learnt[kept]
        counts = [account.records for account in self.accounts]
        self._source = np.repeat(np.arange(len(counts)), counts)[kept]
        if not len(self._kept):
            _refuse_nothing_to_learn(self.accounts)

    @property
    def num_records(self) -> int:
        """Records that teach something."""
        return len(self._kept)

    def lines(self) -> list[str]:
        """What there is to say about each source."""
        lines = [line for account in self.accounts for line in account.lines()]
        if self._store.num_bytes >= _LARGE:
            size = self._store.num_bytes / 1e9
            lines.append(f"token ids: {size:.1f} GB in {token_cache(self._config)}")
        is_chat = any(account.reading.layout.is_chat for account in self.accounts)
        if is_chat and self._tokenizer.template().prints_date:
            lines.append(f"chat template: today is taken as {PINNED_DATE:%d %b %Y}")
        return lines

    @cached_property
    def ranks(self) -> np.ndarray:
        """A pseudo-random rank of each record; see `mixing`.

        By the whole record: what is held out does not depend on where it is cut.
        """
        tokens = self._store.tokens
        spans = self._store.records[["start", "length"]][self._kept]
        whole = (tokens[start : start + length] for start, length in spans)
        return content_ranks(whole, self._seed)

    def epoch(self, wanted: np.ndarray) -> np.ndarray:
        """Returns the records of one epoch among the wanted, by their weights."""
        weights = [account.source.weight for account in self.accounts]
        if set(weights) == {1.0}:
            return np.flatnonzero(wanted)
        parts = []
        for index, weight in enumerate(weights):
            members = np.flatnonzero(wanted & (self._source == index))
            parts.append(members[repeat(self.ranks[members], weight)])
        return np.concatenate(parts)

    def dataset(
        self, chosen: np.ndarray, *, name: str, batch_size: int, shuffle: bool
    ) -> Dataset:
        """Returns the batches of the chosen records."""
        dataset = make_dataset(
            self._store,
            self._store.records["start"][self._kept[chosen]],
            self._lengths[chosen],
            num_supervised=int(self._learnt[chosen].sum()),
            seq_len=self._config.row_length,
            packing=self._config.packing,
            batch_size=batch_size,
            pad_id=self._tokenizer.pad_id or 0,
            seed=self._seed,
            shuffle=shuffle,
        )
        samples = [
            self._example(int(self._kept[chosen[index]]), *dataset.record(index))
            for index in choose_samples(len(chosen))
        ]
        return replace(
            dataset,
            summary=[f"{name}: {line}" for line in _totals(dataset)],
            accounts=self.accounts,
            samples=samples,
        )

    def _example(self, index: int, tokens: np.ndarray, mask: np.ndarray) -> Example:
        record = self._store.records[index]
        path = self._files[record["file"]]
        return Example(path, int(record["number"]), tokens, mask)


def _check_ends(answers: int, accounts: Sequence[Account]) -> None:
    without = sum(account.without_end.count for account in accounts)
    if answers and without >= answers:
        raise UsageError(
            f"the end of no answer would be learnt ({accounts[0].without_end}): the "
            "chat template writes no control token after an answer, or leaves it "
            "outside its generation block, so the model would never learn to stop; use "
            "a template that ends each answer with the EOS or an end-of-turn token"
        )


def _refuse_nothing_to_learn(accounts: Sequence[Account]) -> NoReturn:
    names = listing([account.source.name for account in accounts], limit=3)
    learnt = sorted({account.reading.train_on for account in accounts})
    lines = "".join(f"\n  {line}" for a in accounts for line in a.lines())
    raise UsageError(
        f"{names}: nothing to learn with data.train_on={listing(learnt)}:{lines}"
    )


def _check_ids(
    store: Store,
    accounts: Sequence[Account],
    files: Sequence[Path],
    tokenizer: Tokenizer,
    vocab_size: int,
) -> None:
    """An id beyond the embedding is clamped in silence on a device: not there."""
    found: dict[int, str] = {}
    for name in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and index >= vocab_size:
            found[index] = f"the {name} token"
    if max(account.largest_id for account in accounts) >= vocab_size:
        for record in store.records:
            start = record["start"]
            tokens = store.tokens[start : start + record["length"]]
            for index in tokens[tokens >= vocab_size].tolist():
                where = place(files[record["file"]], int(record["number"]))
                found.setdefault(index, where)
    if found:
        ids = [
            f"{index} {tokenizer.token(index)!r} ({found[index]})"
            for index in sorted(found)
        ]
        raise CorruptError(
            f"the tokenizer has ids that the model's {vocab_size} embeddings do not "
            f"cover: {listing(ids)}; use the tokenizer that belongs to the model"
        )


def _totals(dataset: Dataset) -> list[str]:
    share = dataset.num_supervised / dataset.num_tokens
    fill = dataset.num_tokens / (dataset.num_rows * dataset.row_length)
    packed = ", packed" if dataset.packing else ""
    return [
        f"{counted(dataset.num_records, 'record')}, {dataset.num_tokens:,} tokens, "
        f"{dataset.num_supervised:,} of them learnt ({share:.1%})",
        f"{counted(dataset.num_rows, 'row')} of {dataset.row_length:,} tokens{packed}, "
        f"{fill:.1%} full",
    ]
