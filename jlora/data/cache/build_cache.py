"""Tokenises the rows of all sources on all cores, once: token ids are kept in a cache.

The key of a store is a digest of the files, the tokenizer, the settings that decide what
a row becomes, and this code; a store with that key holds what would be built now.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jlora.config.run_config import RowConfig
from jlora.data.cache.row_counts import RowCounts
from jlora.data.cache.token_store import (
    RECORD,
    StoreWriter,
    TokenBlock,
    TokenStore,
    file_sha256,
    open_or_build,
)
from jlora.data.read.data_source import DataSource
from jlora.data.read.row_files import RowChunk
from jlora.data.read.row_formats import RowFormat
from jlora.data.read.source_rows import open_rows
from jlora.data.tokenize.tokenize_rows import Example, TokenizedRows, tokenize_rows
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import ResourceError
from jlora.hub import jlora_cache

# The code of `jlora.data`, which decides what a row becomes.
_CODE = Path(__file__).parent.parent
# A worker takes seconds to start, in which one process does this much itself.
_BYTES_PER_WORKER = 4 << 20
_REPORT_EVERY_S = 5.0
# What is known of a chunk's rows, without the examples, and the examples as a block.
_Tokenized = tuple[TokenizedRows, TokenBlock]


def token_cache_folder(config: RowConfig) -> Path:
    """Returns the folder of all stores: in data.cache_dir, $JLORA_CACHE or ~/.cache."""
    return Path(config.cache_dir or jlora_cache()) / "tokens"


def open_token_store(
    sources: Sequence[DataSource], tokenizer: Tokenizer, config: RowConfig
) -> tuple[TokenStore, list[RowCounts]]:
    """Returns all records of the sources, uncut, and the row counts of each source.

    Raises as `open_rows`, `tokenize_rows` and `open_or_build`, and ResourceError if a
    worker process died.
    """
    store = open_or_build(
        token_cache_folder(config),
        _key(sources, tokenizer, config),
        lambda writer: {"counts": _build(writer, sources, tokenizer, config)},
    )
    counts = [
        RowCounts.from_json(stored, source, config.row_length)
        for stored, source in zip(store.note["counts"], sources, strict=True)
    ]
    return store, counts


def _key(sources: Sequence[DataSource], tokenizer: Tokenizer, config: RowConfig) -> str:
    """Returns a digest of everything that decides the records."""
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    code = [file_sha256(file) for file in sorted(_CODE.rglob("*.py"))]
    parts = {
        "files": [[file_sha256(file) for file in source.files] for source in sources],
        "tokenizer": [tokenizer.fingerprint, special, tokenizer.adds_bos],
        "format": [config.format, config.fields, config.train_on, config.split_turns],
        "code": [code, version("tokenizers"), version("jinja2")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    writer: StoreWriter,
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    config: RowConfig,
) -> list[dict[str, Any]]:
    """Appends the records of all sources and returns their row counts as JSON."""
    size = sum(file.stat().st_size for source in sources for file in source.files)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # only on Linux
        cores = len(os.sched_getaffinity(0))
    workers = min(cores, size // _BYTES_PER_WORKER)
    all_counts, first_file = [], 0
    start = reported = time.monotonic()
    with _worker_pool(tokenizer, workers) as pool:
        for source in sources:
            row_format, chunks = open_rows(
                source, config, has_template=tokenizer.has_chat_template
            )
            counts = RowCounts(source, row_format, config.row_length)
            if pool:
                parts = _tokenize_with(pool, chunks, row_format, ahead=2 * workers)
            else:
                parts = (_tokenize(chunk, row_format, tokenizer) for chunk in chunks)
            for rows, block in parts:
                counts.add(rows, block)
                block.records["file"] = first_file + source.files.index(rows.path)
                writer.append(block)
                if (now := time.monotonic()) - reported >= _REPORT_EVERY_S:
                    reported = now
                    _report_progress(source, writer, now - start)
            all_counts.append(counts.to_json())
            first_file += len(source.files)
    return all_counts


def _report_progress(source: DataSource, writer: StoreWriter, seconds: float) -> None:
    print(
        f"tokenising {source.name}: {writer.num_records:,} records, "
        f"{writer.num_tokens / 1e6:,.1f}M tokens, "
        f"{writer.num_tokens / seconds:,.0f} tokens/s",
        flush=True,
    )


def _tokenize(
    chunk: RowChunk, row_format: RowFormat, tokenizer: Tokenizer
) -> _Tokenized:
    rows = tokenize_rows(chunk, row_format, tokenizer)
    return replace(rows, examples=[]), make_block(rows.examples)


def make_block(examples: Sequence[Example]) -> TokenBlock:
    """Returns examples one after the other, as records of file 0."""
    records = np.zeros(len(examples), RECORD)
    empty = np.empty(0, np.int32)
    tokens = np.concatenate([empty, *(example.tokens for example in examples)])
    mask = np.concatenate([empty, *(example.loss_mask for example in examples)])
    for record, example in zip(records, examples, strict=True):
        supervised = np.flatnonzero(example.loss_mask)
        length = len(example.tokens)
        record["number"], record["length"] = example.number, length
        record["supervised"] = len(supervised)
        record["first_supervised"] = supervised[0] if len(supervised) else length
    records["start"] = np.cumsum(records["length"]) - records["length"]
    return TokenBlock(tokens.astype(np.int32), mask.astype(np.uint8), records)


@contextmanager
def _worker_pool(
    tokenizer: Tokenizer, workers: int
) -> Iterator[ProcessPoolExecutor | None]:
    """Starts worker processes that have the tokenizer; yields None for fewer than two.

    Processes, because rendering and masks are Python. They are spawned, because a fork
    of a process with threads (such as JAX's) may hang.
    """
    if workers < 2:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    # Not in `initargs`: starting a process waits until it has read them, because a
    # tokenizer is larger than the buffer of a pipe.
    queue = context.Queue()
    queue.cancel_join_thread()  # a process that dies early never takes its tokenizer
    for _ in range(workers):
        queue.put(tokenizer)
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(queue,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenize_with(
    pool: ProcessPoolExecutor,
    chunks: Iterator[RowChunk],
    row_format: RowFormat,
    *,
    ahead: int,
) -> Iterator[_Tokenized]:
    """Yields each chunk tokenised, in order; at most `ahead` chunks are in memory."""
    pending: deque[Future[_Tokenized]] = deque()
    try:
        for chunk in chunks:
            with _without_main_module(), _interrupts_blocked():
                pending.append(pool.submit(_work, chunk, row_format))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that tokenises died, probably out of memory"
        ) from error


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keeps processes that are started meanwhile from importing the user's script.

    They need nothing of it, it costs a second, and a script without a guard would run
    again.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Has processes that are started meanwhile not notice Ctrl-C, which is for this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_tokenizer: list[Tokenizer] = []


def _start_worker(tokenizers: Any) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers
    _worker_tokenizer.append(tokenizers.get())


def _exit_with_parent() -> None:
    """Ends this process when its parent is killed, which it would not notice itself."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _work(chunk: RowChunk, row_format: RowFormat) -> _Tokenized:
    return _tokenize(chunk, row_format, _worker_tokenizer[0])
