"""Files and a tokenizer to batches: the pipeline from end to end."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jlora.data.batches import Dataset, make_dataset
from jlora.data.corpus import Account, Places, check_bad_rows, read_source
from jlora.data.files import place
from jlora.data.mixing import content_ranks, hold_out, repeat
from jlora.data.sources import Given, find_sources
from jlora.data.tokenizer import Tokenizer
from jlora.data.tokens import Example
from jlora.errors import CorruptError, UsageError, listing
from jlora.settings import DataConfig, check_seed

_LEARNT = {
    "assistant": "every assistant turn",
    "last_assistant": "the last assistant turn",
    "completion": "the completion",
    "all": "every token",
}


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
    corpus = _Corpus(config.train, tokenizer, config, vocab_size)
    held = np.zeros(len(corpus.examples), bool)
    if config.eval_fraction:
        held = hold_out(corpus.ranks(seed), config.eval_fraction)
    train = corpus.dataset(
        corpus.epoch(~held, seed),
        name="data.train",
        batch_size=batch_size,
        seed=seed,
        shuffle=True,
    )
    held_out = None
    if config.eval_fraction:
        chosen = np.flatnonzero(held)
        held_out = corpus.dataset(
            chosen, name="held out", batch_size=batch_size, seed=seed, shuffle=False
        )
        held_out.summary.insert(
            0, f"held out: {len(chosen):,} of {len(held):,} records of data.train"
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
    corpus = _Corpus(given, tokenizer, config, vocab_size)
    everything = np.ones(len(corpus.examples), bool)
    return corpus.dataset(
        corpus.epoch(everything, seed),
        name=corpus.accounts[0].source.name,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


class _Corpus:
    """The examples of all sources, checked."""

    def __init__(
        self,
        given: Given,
        tokenizer: Tokenizer,
        config: DataConfig,
        vocab_size: int,
    ) -> None:
        self._config, self._pad_id = config, tokenizer.pad_id or 0
        self.examples: list[Example] = []
        self.accounts: list[Account] = []
        sources = []
        for index, source in enumerate(find_sources(given)):
            examples, account = read_source(source, tokenizer, config)
            self.examples += examples
            self.accounts.append(account)
            sources += [index] * len(examples)
        self._source = np.array(sources, np.int64)
        check_bad_rows(self.accounts, config)
        _check_ids(self.examples, tokenizer, vocab_size)
        self._check_ends()

    def ranks(self, seed: int) -> np.ndarray:
        return content_ranks((example.tokens for example in self.examples), seed)

    def epoch(self, wanted: np.ndarray, seed: int) -> np.ndarray:
        """Returns the records of one epoch among the wanted, by their weights."""
        weights = [account.source.weight for account in self.accounts]
        if set(weights) == {1.0}:
            return np.flatnonzero(wanted)
        ranks = self.ranks(seed)
        parts = []
        for index, weight in enumerate(weights):
            members = np.flatnonzero(wanted & (self._source == index))
            parts.append(members[repeat(ranks[members], weight)])
        return np.concatenate(parts)

    def dataset(
        self,
        chosen: np.ndarray,
        *,
        name: str,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> Dataset:
        """Returns the batches of the chosen examples.

        Raises:
            UsageError: none of them has anything to learn.
        """
        check_seed(seed)
        kept, notes = _fit([self.examples[i] for i in chosen], self._config.seq_len)
        learnt = {account.reading.train_on for account in self.accounts}
        if not kept:
            raise UsageError(
                f"{name}: nothing to learn with data.train_on={listing(sorted(learnt))}"
                + "".join(f"; {note}" for note in notes)
            )
        dataset = make_dataset(
            kept,
            seq_len=self._config.seq_len,
            packing=self._config.packing,
            batch_size=batch_size,
            pad_id=self._pad_id,
            seed=seed,
            shuffle=shuffle,
            summary=[],
        )
        lines = [line for account in self.accounts for line in _account_lines(account)]
        totals = [f"{name}: {line}" for line in [*_totals(dataset), *notes]]
        return replace(dataset, summary=lines + totals)

    def _check_ends(self) -> None:
        answers = sum(bool(example.loss_mask.any()) for example in self.examples)
        without = sum(account.without_end.count for account in self.accounts)
        if answers and without >= answers:
            places = self.accounts[0].without_end
            raise UsageError(
                f"the end of no answer would be learnt ({places}): the chat template "
                "writes no control token after an answer, or leaves it outside its "
                "generation block, so the model would never learn to stop; use a "
                "template that ends each answer with the EOS or an end-of-turn token"
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


def _fit(examples: Sequence[Example], seq_len: int) -> tuple[list[Example], list[str]]:
    """Returns the examples cut at `seq_len` that still teach something, and notes."""
    kept: list[Example] = []
    cut, empty, emptied = Places(), Places(), Places()
    lost = 0
    for example in examples:
        if not example.loss_mask.any():
            empty.add(example.path, example.number)
            continue
        if len(example.tokens) > seq_len:
            lost += len(example.tokens) - seq_len
            cut.add(example.path, example.number)
            example = replace(
                example,
                tokens=example.tokens[:seq_len],
                loss_mask=example.loss_mask[:seq_len],
            )
            if not example.loss_mask.any():
                emptied.add(example.path, example.number)
                continue
        kept.append(example)
    notes = []
    if cut.count:
        notes.append(
            f"cut {cut.records} at data.seq_len={seq_len}, {lost:,} tokens lost ({cut})"
        )
    if emptied.count:
        notes.append(
            f"dropped {emptied.count} of them, which had nothing to learn left "
            f"({emptied})"
        )
    if empty.count:
        notes.append(f"dropped {empty.records} with nothing to learn ({empty})")
    return kept, notes


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


def _account_lines(account: Account) -> list[str]:
    source, reading = account.source, account.reading
    files = f"{len(source.files)} files, " if len(source.files) > 1 else ""
    weight = "" if source.weight == 1 else f", {source.weight:g} passes per epoch"
    lines = [
        f"format {reading.layout.format}, the loss counts {_LEARNT[reading.train_on]}, "
        f"{files}{account.rows:,} records{weight}"
    ]
    if source.ignored:
        lines.append(f"not data, ignored: {listing(source.ignored, limit=5)}")
    for reason, places in account.bad_reasons.items():
        lines.append(f"left out {places.records}: {reason} ({places})")
    if account.encoded_apart.count:
        apart = account.encoded_apart
        lines.append(
            f"prompt and completion encoded apart in {apart.records}, where they would "
            f"share a token ({apart})"
        )
    if account.without_end.count:
        lines.append(
            f"no control token ends the answer in {account.without_end.records}; the "
            f"model may not learn to stop ({account.without_end})"
        )
    return [f"{source.name}: {line}" for line in lines]
