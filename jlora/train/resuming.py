"""The rules of resuming: which folder may be continued, with what, and from which step."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jlora.config.lora_config import LoraConfig
from jlora.errors import UsageError, listing, warn
from jlora.parallel.processes import is_first
from jlora.train.checkpoint import (
    Saved,
    load_newest,
    load_newest_common,
    restore_into,
    saved_steps,
)

# Parts of a run's identity whose values say nothing to a reader.
DIGESTS = ("base", "tokenizer", "data")
# What an adapter says of where its base is found; training does not depend on it.
LABELS = ("lora.base_model_name_or_path", "lora.revision")
# Settings that say where a run lies and how it was called, not what it computes.
PLACES = ("model", "output_dir", "resume", "plan", "sweep")


def check_run(run: Path, mode: str) -> None:
    """Refuses, before anything is read, a folder that the run could not be in.

    Raises:
        UsageError: it is no folder, holds a model, cannot be made, or holds a run (or
            none) against the mode of resuming; see `resume`.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(
            f"{run}: exists and is not a folder; choose another output_dir"
        )
    if (run / "config.json").exists():
        raise UsageError(f"{run}: holds a model; choose another output_dir")
    home = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise UsageError(f"{run}: cannot be made, as {home} cannot be written")
    _check_mode([run], mode)


def _check_mode(runs: Sequence[Path], mode: str) -> list[Path]:
    """Returns the checkpoint folders of the runs that have begun.

    Raises:
        UsageError: some have begun, or none, against the mode.
    """
    folders = [run / "checkpoints" for run in runs]
    begun = [folder for folder in folders if saved_steps(folder)]
    if mode == "must" and not begun:
        raise UsageError(f"{runs[0]}: no checkpoint to resume from")
    if mode == "never" and begun:
        raise UsageError(
            f"{begun[0].parent}: holds a run already; choose another output_dir, "
            "or continue it with --resume auto"
        )
    return begun


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run folder for this process, or for the first of several, creating it.

    Raises:
        UsageError: another process holds it, or it cannot be made.
    """
    if not is_first():
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"{run}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{run}: another run is using this folder; choose another output_dir"
            ) from error
        yield


def resume(run: Path, state: Any, meta: dict[str, Any], *, mode: str) -> Any:
    """Returns the state to start from: the newest valid checkpoint's, or as given.

    Args:
        run: the run folder.
        state: a fresh state, placed on its devices.
        meta: of this run; its "identity" has to be as it was when the run began, and
            changes of its "settings" and "versions" are printed.
        mode: auto continues a run if there is one, must demands one, never refuses one.

    Raises:
        UsageError: the mode does not fit, or the identity differs.
        CorruptError: there are checkpoints, and none is valid.
    """
    return resume_all([run], [state], [meta], mode=mode)[0]


def resume_all(
    runs: Sequence[Path], states: Sequence[Any], metas: Sequence[Any], *, mode: str
) -> list[Any]:
    """Returns `resume` of runs that are trained together, all at the same step.

    The "sweep" of a meta names them all: that is how runs that were saved together are
    told from runs that were not, where some of them have no checkpoint.
    """
    begun = _check_mode(runs, mode)
    folders = [run / "checkpoints" for run in runs]
    saved, problems = load_newest_common(folders)
    for problem in problems:
        warn(f"skipped a damaged checkpoint: {problem}")
    if not saved:
        _check_first_save(begun, folders, metas[0])
        return list(states)
    for run, before, meta in zip(runs, saved, metas, strict=True):
        check_identity(before, meta["identity"], run)
    print(f"resuming after step {saved[0].step}", flush=True)
    pairs = zip(saved, metas, strict=True)
    notes = (line for pair in pairs for line in changed_settings(*pair))
    for line in dict.fromkeys(notes):
        print(f"note: {line}", flush=True)
    return [restore_into(*pair) for pair in zip(states, saved, strict=True)]


def _check_first_save(
    begun: Sequence[Path], folders: Sequence[Path], meta: dict[str, Any]
) -> None:
    """Refuses runs without a common step, unless a kill came amid their first save."""
    for folder in begun:
        saved, _ = load_newest(folder)
        if saved is None or saved.meta.get("sweep") != meta.get("sweep"):
            others = [str(f.parent) for f in folders if f not in begun] or folders
            raise UsageError(
                f"{folder.parent} was trained already, without {listing(others)}; "
                "choose another output_dir, or leave one or the other out of the sweep"
            )


def check_identity(saved: Saved, identity: dict[str, Any], run: Path) -> None:
    """Refuses to continue a run with other data, weights or settings than it began with.

    Raises:
        UsageError: naming every key that differs.
    """
    # A field that did not exist yet when the run began had its default.
    unsaid = _by_name({"lora": asdict(LoraConfig())})
    before, now = (
        unsaid | _by_name(x) for x in (saved.meta.get("identity", {}), identity)
    )
    differing = [
        f"the {name} differs"
        if name in DIGESTS
        else f"{name} is {json.dumps(now.get(name))}, was {json.dumps(before.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in LABELS
    ]
    if differing:
        raise UsageError(
            f"{run}: cannot resume from step {saved.step}: {listing(differing)}; give what "
            "the run began with, or another output_dir"
        )


def changed_settings(saved: Saved, meta: dict[str, Any]) -> list[str]:
    """Returns a line per setting and library version that may change and has changed."""
    lines = []
    for group in ("settings", "versions"):
        before, now = (_by_name(x.get(group, {})) for x in (saved.meta, meta))
        lines += [
            f"{name} is {json.dumps(now[name])}, was {json.dumps(before[name])}"
            for name in now
            if name in before and now[name] != before[name] and name not in PLACES
        ]
    return lines


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of each group by their dotted names."""
    result = {}
    for key, value in settings.items():
        group = value if isinstance(value, dict) else {"": value}
        result |= {f"{key}.{name}".rstrip("."): item for name, item in group.items()}
    return result
