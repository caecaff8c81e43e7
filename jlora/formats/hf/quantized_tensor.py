"""A quantised weight of a Hugging Face folder, made of several tensors of its files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jlora.errors import CorruptError
from jlora.formats.array_blocks import Index, read_box
from jlora.formats.safetensors_file import DTYPES, Entry, Spec, read_tensor
from jlora.formats.tensor_checks import first_non_finite
from jlora.ops.quantize import Format


@dataclass(frozen=True)
class QuantizedTensor(Spec, ABC):
    """A weight [out, in], and the dtype that it stands for."""

    key: str
    """Its name in the files."""

    @property
    @abstractmethod
    def form(self) -> Format:
        """Jlora's format with the same codes and scales; "none" if there is none."""

    @abstractmethod
    def read_leaf(self, leaf: str, box: Index | None) -> np.ndarray:
        """Returns a leaf of `form`, or a box of it, in jlora's layout.

        Raises:
            CorruptError: a value that is not a number, or a file that got shorter.
        """

    @abstractmethod
    def read(self) -> np.ndarray:
        """Returns the weight in float32 and in jlora's layout [in, out]; raises as above."""


def read_transposed(
    entry: Entry, box: Index, check: Callable[[np.ndarray, int], None] | None = None
) -> np.ndarray:
    """Returns a box of the transpose of a matrix in a file."""

    def unchecked(block: np.ndarray, first: int) -> None: ...

    return read_box(entry, box[::-1], transposed=True, check=check or unchecked)


def read_scales(entry: Entry, name: str) -> np.ndarray:
    """Returns a tensor of scales in float32.

    Raises:
        CorruptError: a NaN, an infinity or a negative number.
    """
    scales = read_tensor(entry).astype(np.float32)
    bad = first_non_finite(scales)
    if bad is None and (scales < 0).any():
        bad = tuple(int(i) for i in np.argwhere(scales < 0)[0])
    if bad is not None:
        raise damaged(entry, name, f"{scales[bad]} at {list(bad)} is no scale")
    return scales


def part_of(
    parts: Mapping[str, Entry],
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: Any = None,
) -> Entry:
    """Returns one of a weight's tensors, as an array of this shape and dtype if given.

    Raises:
        CorruptError: it is missing, or has another size or dtype.
    """
    entry = parts.get(name)
    if entry is None:
        raise CorruptError(
            f"{next(iter(parts.values())).file}: tensor {name!r}, a part of a quantised "
            "weight, is missing; download the model again"
        )
    if shape is None:
        return entry
    wanted = Entry(shape, np.dtype(dtype), entry.file, entry.offset)
    if entry.nbytes != wanted.nbytes or entry.dtype != wanted.dtype:
        raise damaged(
            entry,
            name,
            f"{entry.dtype} {list(entry.shape)} instead of {wanted.dtype} {list(shape)}",
        )
    return wanted


def damaged(entry: Entry, name: str, what: str) -> CorruptError:
    """Returns the error for a tensor that cannot be what its weight needs."""
    return CorruptError(
        f"{entry.file}: tensor {name!r}: {what}; the file is damaged, use another copy"
    )


def is_plain(entry: Entry) -> bool:
    """Returns whether a tensor has one of the dtypes of weights that are not quantised."""
    return entry.dtype in DTYPES.values()
