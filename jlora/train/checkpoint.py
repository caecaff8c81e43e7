"""Saving and restoring through Orbax, with digests: what comes back is what was written.

Orbax checks no array data (a flipped byte is restored as a wrong number), so the sha256
of every leaf is kept beside the arrays and compared on the way back.

Above 300 lines, because it is the only module that knows Orbax and its files: those of
bases and those of runs.
"""

import asyncio
import itertools
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.formats.digests import flatten, leaf_digest
from jlora.parallel.processes import to_host

# 2: the moments of all layers together. What lies under "trainable" is as in 1.
SCHEMA_VERSION = 2
# Of a converted base; a chunk is the least that a process reads of a leaf.
CHUNK_BYTES = 16 << 20
Tree = dict[str, Any]


@dataclass(frozen=True)
class Chunks:
    """How a leaf lies on disk: the shape of its chunks, and a checksum of each, in order."""

    shape: tuple[int, ...]
    crc32: list[int]


def save_tree(path: Path, tree: Tree) -> dict[str, Chunks]:
    """Writes arrays as an Orbax checkpoint at `path`, which must not exist.

    Uncompressed, in chunks: what `base_folder` reads one by one. Trained weights hardly
    compress, and doing it took three quarters of the time.

    Returns:
        {dotted path: its chunks}, whose shape divides the leaf's.
    """
    arrays = _ChunkHandler()
    handler: Any = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, arrays)
        ),
    )
    how = jax.tree.map(
        lambda leaf: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(leaf.shape)), tree
    )
    with ocp.Checkpointer(handler) as checkpointer:
        arguments = ocp.args.PyTreeSave(tree, save_args=how)
        checkpointer.save(path.absolute(), args=arguments)
    return arrays.written


class _ChunkHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of arrays, which has them written chunk by chunk, in little memory.

    TensorStore copies every chunk that is not contiguous in its array, and faster than
    it writes them: given a whole array, it held another one.
    """

    def __init__(self) -> None:
        try:
            super().__init__(deepcopy_host_arrays=False)
        # Orbax 0.12.4 and 0.12.5 always copy: one more layer in memory.
        except TypeError:
            super().__init__()
        self.written: dict[str, Chunks] = {}
        self._threads = ThreadPoolExecutor(2)
        self._buffers: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(2):
            self._buffers.put(np.empty(CHUNK_BYTES, np.uint8))

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        store: Any = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        shape = store.chunk_layout.write_chunk.shape
        loop = asyncio.get_running_loop()
        checksums = await asyncio.gather(
            *(
                loop.run_in_executor(self._threads, self._write, store[box], value[box])
                for box in chunk_files(value.shape, shape).values()
            )
        )
        self.written[Path(store.kvstore.path).name] = Chunks(shape, checksums)

    def _write(self, place: Any, part: np.ndarray) -> int:
        """Writes one chunk and returns its checksum."""
        memory = self._buffers.get()
        try:
            if not part.flags.c_contiguous:
                copy = memory[: part.nbytes].view(part.dtype).reshape(part.shape)
                copy[...] = part
                part = copy
            place.write(part, can_reference_source_data_indefinitely=True).result()
            return zlib.crc32(part.reshape(-1).view(np.uint8).data)
        finally:
            self._buffers.put(memory)


def chunk_files(
    shape: tuple[int, ...], chunk: tuple[int, ...]
) -> dict[str, tuple[slice, ...]]:
    """Returns {file name: box} of the chunks of a leaf, in order."""
    counts = [range(size // part) for size, part in zip(shape, chunk, strict=True)]
    return {
        ".".join(map(str, numbers)) or "0": tuple(
            slice(i * part, (i + 1) * part)
            for i, part in zip(numbers, chunk, strict=True)
        )
        for numbers in itertools.product(*counts)
    }


def _chunk_bytes(shape: tuple[int, ...]) -> int | None:
    """Returns the size of chunks, or None for a single one.

    Orbax cuts by divisors: a vocabulary of 32,003, a prime, would give a file per row.
    """
    return CHUNK_BYTES if all(size % 16 == 0 for size in shape) else None


def restore_tree(path: Path) -> Tree:
    """Returns the tree saved at `path` as NumPy arrays.

    Raises:
        CorruptError: the checkpoint is incomplete or damaged.
    """
    handler: Any = ocp.PyTreeCheckpointHandler()  # it types paths as its own class
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            metadata = handler.metadata(path.absolute())
            how: Any = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
            )
            arguments = ocp.args.PyTreeRestore(restore_args=how)
            return checkpointer.restore(path.absolute(), args=arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise CorruptError(f"{path}: not a complete checkpoint ({first})") from error


@dataclass(frozen=True)
class Saved:
    """One restored step: its number, its arrays by path, and what was noted beside them."""

    step: int
    leaves: dict[str, np.ndarray]
    meta: dict[str, Any]


class RunCheckpoints:
    """The `checkpoints/` folder of a run: numbered steps of the trainable state only."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Opens the folder, creating it and clearing what a killed save left."""
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes the state as step `step`.

        Steps from there on are deleted first: a run comes back to a step that is there
        only if that one was damaged, and Orbax would refuse a step before its newest.
        """
        # By Orbax's own list: that on disk changes while several processes get here, and
        # all of them have to take part in a deletion.
        for damaged in self._manager.all_steps():
            if damaged >= step:
                self._manager.delete(damaged)
        leaves = {path: to_host(leaf) for path, leaf in flatten(state).items()}
        digests = {path: leaf_digest(leaf) for path, leaf in leaves.items()}
        note = {"schema": SCHEMA_VERSION, "sha256": digests, **meta}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves), meta=ocp.args.JsonSave(note)
        )
        self._manager.save(step, args=arguments)

    def close(self) -> None:
        """Releases the manager."""
        self._manager.close()


def saved_steps(folder: Path) -> list[int]:
    """Returns the numbers of the step folders, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(
        (int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True
    )


def load_newest(
    folder: Path, schemas: Sequence[int] = (SCHEMA_VERSION,)
) -> tuple[Saved | None, list[str]]:
    """Returns the newest step that restores and verifies, and why newer ones did not.

    Raises:
        CorruptError: there are steps, and none is valid; nothing is deleted.
        UnsupportedError: a step was written by another schema of jlora.
    """
    saved, problems = load_newest_common([folder], schemas)
    return (saved[0] if saved else None), problems


def load_newest_common(
    folders: Sequence[Path], schemas: Sequence[int] = (SCHEMA_VERSION,)
) -> tuple[list[Saved], list[str]]:
    """Returns the newest step that is valid in every folder, else nothing; as above."""
    problems = []
    shared = set.intersection(*(set(saved_steps(folder)) for folder in folders))
    for step in sorted(shared, reverse=True):
        try:
            found = [_load(folder / str(step), step, schemas) for folder in folders]
        except CorruptError as error:
            problems.append(str(error))
        else:
            return found, problems
    if problems:
        raise CorruptError(f"{folders[0]}: no valid checkpoint: {listing(problems, 3)}")
    return [], []


def _load(path: Path, step: int, schemas: Sequence[int]) -> Saved:
    try:
        text = (path / "meta" / "metadata").read_text("utf-8")
        meta = json.loads(text)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path}: the checkpoint is incomplete") from error
    if meta.get("schema") not in schemas:
        raise UnsupportedError(
            f"{path}: written with checkpoint schema {meta.get('schema')!r}; "
            f"this jlora reads schema {max(schemas)}; use the jlora that wrote it, or begin "
            "the run again in another output_dir"
        )
    leaves = restore_tree(path / "state")
    digests = meta.get("sha256", {})
    if leaves.keys() != digests.keys():
        raise CorruptError(f"{path}: arrays and their digests do not belong together")
    damaged = [name for name in leaves if leaf_digest(leaves[name]) != digests[name]]
    if damaged:
        raise CorruptError(f"{path}: damaged arrays: {listing(damaged)}")
    return Saved(step=step, leaves=leaves, meta=meta)


def restore_into(state: Any, saved: Saved) -> Any:
    """Returns `state` with every leaf replaced by the saved one, placed as it was.

    Raises:
        CorruptError: paths, shapes or dtypes differ.
    """
    expected = flatten(state)
    wrong = [
        name
        for name in sorted(expected.keys() | saved.leaves.keys())
        if name not in expected
        or name not in saved.leaves
        or expected[name].shape != saved.leaves[name].shape
        or expected[name].dtype != saved.leaves[name].dtype
    ]
    if wrong:
        raise CorruptError(
            f"checkpoint step {saved.step} does not fit: {listing(wrong)}"
        )
    leaves = [
        jax.make_array_from_callback(
            leaf.shape, leaf.sharding, saved.leaves[name].__getitem__
        )
        for name, leaf in expected.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def newest_adapter(run: Path) -> tuple[LoraConfig, Tree, dict[str, Any]]:
    """Returns (LoRA settings, trainable tree of NumPy arrays, meta) of a run's newest step.

    Raises:
        UsageError: the run has no checkpoint.
        CorruptError: it has some, and none is valid.
        UnsupportedError: it is of a schema that is not known here.
    """
    saved, _ = load_newest(run / "checkpoints", (1, SCHEMA_VERSION))
    if saved is None:
        raise UsageError(f"{run}: neither an adapter/ folder nor a checkpoint in it")
    tree: Tree = {}
    for name, leaf in saved.leaves.items():
        first, *parts = name.split(".")
        if first == "trainable":
            node = tree
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = leaf
    return LoraConfig(**saved.meta["settings"]["lora"]), tree, saved.meta
