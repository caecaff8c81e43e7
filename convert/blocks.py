"""Arrays from files, block by block: read, checked and laid out while in the cache.

A tensor is never held twice: a block is read into a small buffer that each thread keeps,
checked there, and copied to where it stays. Blocks are shared among a few threads, as
NumPy, zlib and the system let go of the interpreter meanwhile. Files are read, not
mapped: a mapped file that becomes shorter kills the process (SIGBUS).
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

BLOCK_BYTES = 8 << 20
BLOCK_ROWS = 512  # of a matrix that is transposed: 1024 bytes of a row of the result
MAX_BUFFER_BYTES = 16 << 20  # a chunk of a converted base
THREADS = min(4, os.cpu_count() or 1)
Index = tuple[slice, ...]
"""A box of an array: one slice with start and stop, and no step, per axis."""
_TILE_BYTES = 2 << 20  # what is transposed at a time, and held once more
# Rows that are a power of two apart would share a few places of the processor's cache.
_PADDING = 64
_PAGE_BYTES = 4096  # at least one byte of each is written, where pages are larger too
_TOUCHED_BYTES = 32 << 20  # a multiple of huge pages, at a multiple of it
_AHEAD_BYTES = 64 << 20  # of a file, which the system reads while blocks are turned
_ASKED_BYTES = 1 << 20  # Linux cuts requests that are much longer short
_buffers = threading.local()


def whole(shape: tuple[int, ...]) -> Index:
    """Returns the box that is all of an array."""
    return tuple(slice(0, size) for size in shape)


def as_box(index: tuple[Any, ...] | None, shape: tuple[int, ...]) -> Index:
    """Returns a device's index with every start and stop written out; None is all."""
    if index is None:
        return whole(shape)
    return tuple(
        slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)
    )


def box_shape(box: Index) -> tuple[int, ...]:
    """Returns the shape of what a box holds."""
    return tuple(part.stop - part.start for part in box)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array whose memory JAX on a CPU takes over without a copy.

    That needs an address that is a multiple of 64.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def touch(array: np.ndarray) -> None:
    """Has the system provide the memory of a new contiguous array, from a few threads.

    Threads that write the columns of an array all come to the same huge page at once;
    each would clear one, and all but one would be thrown away.
    """
    memory = array.reshape(-1).view(np.uint8)
    start = -memory.ctypes.data % _TOUCHED_BYTES

    def write(first: int) -> None:
        memory[max(0, first) : max(0, first + _TOUCHED_BYTES) : _PAGE_BYTES] = 0

    for_each(write, range(start - _TOUCHED_BYTES, memory.size, _TOUCHED_BYTES))


def for_each(function: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Calls the function with each item, from a few threads.

    Of several errors, that of the earliest item is raised, once no thread works any more.
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
    # Kept, with the buffers of its threads: new ones for every tensor would leave holes
    # all over the allocator's memory, a layer's size of them (measured).
    return ThreadPoolExecutor(THREADS)


def buffer(size: int) -> np.ndarray:
    """Returns `size` bytes that this thread keeps, unless they are many, and reuses."""
    if size > MAX_BUFFER_BYTES:
        return np.empty(size, np.uint8)
    memory = getattr(_buffers, "memory", None)
    if memory is None or memory.size < size:
        memory = _buffers.memory = np.empty(size, np.uint8)
    return memory[:size]


def read_into(memory: np.ndarray, descriptor: int, offset: int) -> bool:
    """Fills contiguous memory from a file; False if the file ends before."""
    view = memory.reshape(-1).view(np.uint8).data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def read_rows(rows: np.ndarray, descriptor: int, offset: int) -> bool:
    """Fills the rows of a matrix, which may lie apart; False if the file ends before."""
    items = rows.view(np.uint8)
    count = os.preadv(descriptor, _views(items), offset)
    row_bytes = items.shape[1]
    # A read may end early, as at a signal; what is left is read row by row.
    return all(
        read_into(items[i], descriptor, offset + i * row_bytes)
        for i in range(count // row_bytes, len(items))
    )


def _views(rows: np.ndarray) -> list[memoryview]:
    """Returns the memory of every row; made once for the blocks that a thread reuses."""
    place = (rows.ctypes.data, rows.shape, rows.strides)
    if getattr(_buffers, "place", None) != place:
        _buffers.place, _buffers.views = place, [row.data for row in rows]
    return _buffers.views


def row_blocks(
    start: int, stop: int, row_bytes: int, most: int = sys.maxsize
) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of rows that make a block together, by 64."""
    rows = min(max(1, BLOCK_BYTES // max(1, row_bytes) // 64) * 64, most)
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)


def _row_buffer(rows: int, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns a matrix in this thread's buffer, with some bytes between its rows."""
    stride = columns * dtype.itemsize + _PADDING
    memory = buffer(rows * stride).reshape(rows, stride)
    return memory[:, :-_PADDING].view(dtype)


def copy_transposed(target: np.ndarray, block: np.ndarray) -> None:
    """Sets target [C, R] to the transpose of block [R, C].

    JAX's CPU device does it, in vector registers: three times as fast as the best that
    NumPy, which moves one item at a time, was brought to. NumPy does it where that device
    is not there (JAX_PLATFORMS=cuda), and for 64-bit items, which JAX would narrow.
    """
    bits = np.dtype(f"u{block.itemsize}")
    target, block = target.view(bits), block.view(bits)
    host = None if block.itemsize > 4 else _host()
    columns = max(1, _TILE_BYTES // max(1, block.shape[0] * block.itemsize))
    for left in range(0, block.shape[1], columns):
        tile = block[:, left : left + columns].T
        target[left : left + columns] = tile if host is None else _turned(tile, host)


def _turned(tile: np.ndarray, host: jax.sharding.Sharding) -> np.ndarray:
    # device_put does the same with four times as much Python, which two threads share.
    return np.asarray(jax.make_array_from_callback(tile.shape, host, lambda _: tile))


@functools.cache
def _host() -> jax.sharding.Sharding | None:
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the user chose other platforms only
        return None
    return jax.sharding.SingleDeviceSharding(device)


def transpose_into(target: np.ndarray, array: np.ndarray) -> None:
    """Sets target [C, R] to the transpose of array [R, C]."""

    def copy(rows: tuple[int, int]) -> None:
        part = array[slice(*rows)]
        block = _row_buffer(part.shape[0], part.shape[1], part.dtype)
        block[...] = part
        copy_transposed(target[:, slice(*rows)], block)

    touch(target)
    row_bytes = array.shape[1] * array.itemsize
    for_each(copy, row_blocks(0, array.shape[0], row_bytes, BLOCK_ROWS))


def open_file(path: Path) -> int:
    """Returns a descriptor of a file that is read from start to end."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def _ask_for(descriptor: int, start: int, stop: int) -> None:
    """Asks the system to read this part of a file meanwhile; it may do so or not."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for first in range(start, stop, _ASKED_BYTES):
        size = min(_ASKED_BYTES, stop - first)
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)


def read_box(
    file: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    box: Index,
    *,
    transposed: bool,
    check: Callable[[np.ndarray, int], None],
) -> np.ndarray | None:
    """Returns a box of a row-major array in a file, or its transpose.

    Only the rows of the box are read, each once.

    Args:
        file: the file.
        offset: where the array starts.
        shape: of the whole array.
        dtype: of its items.
        box: what to return, in the file's layout.
        transposed: whether to return the transpose, of two axes.
        check: called with a block of whole rows and the number of its first row.

    Returns:
        The array, or None if the file is shorter.
    """
    row = shape[1:]
    row_bytes = int(np.prod(row, dtype=np.int64)) * dtype.itemsize
    result = empty(box_shape(box)[:: -1 if transposed else 1], dtype)
    full_rows = box[1:] == whole(row)
    cut = []
    descriptor = open_file(file)
    stop = offset + box[0].stop * row_bytes

    def copy(rows: tuple[int, int]) -> None:
        first, end = rows
        columns = slice(first - box[0].start, end - box[0].start)
        start = offset + first * row_bytes
        ahead = start + _AHEAD_BYTES
        _ask_for(descriptor, ahead, min(ahead + (end - first) * row_bytes, stop))
        if transposed:
            block = _row_buffer(end - first, row[0], dtype)
            is_whole = read_rows(block, descriptor, start)
        else:
            memory = buffer(0 if full_rows else (end - first) * row_bytes)
            block = (
                result[columns]
                if full_rows
                else memory.view(dtype).reshape(end - first, *row)
            )
            is_whole = read_into(block, descriptor, start)
        if not is_whole:
            cut.append(first)
            return
        check(block, first)
        if transposed:
            copy_transposed(result[:, columns], block[:, box[1]])
        elif not full_rows:
            result[columns] = block[:, *box[1:]]

    most = BLOCK_ROWS if transposed else sys.maxsize
    try:
        start = offset + box[0].start * row_bytes
        _ask_for(descriptor, start, min(start + _AHEAD_BYTES, stop))
        if transposed:
            touch(result)
        for_each(copy, row_blocks(box[0].start, box[0].stop, row_bytes, most))
    finally:
        os.close(descriptor)
    return None if cut else result
