"""Checkpoints of a run: the trainable state through Orbax, and what is needed beside it.

Orbax checks no array data (a flipped byte is restored as a wrong number), and damage
that it does notice shows as errors of many classes, some printed by other threads. So a
checkpoint has the sha256 of its files, which are compared before Orbax reads them, and
that of every array.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.config.lora_config import LoraConfig
from jlora.data.cache.token_store import file_sha256
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing, warn
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.digests import flatten, leaf_digest
from jlora.parallel.processes import is_first, to_host

# 2: moments are of stacked layers. 3: the identity has the model's configuration and
# jlora's version, and files and settings have digests. What is under "trainable" is the
# same in all.
SCHEMA_VERSION = 3
RECORD = "meta/metadata"  # of a checkpoint's folder
Tree = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """One restored step: its number, its arrays by path, and the settings beside them."""

    step: int
    leaves: dict[str, np.ndarray]
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    state: Any,
    meta: dict[str, Any],
    *,
    keep: int,
    also: int | None = None,
) -> None:
    """Writes the state as step `step`, and `meta` (JSON) beside it; whole, or not at all.

    Of several processes all have to call this; only
    the first writes.

    Args:
        folder: `checkpoints/` of a run. Later steps in it, which were damaged when the run
            resumed, are deleted then.
        step: number of steps done.
        state: tree of arrays.
        meta: what `Saved.meta` is to be.
        keep: how many steps stay, the newest.
        also: a step that stays besides these.

    Raises:
        ResourceError: the disk is full; earlier steps are still there.
    """
    leaves = {path: to_host(leaf) for path, leaf in flatten(state).items()}
    if not is_first():
        return
    for left in folder.glob(".*.partial"):  # by a save that was killed
        _delete(left)
    target = folder / str(step)
    if not (target / RECORD).is_file():  # or what is there is damaged
        _delete(target)
    with atomic_folder(target, overwrite=True, marks=[RECORD]) as new:
        with ocp.Checkpointer(_handler(), **_alone()) as checkpointer:
            checkpointer.save(new / "state", args=ocp.args.PyTreeSave(leaves))
        digests = {path: leaf_digest(leaf) for path, leaf in leaves.items()}
        facts = {"sha256": digests, "files": _file_digests(new / "state"), **meta}
        # As it is read back: lists instead of tuples.
        facts = json.loads(json.dumps({"schema": SCHEMA_VERSION, **facts}))
        (new / RECORD).parent.mkdir()
        text = json.dumps({**facts, "digest": _digest(facts)})
        (new / RECORD).write_text(text, "utf-8")
    steps = saved_steps(folder)
    kept = {also, *[saved for saved in steps if saved <= step][:keep]}
    for old in set(steps) - kept:
        _delete(folder / str(old))


def _alone() -> dict[str, Any]:
    """Returns Orbax's options for a process that waits for no other one."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"process_{index}",
    )
    return {"multiprocessing_options": options}


def _handler() -> Any:  # it types paths as its own class
    return ocp.PyTreeCheckpointHandler(**_alone())


def _digest(meta: dict[str, Any]) -> str:
    return sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _file_digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that are in a folder, valid or not, newest first."""
    if not folder.is_dir():
        return []
    names = {path.name for path in folder.iterdir()}
    # isdigit() alone accepts digits that int() does not, and those of other scripts.
    numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
    return sorted((n for n in numbers if str(n) in names), reverse=True)


def load_newest(
    folder: Path, schemas: Sequence[int] = (SCHEMA_VERSION,)
) -> tuple[Saved | None, list[str]]:
    """Returns the newest valid step, and why newer ones are not valid.

    Raises:
        CorruptError: there are steps, and none is valid; nothing is deleted.
        UnsupportedError: a step was written with another schema of jlora.
    """
    saved, problems = load_newest_common([folder], schemas)
    return (saved[0] if saved else None), problems


def load_newest_common(
    folders: Sequence[Path], schemas: Sequence[int] = (SCHEMA_VERSION,)
) -> tuple[list[Saved], list[str]]:
    """Returns the newest step that is valid in all folders, if any; as `load_newest`."""
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
        meta = _read_meta(path, schemas)
        expected = meta["files"] if meta["schema"] > 2 else {}
        wrong = expected.items() - _file_digests(path / "state").items()
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: the checkpoint is incomplete") from error
    if wrong:
        names = sorted(name for name, _ in wrong)
        raise CorruptError(f"{path}: damaged or missing files: {listing(names, 3)}")
    leaves = _restore(path / "state")
    digests = meta["sha256"]
    if leaves.keys() != digests.keys():
        raise CorruptError(f"{path}: arrays and their digests do not belong together")
    damaged = [name for name in leaves if leaf_digest(leaves[name]) != digests[name]]
    if damaged:
        raise CorruptError(f"{path}: damaged arrays: {listing(damaged)}")
    return Saved(step=step, leaves=leaves, meta=meta)


def _read_meta(path: Path, schemas: Sequence[int]) -> dict[str, Any]:
    meta = json.loads((path / RECORD).read_text("utf-8"))
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if type(schema) is not int:
        raise CorruptError(f"{path}: no record of a checkpoint")
    digest = meta.pop("digest", None)
    if digest != (_digest(meta) if schema > 2 else None):
        raise CorruptError(f"{path}: its settings are damaged")
    if schema not in schemas:
        raise UnsupportedError(
            f"{path}: written with checkpoint schema {schema}; this jlora reads schema "
            f"{max(schemas)}; use the jlora that wrote it, or another output_dir, where "
            "init_adapter=RUN continues the adapter of a run"
        )
    groups = [meta.get(name, {}) for name in ("identity", "settings", "versions")]
    if not all(isinstance(group, dict) for group in (meta.get("sha256"), *groups)):
        raise CorruptError(f"{path}: its settings are damaged")
    return meta


def _restore(path: Path) -> Tree:
    """Returns the tree that Orbax saved at `path`, as NumPy arrays."""
    handler = _handler()
    try:
        with ocp.Checkpointer(handler, **_alone()) as checkpointer:
            metadata = handler.metadata(path.absolute())
            how: Any = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
            )
            arguments = ocp.args.PyTreeRestore(restore_args=how)
            return checkpointer.restore(path.absolute(), args=arguments)
    except MemoryError:
        raise
    except Exception as error:  # of many classes, from several libraries
        raise CorruptError(
            f"{path}: not a complete checkpoint, files are missing or damaged"
        ) from error


def restore_into(state: Any, saved: Saved) -> Any:
    """Returns the saved arrays with the structure and placement of `state`.

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


def adapter_of_step(
    folder: Path, step: int | None = None
) -> tuple[LoraConfig, Tree, dict[str, Any]]:
    """Returns (LoRA settings, trainable tree of NumPy arrays, meta) of a step.

    Args:
        folder: `checkpoints/` of a run.
        step: None takes the newest that is valid.

    Raises:
        UsageError: there is none, or not that one.
        CorruptError, UnsupportedError: as `load_newest`.
    """
    schemas, steps = range(1, SCHEMA_VERSION + 1), sorted(saved_steps(folder))
    if not steps:
        raise UsageError(f"{folder.parent}: neither an adapter/ nor a checkpoint in it")
    if step is None:
        saved, problems = load_newest(folder, schemas)
        assert saved is not None
        warn_skipped(problems)
    elif step in steps:
        saved = _load(folder / str(step), step, schemas)
    else:
        raise UsageError(f"{folder}: no step {step}; there are {listing(steps)}")
    tree: Tree = {}
    for name, leaf in saved.leaves.items():
        first, *parts = name.split(".")
        if first == "trainable":
            node = tree
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = leaf
    try:
        lora = LoraConfig(**saved.meta["settings"]["lora"])
    except (KeyError, TypeError) as error:
        raise CorruptError(
            f"{folder}: step {saved.step} has no settings of an adapter"
        ) from error
    return lora, tree, saved.meta


def warn_skipped(problems: Sequence[str]) -> None:
    """Warns of the checkpoints that `load_newest` found damaged."""
    for problem in problems:
        warn(f"skipped a damaged checkpoint: {problem}")
