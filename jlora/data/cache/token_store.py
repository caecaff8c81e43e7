"""Token ids on disk: written once, read at random through memory maps, checked by digests.

A store is a folder of three arrays and a note. It appears whole or not at all, one process
builds it while others wait, and one that is damaged (a power cut before the disk had it
all, say) is built again. A cache of them takes a tenth of its disk, or what is in use.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jlora.errors import ResourceError, UsageError, warn

SCHEMA = 1
SHARE = 0.1
"""Of the disk: what all stores of a cache may take, whenever one is built."""
RECORD = np.dtype(
    [
        ("start", "<i8"),  # of its tokens
        ("number", "<i8"),  # line or row of the file, from 1
        ("length", "<i4"),
        ("learnt", "<i4"),  # tokens to learn
        ("first_learnt", "<i4"),  # index of the first one; length if there is none
        ("file", "<i4"),  # index among all files of the data set
    ]
)
_DTYPES = {"tokens": np.dtype("<i4"), "loss_mask": np.dtype("u1"), "records": RECORD}


@dataclass(frozen=True, eq=False)
class Block:
    """Some records: tokens int32 [n], loss_mask uint8 [n], records RECORD [m]."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    records: np.ndarray


@dataclass(frozen=True, eq=False)
class Store:
    """The arrays of a `Block`, mapped from disk, and what was noted beside them."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    records: np.ndarray
    note: dict[str, Any]
    digest: str
    """A sha256 over tokens, masks and borders."""

    @property
    def num_bytes(self) -> int:
        """What it takes on disk, but for its note."""
        return sum(x.nbytes for x in (self.tokens, self.loss_mask, self.records))


class StoreWriter:
    """Appends blocks to the files of a new store."""

    def __init__(self, folder: Path) -> None:
        """Creates the files; the folder must exist."""
        self.num_tokens = 0
        self.num_records = 0
        self._files: dict[str, IO[bytes]] = {
            name: (folder / f"{name}.bin").open("wb") for name in _DTYPES
        }
        self._hashes = {name: hashlib.sha256() for name in [*_DTYPES, "lengths"]}

    def append(self, block: Block) -> None:
        """Writes a block, whose records count their starts from its own beginning."""
        records = block.records.copy()
        records["start"] += self.num_tokens
        arrays = {
            "tokens": block.tokens,
            "loss_mask": block.loss_mask,
            "records": records,
        }
        for name, array in arrays.items():
            data = np.ascontiguousarray(array, _DTYPES[name]).tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)
        self._hashes["lengths"].update(records["length"].tobytes())
        self.num_tokens += len(block.tokens)
        self.num_records += len(records)

    def __enter__(self) -> "StoreWriter":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files, whatever state they are in."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def finish(self) -> dict[str, str]:
        """Writes everything out and returns the sha256 of each part."""
        for file in self._files.values():
            file.flush()
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def cached_store(
    cache: Path, key: str, build: Callable[[StoreWriter], dict[str, Any]]
) -> Store:
    """Returns the store `key` of a cache folder, building it if need be.

    Args:
        cache: created if it is not there.
        key: a digest of all that the content follows from.
        build: appends everything and returns the note (JSON).

    Raises:
        UsageError: the folder cannot be written.
        ResourceError: the disk is full.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock", wait=True):
            _clear_stale(cache, but=key)
            store = _open(cache / key)
            if store is None:
                store = _build(cache, key, build)
                _prune(cache, but=key)
            _keep_while_used(store, cache / key)
            return store
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(cache).free
            raise ResourceError(
                f"{cache}: the disk is full ({free:,} bytes free), and the token cache "
                "takes 5 bytes per token; make room or give another data.cache_dir"
            ) from error
        if error.filename is None or not str(error.filename).startswith(str(cache)):
            raise  # not of the cache: a file of the data
        raise UsageError(
            f"{cache}: the token cache cannot be written ({error.strerror}); "
            "give another folder with data.cache_dir"
        ) from error


def _build(
    cache: Path, key: str, build: Callable[[StoreWriter], dict[str, Any]]
) -> Store:
    temporary = cache / f"{key}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed
    temporary.mkdir()
    try:
        with StoreWriter(temporary) as writer:
            note = build(writer)
            digests = writer.finish()
        about = {"schema": SCHEMA, "key": key, "sha256": digests, "note": note}
        with (temporary / "note.json").open("w", encoding="utf-8") as file:
            json.dump(about, file)
        shutil.rmtree(cache / key, ignore_errors=True)  # damaged, or it would be used
        temporary.rename(cache / key)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    store = _open(cache / key, verify=False)
    assert store is not None
    return store


def _open(folder: Path, *, verify: bool = True) -> Store | None:
    """Returns the store in a folder, None if there is none or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / "note.json").read_text("utf-8"))
        digests = about["sha256"]
        if about["schema"] != SCHEMA or about["key"] != folder.name:
            raise ValueError("the note belongs to another store")
        arrays = {}
        for name, dtype in _DTYPES.items():
            path = folder / f"{name}.bin"
            if verify and _file_digest(path) != digests[name]:
                raise ValueError(f"{path.name} is damaged")
            arrays[name] = _map(path, dtype)
        parts = [digests[name] for name in ("tokens", "loss_mask", "lengths")]
        digest = hashlib.sha256("".join(parts).encode()).hexdigest()
        return Store(**arrays, note=about["note"], digest=digest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"token cache {folder}: {error}; building it again")
        return None


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock file; yields whether it could be had, which `wait` makes sure."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            print(f"waiting for another process that holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def _clear_stale(cache: Path, but: str) -> None:
    """Removes what killed builds of other keys left behind."""
    for temporary in cache.glob("*.tmp"):
        # Without a lock file it is not a build's.
        if temporary.stem != but and temporary.with_suffix(".lock").exists():
            with _locked(cache / f"{temporary.stem}.lock", wait=False) as held:
                if held:
                    shutil.rmtree(temporary, ignore_errors=True)


def _keep_while_used(store: Store, folder: Path) -> None:
    """Notes that a store is used now, and by whom it must not be taken away."""
    os.utime(folder)
    use = os.open(folder.with_suffix(".use"), os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(use, fcntl.LOCK_SH)  # nobody holds it long: see `_prune`
    weakref.finalize(store, os.close, use)


def _prune(cache: Path, but: str) -> None:
    """Removes stores that nobody uses, the longest unused first, down to SHARE."""
    found = []  # (last use, size, folder)
    for folder in cache.iterdir():
        with suppress(FileNotFoundError):  # another process prunes, too
            if _is_store(folder):
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    excess = total - SHARE * shutil.disk_usage(cache).total
    for _, size, store in sorted(found):
        if excess <= 0:
            return
        if store.name == but:
            continue
        with (
            # Not while another process opens it, nor while one has it open.
            _locked(store.with_suffix(".lock"), wait=False) as is_closed,
            _locked(store.with_suffix(".use"), wait=False) as is_unused,
        ):
            if is_closed and is_unused:
                shutil.rmtree(store, ignore_errors=True)
                if not store.exists():
                    excess -= size
                    print(f"token cache: {store} was removed to make room", flush=True)


def _is_store(folder: Path) -> bool:
    """Returns whether a folder is named by the note in it: others are left alone."""
    try:
        about = json.loads((folder / "note.json").read_text("utf-8"))
        return about["key"] == folder.name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def default_cache() -> Path:
    """Returns $JLORA_CACHE, or else ~/.cache/jlora."""
    return Path(os.environ.get("JLORA_CACHE") or Path.home() / ".cache" / "jlora")
