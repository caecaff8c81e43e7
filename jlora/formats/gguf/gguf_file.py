"""Parses a GGUF file: its metadata, and where the bytes of each tensor are.

Every length is compared with the size of the file before it is used.

Source: ggml's docs/gguf.md, versions 2 and 3.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jlora.errors import CorruptError, UnsupportedError
from jlora.formats.model_files import reading
from jlora.formats.refusals import refuse_other_format

PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Tensor types that are not quantised -> NumPy's dtype."""
# Numbers of the value types: struct codes of the scalars; string and array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
# Llama 3's header takes 8 MB, its longest array has 280,000 items. Comparing with the
# size of the file is not enough, as a file may be sparse.
MAX_HEADER_BYTES = 100 << 20
MAX_ITEMS = 1_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor: its row-major shape, the number of its ggml type, its first byte."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> GGUFFile:
    """Returns the header of a GGUF file; tensors are not read.

    Raises:
        CorruptError: not a GGUF file, cut, or it contradicts itself.
        UnsupportedError: a version or byte order that jlora does not read.
    """
    with reading(path), path.open("rb") as file:
        return _Reader(path, file).read()


class _Reader:
    """Reads values one after the other, never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left = self._size = os.fstat(file.fileno()).st_size

    def read(self) -> GGUFFile:
        """Returns the whole header."""
        refuse_other_format(self._path, self._file.read(64), "GGUF")
        self._file.seek(0)
        if self._take(4) != b"GGUF":
            raise CorruptError(f"{self._path}: not a GGUF file (wrong first bytes)")
        version = self._number("I")
        if version not in (2, 3):
            order = " or of the other byte order" if version & 0xFFFF == 0 else ""
            raise UnsupportedError(
                f"{self._path}: GGUF version {version}{order}; versions 2 and 3 are read"
            )
        num_tensors, num_values = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._text()
            if key in metadata:
                raise CorruptError(f"{self._path}: metadata key {key!r} occurs twice")
            metadata[key] = self._value(self._number("I"))
        tensors: dict[str, Tensor] = {}
        for _ in range(num_tensors):
            name, tensor = self._tensor()
            if name in tensors:
                raise CorruptError(f"{self._path}: tensor {name!r} occurs twice")
            tensors[name] = tensor
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CorruptError(f"{self._path}: general.alignment={alignment!r}")
        start = -(-(self._size - self._left) // alignment) * alignment
        tensors = {
            name: Tensor(tensor.shape, tensor.type, start + tensor.offset)
            for name, tensor in tensors.items()
        }
        return GGUFFile(self._path, self._size, metadata, tensors)

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise CorruptError(
                f"{self._path}: cut or damaged: {count:,} bytes are declared at byte "
                f"{self._size - self._left:,}, {self._left:,} are left"
            )
        self._left -= count
        if self._size - self._left > MAX_HEADER_BYTES:
            raise CorruptError(
                f"{self._path}: its header declares more than {MAX_HEADER_BYTES:,} "
                "bytes; it is damaged, use another copy"
            )
        return self._file.read(count)

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _text(self) -> str:
        data = self._take(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptError(f"{self._path}: text that is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        if kind not in _SCALARS:
            raise CorruptError(f"{self._path}: unknown metadata type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if count > MAX_ITEMS:
            raise CorruptError(
                f"{self._path}: an array of {count:,} items; at most {MAX_ITEMS:,} are "
                "read"
            )
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            raise CorruptError(f"{self._path}: arrays of metadata type {kind}")
        code = _SCALARS[kind]
        data = self._take(count * struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", data))

    def _tensor(self) -> tuple[str, Tensor]:
        name, dimensions = self._text(), self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise CorruptError(f"{self._path}: tensor {name!r} has {dimensions} axes")
        # Stored fastest axis first.
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, Tensor(shape, self._number("I"), self._number("Q"))
