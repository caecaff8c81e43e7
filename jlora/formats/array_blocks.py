"""Reads arrays from files in blocks: each is read, checked and copied while it is cached.

A few threads share the blocks of a tensor, as NumPy, zlib and system calls release the
interpreter's lock. Each thread keeps one small buffer, so that a tensor is never in
memory twice. Files are read, not mapped: a mapped file that gets shorter kills the
process (SIGBUS).
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from jlora.errors import CorruptError
from jlora.formats.model_files import reading
from jlora.formats.safetensors_file import Entry

BLOCK_BYTES = 8 << 20
# Rows of a block that is transposed. One cache line of each row, 40 KiB together, stays in
# the processor's cache while columns are gathered.
BLOCK_ROWS = 640
MAX_BUFFER_BYTES = 16 << 20  # a block of a converted base
THREADS = min(8, os.cpu_count() or 1)
Index = tuple[slice, ...]
"""A box of an array: one slice with start and stop, and no step, per axis."""
# Rows that start a power of two apart would compete for a few lines of the cache.
_PADDING = 64
_PAGE_BYTES = 4096  # at least one byte of each is written, where pages are larger too
_HUGE_PAGE_BYTES = 2 << 20
_TOUCHED_BYTES = 32 << 20  # at a time, at most; some huge pages
_buffers = threading.local()


def whole(shape: tuple[int, ...]) -> Index:
    """Returns the box that covers an array of this shape."""
    return tuple(slice(0, size) for size in shape)


def as_box(index: tuple[Any, ...] | None, shape: tuple[int, ...]) -> Index:
    """Returns the index of a device's shard as a box; None is the whole array."""
    if index is None:
        return whole(shape)
    return tuple(
        slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)
    )


def box_shape(box: Index) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(part.stop - part.start for part in box)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns a new array that JAX on a CPU uses without a copy: aligned to 64 bytes."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def touch(array: np.ndarray) -> None:
    """Makes the system allocate the pages of a new contiguous array, from a few threads.

    Otherwise threads that write the columns of an array reach the same huge page at
    once. Each would clear one, and all but one of those would be thrown away.
    """
    memory = array.reshape(-1).view(np.uint8)
    before = memory.ctypes.data % _HUGE_PAGE_BYTES
    pages = math.ceil((before + memory.size) / THREADS / _HUGE_PAGE_BYTES)
    step = min(_TOUCHED_BYTES, max(1, pages) * _HUGE_PAGE_BYTES)

    def write(first: int) -> None:
        memory[max(0, first) : max(0, first + step) : _PAGE_BYTES] = 0

    for_each(write, range(-before, memory.size, step))


def for_each(function: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Calls the function with each item, from a few threads.

    If some calls fail, the error of the earliest item is raised when all have ended.
    """
    futures = [_pool().submit(function, item) for item in items]
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        future.cancel()
    wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # One pool for all tensors: the buffers of new threads for each would fragment the
    # heap, by the size of a layer (measured).
    return ThreadPoolExecutor(THREADS)


def buffer(size: int) -> np.ndarray:
    """Returns `size` bytes, from a buffer that this thread reuses unless it is too large."""
    if size > MAX_BUFFER_BYTES:
        return np.empty(size, np.uint8)
    memory = getattr(_buffers, "memory", None)
    if memory is None or memory.size < size:
        memory = _buffers.memory = np.empty(size, np.uint8)
    return memory[:size]


def read_into(memory: np.ndarray, descriptor: int, offset: int) -> bool:
    """Fills contiguous memory from a file; returns False if the file is too short."""
    view = memory.reshape(-1).view(np.uint8).data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def read_rows(rows: np.ndarray, descriptor: int, offset: int) -> bool:
    """Fills the rows of a matrix, which may have gaps between; False if the file is short."""
    items = rows.view(np.uint8)
    count = os.preadv(descriptor, _views(items), offset)
    row_bytes = items.shape[1]
    # A read may end early, for example at a signal; the rest is read row by row.
    return all(
        read_into(items[i], descriptor, offset + i * row_bytes)
        for i in range(count // row_bytes, len(items))
    )


def _views(rows: np.ndarray) -> list[memoryview]:
    """Returns the memory of every row, cached for the buffer that a thread reuses."""
    place = (rows.ctypes.data, rows.shape[1:], rows.strides)
    if getattr(_buffers, "place", None) != place or len(_buffers.views) < len(rows):
        _buffers.place, _buffers.views = place, [row.data for row in rows]
    return _buffers.views[: len(rows)]


def row_blocks(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of the rows of each block, a multiple of 64 rows."""
    rows = max(1, BLOCK_BYTES // max(1, row_bytes) // 64) * 64
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)


def transposed_blocks(
    start: int, stop: int, row_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of the rows of each block to transpose, as many for each thread.

    A multiple of 32 rows: 32 items of two bytes fill a cache line of the result.
    """
    most = min(BLOCK_ROWS, MAX_BUFFER_BYTES // (row_bytes + _PADDING))
    lines = math.ceil((stop - start) / 32)
    blocks = math.ceil(lines / max(1, most // 32))
    blocks = max(1, math.ceil(blocks / THREADS)) * THREADS
    for i in range(blocks):
        first, end = (start + lines * k // blocks * 32 for k in (i, i + 1))
        if first < end:
            yield first, min(end, stop)


def _row_buffer(rows: int, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns a matrix in this thread's buffer, with padding between its rows."""
    stride = columns * dtype.itemsize + _PADDING
    memory = buffer(rows * stride).reshape(rows, stride)
    return memory[:, :-_PADDING].view(dtype)


def copy_transposed(target: np.ndarray, block: np.ndarray) -> None:
    """Sets target [C, R] to the transpose of block [R, C], row by row of the target.

    The cache lines that one column of `block` needs also hold the next few columns. They
    stay cached because of the padding between the rows.
    """
    bits = np.dtype(f"u{block.itemsize}")  # NumPy copies other libraries' items slowly
    target.view(bits)[...] = block.view(bits).T


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """Returns a row-major copy of an array, also of a transposed view, made by `empty`."""
    result = empty(array.shape, array.dtype)
    if array.ndim == 2 and array.flags.f_contiguous:
        transpose_into(result, array.T)
    else:
        result[...] = array
    return result


def transpose_into(target: np.ndarray, array: np.ndarray) -> None:
    """Sets target [C, R] to the transpose of array [R, C]."""

    def copy(rows: tuple[int, int]) -> None:
        part = array[slice(*rows)]
        block = _row_buffer(part.shape[0], part.shape[1], part.dtype)
        block[...] = part
        copy_transposed(target[:, slice(*rows)], block)

    touch(target)
    row_bytes = array.shape[1] * array.itemsize
    for_each(copy, transposed_blocks(0, array.shape[0], row_bytes))


def read_box(
    entry: Entry,
    box: Index,
    *,
    transposed: bool = False,
    check: Callable[[np.ndarray, int], None],
    block_rows: int = 0,
) -> np.ndarray:
    """Returns a box of a tensor in a file, or its transpose; reads its rows once.

    Args:
        entry: the tensor.
        box: what to return, in the file's layout.
        transposed: whether to return the transpose, of two axes.
        check: called with a block of whole rows and the number of its first row.
        block_rows: read whole blocks of so many rows of the tensor, not only the rows of
            the box; 0: blocks of any size.

    Raises:
        CorruptError: the file got shorter since its header was read.
    """
    dtype, (height, *row) = entry.dtype, entry.shape
    row_bytes = int(np.prod(row, dtype=np.int64)) * dtype.itemsize
    result = empty(box_shape(box)[:: -1 if transposed else 1], dtype)
    full_rows = box[1:] == whole(entry.shape)[1:]
    rows_of_box = box[0].start, box[0].stop
    if block_rows:
        aligned = range(
            box[0].start // block_rows * block_rows, box[0].stop, block_rows
        )
        blocks = ((first, min(first + block_rows, height)) for first in aligned)
    elif transposed:
        blocks = transposed_blocks(*rows_of_box, row_bytes)
    else:
        blocks = row_blocks(*rows_of_box, row_bytes)

    def copy(rows: tuple[int, int]) -> None:
        first, end = rows
        begin, stop = max(first, box[0].start), min(end, box[0].stop)
        columns = slice(begin - box[0].start, stop - box[0].start)
        direct = full_rows and (begin, stop) == rows
        start = entry.offset + first * row_bytes
        if transposed:
            block = _row_buffer(end - first, row[0], dtype)
            is_whole = read_rows(block, file.fileno(), start)
        else:
            memory = buffer(0 if direct else (end - first) * row_bytes)
            block = (
                result[columns]
                if direct
                else memory.view(dtype).reshape(end - first, *row)
            )
            is_whole = read_into(block, file.fileno(), start)
        if not is_whole:
            raise CorruptError(f"{entry.file}: cut while it was read; use another copy")
        check(block, first)
        if transposed:
            copy_transposed(result[:, columns], block[:, box[1]])
        elif not direct:
            result[columns] = block[begin - first : stop - first, *box[1:]]

    with reading(entry.file), entry.file.open("rb", buffering=0) as file:
        if transposed:
            touch(result)
        for_each(copy, blocks)
    return result
