"""Token ids on disk: written once, read at random through memory maps, checked by digests.

A store is a folder of three arrays and a note. It appears whole or not at all. One process
builds it while others wait. A damaged store (after a power cut, say) is built again. All
stores of a cache folder take at most a tenth of the disk, apart from those in use.
"""

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

from jlora.errors import ResourceError, UsageError, lacking, warn

SHARE = 0.1
"""Share of the disk that all stores of a cache may take; checked after each build."""
RECORD = np.dtype(
    [
        ("start", "<i8"),  # index of its first token
        ("number", "<i8"),  # line or row of the file, from 1
        ("length", "<i4"),
        ("supervised", "<i4"),  # tokens that the loss counts
        ("first_supervised", "<i4"),  # index of the first one; length if there is none
        ("file", "<i4"),  # index among all files of the data set
    ]
)
_DTYPES = {"tokens": np.dtype("<i4"), "loss_mask": np.dtype("u1"), "records": RECORD}
# What reading a folder raises that is not a whole store.
_NO_STORE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Some records: tokens int32 [n], loss_mask uint8 [n], records RECORD [m]."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    records: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenStore(TokenBlock):
    """The records of a folder, mapped from disk, and the note beside them."""

    note: dict[str, Any]
    digest: str
    """A sha256 of tokens, masks and lengths."""

    @property
    def num_bytes(self) -> int:
        """The size of its arrays on disk."""
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

    def append(self, block: TokenBlock) -> None:
        """Writes a block, in which the first record starts at token 0."""
        records = block.records.copy()
        records["start"] += self.num_tokens
        arrays = (block.tokens, block.loss_mask, records)
        for (name, dtype), array in zip(_DTYPES.items(), arrays, strict=True):
            data = np.ascontiguousarray(array, dtype).tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)
        self._hashes["lengths"].update(records["length"].tobytes())
        self.num_tokens += len(block.tokens)
        self.num_records += len(records)

    def __enter__(self) -> "StoreWriter":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files, also after an error."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def finish(self) -> dict[str, str]:
        """Writes everything out and returns the sha256 of each part."""
        for file in self._files.values():
            file.flush()
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def open_or_build(
    cache: Path, key: str, build: Callable[[StoreWriter], dict[str, Any]]
) -> TokenStore:
    """Returns the store `key` of a cache folder; builds it if it is not there.

    `key` is a digest of everything that decides the content; `build` appends all records
    and returns the note (JSON).

    Raises:
        UsageError: the folder cannot be written.
        ResourceError: the disk is full.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock", wait=True):
            _remove_unfinished(cache, but=key)
            store = _open(cache / key)
            if store is None:
                store = _build(cache, key, build)
                _prune(cache, but=key)
            _hold_while_used(store, cache / key)
            return store
    except OSError as error:
        if problem := lacking(error):
            free = shutil.disk_usage(cache).free
            raise ResourceError(
                f"{cache}: {problem} ({free:,} bytes are free), and the token cache takes "
                "5 bytes per token; make room or give another data.cache_dir"
            ) from error
        if error.filename is None or not str(error.filename).startswith(str(cache)):
            raise  # about a data file, not about the cache
        raise UsageError(
            f"{cache}: the token cache cannot be written ({error.strerror}); "
            "give another folder with data.cache_dir"
        ) from error


def _build(
    cache: Path, key: str, build: Callable[[StoreWriter], dict[str, Any]]
) -> TokenStore:
    temporary = cache / f"{key}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed
    temporary.mkdir()
    try:
        with StoreWriter(temporary) as writer:
            note = build(writer)
            digests = writer.finish()
        with (temporary / "note.json").open("w", encoding="utf-8") as file:
            json.dump({"key": key, "sha256": digests, "note": note}, file)
        shutil.rmtree(cache / key, ignore_errors=True)  # damaged, or we would not build
        temporary.rename(cache / key)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    store = _open(cache / key, verify=False)
    assert store is not None
    return store


def _open(folder: Path, *, verify: bool = True) -> TokenStore | None:
    """Returns the store in a folder, None if there is none or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        about = _read_note(folder)
        digests = about["sha256"]
        arrays = {}
        for name, dtype in _DTYPES.items():
            path = folder / f"{name}.bin"
            if verify and file_sha256(path) != digests[name]:
                raise ValueError(f"{path.name} is damaged")
            # An empty file cannot be mapped.
            is_empty = path.stat().st_size == 0
            arrays[name] = (
                np.empty(0, dtype) if is_empty else np.memmap(path, dtype, "r")
            )
        parts = [digests[name] for name in ("tokens", "loss_mask", "lengths")]
        digest = hashlib.sha256("".join(parts).encode()).hexdigest()
        return TokenStore(**arrays, note=about["note"], digest=digest)
    except _NO_STORE as error:
        warn(f"token cache {folder}: {error}; building it again")
        return None


def _read_note(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "note.json").read_text("utf-8"))
    if about["key"] != folder.name:
        raise ValueError("the note belongs to another store")
    return about


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock file; yields whether it is held, which is certain with `wait`."""
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


def _remove_unfinished(cache: Path, but: str) -> None:
    """Removes what killed builds of other keys left behind."""
    for temporary in cache.glob("*.tmp"):
        lock = temporary.with_suffix(".lock")
        # A folder without a lock file was not made by a build.
        if temporary.stem != but and lock.exists():
            with _locked(lock, wait=False) as held:
                if held:
                    shutil.rmtree(temporary, ignore_errors=True)


def _hold_while_used(store: TokenStore, folder: Path) -> None:
    """Marks a store as used now, and keeps `_prune` from removing it while it is open."""
    os.utime(folder)
    use = os.open(folder.with_suffix(".use"), os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(use, fcntl.LOCK_SH)  # waits for `_prune` at most, which is quick
    weakref.finalize(store, os.close, use)


def _prune(cache: Path, but: str) -> None:
    """Removes stores that nobody uses, the longest unused first, down to SHARE."""
    found = []  # (last use, size, folder)
    for folder in cache.iterdir():
        with suppress(*_NO_STORE):  # which are left alone
            _read_note(folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    excess = total - SHARE * shutil.disk_usage(cache).total
    for _, size, folder in sorted(found):
        if excess <= 0:
            return
        if folder.name == but:
            continue
        with (
            # Held while another process opens the store, and while one has it open.
            _locked(folder.with_suffix(".lock"), wait=False) as is_closed,
            _locked(folder.with_suffix(".use"), wait=False) as is_unused,
        ):
            if is_closed and is_unused:
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    excess -= size
                    print(f"token cache: {folder} was removed to make room", flush=True)
