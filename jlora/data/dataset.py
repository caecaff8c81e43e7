"""Files and a tokenizer to batches: the pipeline from end to end."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NoReturn

import numpy as np

from jlora.data.account import Account
from jlora.data.batches import Dataset, make_dataset
from jlora.data.corpus import check_bad_rows, fit, read_source
from jlora.data.files import place
from jlora.data.mixing import content_ranks, hold_out, repeat
from jlora.data.preview import choose_samples
from jlora.data.sources import Given, find_sources
from jlora.data.tokenizer import Tokenizer
from jlora.data.tokens import Example
from jlora.errors import CorruptError, UsageError, listing
from jlora.settings import DataConfig, check_seed


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
    held = np.zeros(len(corpus.examples), bool)
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
    everything = np.ones(len(corpus.examples), bool)
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
        self._config, self._pad_id, self._seed = config, tokenizer.pad_id or 0, seed
        whole: list[Example] = []
        self.accounts: list[Account] = []
        sources: list[int] = []
        for index, source in enumerate(find_sources(given)):
            examples, account = read_source(source, tokenizer, config)
            whole += examples
            self.accounts.append(account)
            sources += [index] * len(examples)
        check_bad_rows(self.accounts, config)
        _check_ids(whole, tokenizer, vocab_size)
        _check_ends(whole, self.accounts)
        fitted = [fit(e, self.accounts[i]) for e, i in zip(whole, sources, strict=True)]
        self.examples = [example for example in fitted if example is not None]
        good = [i for i, example in enumerate(fitted) if example is not None]
        self._source = np.array([sources[i] for i in good], np.int64)
        if not good:
            _refuse_nothing_to_learn(self.accounts)
        # By the whole record: what is held out does not depend on where it is cut.
        self._whole = [whole[i].tokens for i in good]

    def lines(self) -> list[str]:
        """What there is to say about each source."""
        return [line for account in self.accounts for line in account.lines()]

    @cached_property
    def ranks(self) -> np.ndarray:
        """A pseudo-random rank of each example; see `mixing`."""
        return content_ranks(self._whole, self._seed)

    def epoch(self, wanted: np.ndarray) -> np.ndarray:
        """Returns the examples of one epoch among the wanted, by their weights."""
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
        """Returns the batches of the chosen examples."""
        examples = [self.examples[i] for i in chosen]
        dataset = make_dataset(
            examples,
            seq_len=self._config.seq_len,
            packing=self._config.packing,
            batch_size=batch_size,
            pad_id=self._pad_id,
            seed=self._seed,
            shuffle=shuffle,
            summary=[],
        )
        return replace(
            dataset,
            summary=[f"{name}: {line}" for line in _totals(dataset)],
            accounts=self.accounts,
            samples=choose_samples(examples),
        )


def _check_ends(examples: Sequence[Example], accounts: Sequence[Account]) -> None:
    answers = sum(bool(example.loss_mask.any()) for example in examples)
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
    examples: Sequence[Example], tokenizer: Tokenizer, vocab_size: int
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
                found.setdefault(index, place(example.path, example.number))
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
        f"{dataset.num_records:,} records, {dataset.num_tokens:,} tokens, "
        f"{dataset.num_supervised:,} of them learnt ({share:.1%})",
        f"{dataset.num_rows:,} rows of {dataset.row_length:,} tokens{packed}, "
        f"{fill:.1%} full",
    ]
