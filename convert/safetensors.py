"""Safetensors files and output folders: nothing is believed before it is checked.

Tensors are read with plain file reads, one at a time: mapped pages would count as our
memory. Folders appear whole or not at all.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.errors import (
    CorruptError,
    ResourceError,
    UnsupportedError,
    UsageError,
    listing,
)
from jlora.strict_json import parse_json_object

# A Llama of a thousand layers takes 1.5 MB; parsing takes fifteen times the memory.
MAX_HEADER_BYTES = 16 << 20
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OTHER_DTYPE = re.compile(r"BOOL|[IU](8|16|32|64)|F[468](_E\dM\d\w*)?|C64")
_MODEL_FILES = ("config.json", "adapter_config.json")
_DISK_FULL = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that is not in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry(Spec):
    """A tensor of a file: its spec and where its bytes start."""

    file: Path
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name, without reading their data.

    Raises:
        CorruptError: the file is cut, longer than declared or contradicts itself.
        UnsupportedError: another format under this name, or integer and fp8 tensors.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(64)
        length = int.from_bytes(first[:8], "little")
        if first[8:9] != b"{":
            refuse_other_format(path, first, "safetensors")
        if size < 8 or length > size - 8:
            raise CorruptError(
                f"{path}: cut or damaged: the file has {size:,} bytes and its header "
                f"declares {length + 8:,}; copy or download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CorruptError(
                f"{path}: a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} "
                "are read"
            )
        file.seek(8)
        header = file.read(length)
    document = parse_json_object(header, f"{path}: header", MAX_HEADER_BYTES)
    document.pop("__metadata__", None)
    unsupported = [
        f"{name} ({fields['dtype']})"
        for name, fields in document.items()
        if isinstance(fields, dict)
        and isinstance(fields.get("dtype"), str)
        and _OTHER_DTYPE.fullmatch(fields["dtype"])
    ]
    if unsupported:
        raise UnsupportedError(
            f"{path}: integer, fp8 or quantised tensors: {listing(sorted(unsupported))}; "
            "use the original bfloat16, float16 or float32 model"
        )
    problems = {name: _problem(fields) for name, fields in document.items()}
    wrong = [f"tensor {name!r:.200}: {what}" for name, what in problems.items() if what]
    if wrong:
        raise CorruptError(f"{path}: {listing(wrong)}; copy or download it again")
    entries = {
        name: _entry(path, fields, 8 + length) for name, fields in document.items()
    }
    _check_layout(path, entries, 8 + length, size)
    return entries


def _problem(fields: Any) -> str | None:
    """Returns what is wrong with one tensor's line of the header."""
    if not isinstance(fields, dict) or set(fields) != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        return "expected dtype, shape and data_offsets"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype {dtype!r:.40}"
    if not are_sizes(shape) or len(shape) > 8:
        return f"shape {shape!r:.80} is not a list of sizes"
    if not are_sizes(offsets) or len(offsets) != 2:
        return f"data_offsets {offsets!r:.80} are not two offsets"
    expected = DTYPES[dtype].itemsize
    for size in shape:  # Python integers: a product that overflows 64 bits is seen
        expected *= size
    if offsets[1] - offsets[0] != expected:
        return (
            f"{dtype} of shape {shape} takes {expected:,} bytes, but "
            f"data_offsets={offsets} hold {offsets[1] - offsets[0]:,}"
        )
    return None


def _entry(path: Path, fields: dict[str, Any], start: int) -> Entry:
    """Returns a checked line of the header."""
    begin = fields["data_offsets"][0]
    return Entry(tuple(fields["shape"]), DTYPES[fields["dtype"]], path, start + begin)


def are_sizes(values: Any) -> bool:
    """Whether a value of a JSON document is a list of integers from 0."""
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _check_layout(path: Path, entries: dict[str, Entry], start: int, end: int) -> None:
    position = start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)
    ):
        if entry.offset != position:
            kind = "a hole" if entry.offset > position else "an overlap"
            raise CorruptError(
                f"{path}: {kind} before tensor {name!r} at byte {entry.offset:,}; "
                f"expected it at {position:,}"
            )
        position += entry.nbytes
    if position != end:
        problem = "cut" if position > end else "longer than declared"
        raise CorruptError(
            f"{path}: {problem}: the tensors end at byte {position:,}, the file at "
            f"{end:,}; copy or download it again"
        )


def read_tensor(entry: Entry) -> np.ndarray:
    """Returns one tensor as stored, read from its bytes alone.

    Raises:
        CorruptError: the file became shorter since its header was read.
    """
    return (
        read_bytes(entry.file, entry.offset, entry.nbytes)
        .view(entry.dtype)
        .reshape(entry.shape)
    )


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """Returns `count` bytes from `offset` as uint8.

    Raises:
        CorruptError: the file is shorter.
    """
    with reading(path):
        data = np.fromfile(path, np.uint8, count, offset=offset)
    if data.size != count:
        raise CorruptError(f"{path}: cut while it was read")
    return data


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns failures to open or read `path` into one message.

    Raises:
        CorruptError: the file does not exist, or the device failed.
        UsageError: no permission, or a folder.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: no such file") from error
    except (PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror})") from error


def refuse_other_format(path: Path, first: bytes, wanted: str) -> None:
    """Names what the first bytes are, if they belong to another known format.

    Raises:
        CorruptError: not the file itself.
        UnsupportedError: another format of weights under this name.
    """
    start = first.lstrip().lower()
    if first.startswith(b"version https://git-lfs"):
        raise CorruptError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`"
        )
    if start.startswith((b"<!doc", b"<html", b"<?xml")):
        raise CorruptError(
            f"{path}: a saved web page, not the file itself; download it again"
        )
    if first.startswith(b"GGUF") and wanted != "GGUF":
        raise UnsupportedError(
            f"{path}: a GGUF file under another name; rename it to end in .gguf and "
            "give the path of the file itself"
        )
    if first.startswith(b"PK\x03\x04") or (
        first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        raise UnsupportedError(
            f"{path}: a pickled PyTorch file (or another zip) under another name; it is "
            "never opened, as it may run code; save the model as safetensors "
            "(save_pretrained of transformers does)"
        )
    length = int.from_bytes(first[:8], "little")
    if wanted == "GGUF" and first[8:9] == b"{" and length < 1 << 40:
        raise UnsupportedError(
            f"{path}: a safetensors file under another name; give the folder that holds "
            "it and its config.json"
        )


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray]
) -> None:
    """Writes one file, asking `read` for one tensor at a time.

    The bytes depend on names and values only. Larger items come first, as in the
    safetensors library, so that every tensor is aligned to its item size.
    """
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.asarray(read(name), order="C")
            if (array.shape, array.dtype) != (specs[name].shape, specs[name].dtype):
                raise ValueError(
                    f"{name}: promised {specs[name]}, got {array.dtype}{array.shape}"
                )
            array.reshape(-1).view(np.uint8).tofile(file)


@contextlib.contextmanager
def atomic_folder(
    out: Path, overwrite: bool, source: Path | None = None
) -> Iterator[Path]:
    """Yields a temporary folder beside `out` that becomes `out` if the body succeeds.

    Args:
        out: the folder to make.
        overwrite: replace `out` if it is a model or adapter folder.
        source: what the folder is made from; must not lie inside `out`.

    Raises:
        UsageError: `out` is not empty, not a folder, the source, or not writable.
        ResourceError: the disk is full; nothing is left behind.
    """
    target = out.resolve()
    check_target(out, overwrite, source)
    old = target.with_name(f".{target.name}.old")
    temporary = target.with_name(f".{target.name}.partial")
    with _disk_errors(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not target.exists():  # killed between two renames
            old.rename(target)
            check_target(out, overwrite, source)
        temporary.mkdir(exist_ok=True)
    with _locked(temporary, out), _disk_errors(out):
        try:
            _clear(temporary)
            yield temporary
            _sync(temporary)
            if not (target.exists() and _exchange(temporary, target)):
                if target.exists() and any(target.iterdir()):
                    shutil.rmtree(old, ignore_errors=True)
                    target.rename(old)
                temporary.rename(target)
            _sync_one(target.parent)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for replaced in (old, temporary):
            shutil.rmtree(replaced, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step if the system can; returns whether it did.

    Two renames would leave an instant, and a killed process, without any folder.
    """
    current_folder, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = [os.fsencode(path) for path in (a, b)]
    return rename(current_folder, names[0], current_folder, names[1], swap) == 0


def check_space(out: Path, needed: int) -> None:
    """Raises ResourceError if the disk of `out` has fewer free bytes than `needed`."""
    free = shutil.disk_usage(_existing(out)).free
    if needed > free:
        raise ResourceError(
            f"{out}: the disk is full: {needed:,} bytes are needed, {free:,} are free; "
            "nothing was written; free some space or choose another OUT"
        )


def check_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raises UsageError if `out` must not be written; arguments as `atomic_folder`."""
    target = out.resolve()
    if not target.name:
        raise UsageError(f"{out}: not a folder that can be made; choose another OUT")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: exists and is not a folder; choose another OUT")
    if source is not None and source.resolve().is_relative_to(target):
        raise UsageError(f"{target}: is or holds the source; choose another OUT")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"{target}: exists and is not empty; choose another OUT or add --overwrite"
        )
    if not any((target / name).is_file() for name in _MODEL_FILES):
        raise UsageError(
            f"{target}: holds neither {' nor '.join(_MODEL_FILES)}, so it is no model "
            "folder and --overwrite does not replace it; choose another OUT"
        )


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Holds a lock on the folder, which a killed process leaves without effect."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{out}: another process is writing it") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Orbax reports a full disk as a ValueError that quotes the system's words.
        if any(words in str(error) for words in _DISK_FULL):
            free = shutil.disk_usage(_existing(out)).free
            raise ResourceError(
                f"{out}: the disk is full: {free:,} bytes free are not enough; nothing "
                "was written"
            ) from error
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.ENAMETOOLONG,
        ):
            raise UsageError(f"{out}: cannot be written ({error.strerror})") from error
        raise


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
