"""Leaves of a converted base, from the chunks they are stored in.

A chunk is a file of plain bytes: those that a process needs are read, and verified,
straight into their place.
"""

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jlora.errors import CorruptError
from jlora.formats.array_blocks import (
    Index,
    box_shape,
    buffer,
    empty,
    for_each,
    read_into,
)
from jlora.formats.model_files import reading
from jlora.formats.safetensors_file import Spec
from jlora.train.checkpoint import chunk_files


@dataclass(frozen=True)
class StoredLeaf(Spec):
    """A leaf on disk: its spec, digest, and the shape and checksums of its chunks."""

    sha256: str
    chunk: tuple[int, ...]
    crc32: list[int]


def read_chunks(folder: Path, path: str, leaf: StoredLeaf, box: Index) -> np.ndarray:
    """Returns a box of a leaf from the chunks that it touches, each read once.

    Raises:
        CorruptError: a chunk is missing, cut, or not what was written.
    """
    result = empty(box_shape(box), leaf.dtype)

    def copy(item: tuple[str, Index, int]) -> None:
        name, chunk, checksum = item
        parts = [
            (max(part.start, outer.start), min(part.stop, outer.stop))
            for part, outer in zip(chunk, box, strict=True)
        ]
        target = result[
            tuple(
                slice(start - outer.start, stop - outer.start)
                for (start, stop), outer in zip(parts, box, strict=True)
            )
        ]
        direct = target.shape == leaf.chunk and target.flags.c_contiguous
        memory = target if direct else _buffer_for(leaf)
        _read_chunk(folder / name, path, memory, checksum)
        if not direct:
            target[...] = memory[
                tuple(
                    slice(start - part.start, stop - part.start)
                    for (start, stop), part in zip(parts, chunk, strict=True)
                )
            ]

    for_each(copy, _touched(leaf, box))
    return result


def _buffer_for(leaf: StoredLeaf) -> np.ndarray:
    size = math.prod(leaf.chunk) * leaf.dtype.itemsize
    return buffer(size).view(leaf.dtype).reshape(leaf.chunk)


def _touched(leaf: StoredLeaf, box: Index) -> Iterator[tuple[str, Index, int]]:
    """Yields (file name, box, checksum) of the chunks that share something with `box`."""
    grid = chunk_files(leaf.shape, leaf.chunk)
    for (name, chunk), checksum in zip(grid.items(), leaf.crc32, strict=True):
        if all(
            part.start < outer.stop and outer.start < part.stop
            for part, outer in zip(chunk, box, strict=True)
        ):
            yield name, chunk, checksum


def _read_chunk(file: Path, path: str, memory: np.ndarray, checksum: int) -> None:
    problem = "is shorter than it was written"
    with reading(file):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if read_into(memory, descriptor, 0):
                found = zlib.crc32(memory.reshape(-1).view(np.uint8).data)
                problem = "" if found == checksum else "differs from what was written"
        finally:
            os.close(descriptor)
    if problem:
        raise CorruptError(
            f"{file}: {path} is damaged (this chunk {problem}); convert the model again"
        )
