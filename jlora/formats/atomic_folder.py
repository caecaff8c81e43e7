"""Writes folders that appear whole or not at all, and replaces one only if asked to."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jlora.errors import JloraError, ResourceError, UsageError, lacking, listing

_MODEL_FILES = ("config.json", "adapter_config.json", "model.gguf")


@contextlib.contextmanager
def atomic_folder(
    out: Path,
    overwrite: bool,
    source: Path | None = None,
    marks: Sequence[str] = _MODEL_FILES,
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` when the body has succeeded.

    Args:
        out: the folder to make.
        overwrite: whether to replace `out` if it is a model or adapter folder.
        source: what the folder is made from, which must not be inside `out`.
        marks: files of which a folder that is replaced must have one.

    Raises:
        UsageError: `out` is not empty, not a folder, the source, or not writable.
        ResourceError: the disk is full; nothing is left behind.
    """
    target = out.resolve()
    check_target(out, overwrite, source, marks)
    old = target.with_name(f".{target.name}.old")
    temporary = target.with_name(f".{target.name}.partial")
    with _disk_errors(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not target.exists():  # killed between two renames
            old.rename(target)
            check_target(out, overwrite, source, marks)
        temporary.mkdir(exist_ok=True)
    with _naming(temporary, out), _locked(temporary, out), _disk_errors(out):
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
    """Exchanges two folders in one step if the system can; returns whether it did.

    A process that is killed between two renames would leave neither folder in place.
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


def check_target(
    out: Path,
    overwrite: bool,
    source: Path | None = None,
    marks: Sequence[str] = _MODEL_FILES,
) -> None:
    """Raises UsageError if `out` must not be written; arguments as of `atomic_folder`."""
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
    if not any((target / name).is_file() for name in marks):
        raise UsageError(
            f"{target}: holds none of {listing(marks)}, so it is no model "
            "folder and --overwrite does not replace it; choose another OUT"
        )


@contextlib.contextmanager
def _naming(temporary: Path, out: Path) -> Iterator[None]:
    """Has errors of the body name the folder that the user gave."""
    try:
        yield
    except JloraError as error:
        message = str(error)
        for path in (temporary, temporary.resolve()):
            message = message.replace(str(path), str(out))
        raise type(error)(message) from error


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Locks the folder against other processes; the lock of a killed process is void."""
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
        if isinstance(error, JloraError):
            raise
        if problem := lacking(error):
            raise ResourceError(f"{out}: {problem}; nothing was written") from error
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
