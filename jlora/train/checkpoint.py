"""Saving and restoring through Orbax, with digests: what comes back is what was written.

Orbax checks no array data (a flipped byte is restored as a wrong number), so the sha256
of every leaf is kept beside the arrays and compared on the way back.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.formats.digests import flatten, leaf_digest
from jlora.parallel.processes import to_host

# 2: moments are of stacked layers. 3: the identity has the model's configuration and
# jlora's version. What is under "trainable" is the same in all.
SCHEMA_VERSION = 3
Tree = dict[str, Any]


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
    """One restored step: its number, its arrays by path, and the settings beside them."""

    step: int
    leaves: dict[str, np.ndarray]
    meta: dict[str, Any]


class RunCheckpoints:
    """The `checkpoints/` folder of a run, which has the trainable state of some steps."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Creates the folder, or opens it and deletes what an interrupted save left."""
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
        """Writes the state as step `step`, and `meta` beside it.

        Later steps are deleted first: they exist only if the run resumed from an earlier
        one because they were damaged, and Orbax refuses a step before its newest.
        """
        # Orbax's own list, as all processes must take part in a deletion, and the list on
        # disk changes while they get here.
        for damaged in self._manager.all_steps():
            if damaged >= step:
                self._manager.delete(damaged)
        leaves = {path: to_host(leaf) for path, leaf in flatten(state).items()}
        digests = {path: leaf_digest(leaf) for path, leaf in leaves.items()}
        meta = {"schema": SCHEMA_VERSION, "sha256": digests, **meta}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves), meta=ocp.args.JsonSave(meta)
        )
        self._manager.save(step, args=arguments)

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that have a folder, valid or not, newest first."""
    if not folder.is_dir():
        return []
    return sorted(
        (
            int(p.name)
            for p in folder.iterdir()
            if p.name.isascii() and p.name.isdigit()
        ),
        reverse=True,
    )


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
        text = (path / "meta" / "metadata").read_text("utf-8")
        meta = json.loads(text)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path}: the checkpoint is incomplete") from error
    if meta.get("schema") not in schemas:
        raise UnsupportedError(
            f"{path}: written with checkpoint schema {meta.get('schema')!r}; "
            f"this jlora reads schema {max(schemas)}; use the jlora that wrote it, or "
            "another output_dir, where --init_adapter RUN continues the adapter of a run"
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


def newest_adapter(run: Path) -> tuple[LoraConfig, Tree, dict[str, Any]]:
    """Returns (LoRA settings, trainable tree of NumPy arrays, meta) of a run's newest step.

    Raises:
        UsageError: the run has no checkpoint.
        CorruptError, UnsupportedError: as `load_newest`.
    """
    saved, _ = load_newest(run / "checkpoints", range(1, SCHEMA_VERSION + 1))
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
