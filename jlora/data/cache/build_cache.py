"""The rows of all sources to one store of token ids, on all cores, kept in a cache.

The store's key is a digest of the files, the tokenizer, the settings that decide what a row
becomes, and the code that does it; so a store that is found is the one that would be built.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jlora.config.run_config import DataConfig
from jlora.data.cache.corpus import open_source
from jlora.data.cache.row_counts import Account
from jlora.data.cache.token_store import (
    RECORD,
    Block,
    Store,
    StoreWriter,
    cached_store,
    default_cache,
)
from jlora.data.read.data_paths import Source
from jlora.data.read.jsonl import Problem
from jlora.data.read.row_files import Chunk
from jlora.data.tokenize.tokenized_rows import Example, Reading, tokenize
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import ResourceError

# A worker takes seconds to start, in which one process has done this much itself.
_BYTES_PER_WORKER = 4 << 20
_TELL_EVERY_S = 5.0


@dataclass(frozen=True)
class _Part:
    """What became of the rows of one chunk."""

    path: Path
    num_rows: int
    block: Block
    problems: list[Problem]
    encoded_apart: list[int]
    without_end: list[int]


def token_cache(config: DataConfig) -> Path:
    """Returns the folder of the stores."""
    cache = Path(config.cache_dir) if config.cache_dir else default_cache()
    return cache / "tokens"


def open_corpus(
    sources: Sequence[Source], tokenizer: Tokenizer, config: DataConfig
) -> tuple[Store, list[Account]]:
    """Returns all records of the sources, uncut, and the account of each source.

    Raises:
        UsageError: nothing in a source, a setting that does not fit it, no template, or a
            cache that cannot be written.
        UnsupportedError: a kind of file or template that jlora cannot use.
        CorruptError: a damaged file, or rows that fit no format.
        ResourceError: the cache's disk is full.
    """
    store = cached_store(
        token_cache(config),
        _key(sources, tokenizer, config),
        lambda writer: {"accounts": _build(writer, sources, tokenizer, config)},
    )
    accounts = [
        Account.from_note(note, source, config.row_length)
        for note, source in zip(store.note["accounts"], sources, strict=True)
    ]
    return store, accounts


def _key(sources: Sequence[Source], tokenizer: Tokenizer, config: DataConfig) -> str:
    """Returns a digest of all that the records follow from."""
    files = [[_digest(file) for file in source.files] for source in sources]
    code = [_digest(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    parts = {
        "files": files,
        "tokenizer": [tokenizer.fingerprint, special, tokenizer.adds_bos],
        "format": [config.format, config.fields, config.train_on],
        "code": [code, version("tokenizers"), version("jinja2")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(
    writer: StoreWriter,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> list[dict[str, Any]]:
    """Appends the records of all sources and returns their accounts' notes."""
    size = sum(file.stat().st_size for source in sources for file in source.files)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # which Linux has
        cores = len(os.sched_getaffinity(0))
    progress = _Progress(writer)
    notes, first_file = [], 0
    with _Tokenizing(tokenizer, min(cores, size // _BYTES_PER_WORKER)) as work:
        for source in sources:
            reading, chunks = open_source(source, tokenizer, config)
            account = Account(source, reading, config.row_length)
            for part in work.on(chunks, reading):
                _count(account, part)
                file = first_file + source.files.index(part.path)
                part.block.records["file"] = file
                account.records += len(part.block.records)
                account.largest_id = max(
                    account.largest_id, int(part.block.tokens.max(initial=0))
                )
                writer.append(part.block)
                progress.tell(source)
            notes.append(account.note())
            first_file += len(source.files)
    return notes


def _count(account: Account, part: _Part) -> None:
    account.rows += part.num_rows
    for problem in part.problems:
        account.add_bad(problem)
    for number in part.encoded_apart:
        account.encoded_apart.add(part.path, number)
    for number in part.without_end:
        account.without_end.add(part.path, number)


class _Tokenizing:
    """Turns chunks into parts, in order: here, or in processes of its own.

    Processes, as rendering and masks are Python; started afresh, because a fork of a
    process that has threads (JAX's, say) may hang.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer, self._ahead = tokenizer, 2 * workers
        self._pool = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            # Not as an argument: starting a process waits until it has read those, and
            # a tokenizer is more than a pipe holds.
            queue = context.Queue()
            queue.cancel_join_thread()  # a process that dies early leaves its own there
            for _ in range(workers):
                queue.put(tokenizer)
            self._pool = ProcessPoolExecutor(
                workers, context, initializer=_start_worker, initargs=(queue,)
            )

    def __enter__(self) -> "_Tokenizing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def on(self, chunks: Iterator[Chunk], reading: Reading) -> Iterator[_Part]:
        """Yields the part of each chunk; few chunks are in memory at a time."""
        if self._pool is None:
            for chunk in chunks:
                yield _make_part(chunk, reading, self._tokenizer)
            return
        pending: deque[Future[_Part]] = deque()
        try:
            for chunk in chunks:
                with _without_script():
                    pending.append(self._pool.submit(_work, chunk, reading))
                if len(pending) > self._ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise ResourceError(
                "a process that tokenises died, probably out of memory"
            ) from error


@contextmanager
def _without_script() -> Iterator[None]:
    """Keeps processes that start meanwhile from importing the script that is run.

    It has nothing they need, takes a second, and one without a guard would run again.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_worker_tokenizer: list[Tokenizer] = []


def _start_worker(tokenizers: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores are taken
    _worker_tokenizer.append(tokenizers.get())


def _end_with_parent() -> None:
    """Ends this process when the one that started it is killed, as no pipe tells it."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _work(chunk: Chunk, reading: Reading) -> _Part:
    return _make_part(chunk, reading, _worker_tokenizer[0])


def _make_part(chunk: Chunk, reading: Reading, tokenizer: Tokenizer) -> _Part:
    tokenized = tokenize(chunk, reading, tokenizer)
    return _Part(
        path=chunk.path,
        num_rows=len(chunk.rows),
        block=make_block(tokenized.examples),
        problems=tokenized.problems,
        encoded_apart=tokenized.encoded_apart,
        without_end=tokenized.without_end,
    )


def make_block(examples: Sequence[Example]) -> Block:
    """Returns examples one after the other; all of file 0."""
    records = np.zeros(len(examples), RECORD)
    empty = np.empty(0, np.int32)
    tokens = np.concatenate([empty, *(example.tokens for example in examples)])
    mask = np.concatenate([empty, *(example.loss_mask for example in examples)])
    for record, example in zip(records, examples, strict=True):
        learnt = np.flatnonzero(example.loss_mask)
        length = len(example.tokens)
        record["number"], record["length"] = example.number, length
        record["learnt"] = len(learnt)
        record["first_learnt"] = learnt[0] if len(learnt) else length
    records["start"] = np.cumsum(records["length"]) - records["length"]
    return Block(tokens.astype(np.int32), mask.astype(np.uint8), records)


class _Progress:
    """Tells every few seconds how far tokenising is, if it takes that long."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._start = self._told = time.monotonic()

    def tell(self, source: Source) -> None:
        now = time.monotonic()
        if now - self._told < _TELL_EVERY_S:
            return
        self._told = now
        rate = self._writer.num_tokens / (now - self._start)
        print(
            f"tokenising {source.name}: {self._writer.num_records:,} records, "
            f"{self._writer.num_tokens / 1e6:,.1f}M tokens, {rate:,.0f} tokens/s",
            flush=True,
        )
