"""Whether a run may continue in its folder, with which settings, and from which step."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.data.cache.token_store import file_sha256
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UsageError, about_file, listing, warn
from jlora.formats.digests import fingerprint
from jlora.formats.peft.adapter import Adapter
from jlora.lora.adapter_tree import Params
from jlora.parallel.processes import is_first
from jlora.train.checkpoint import (
    Saved,
    load_newest,
    load_newest_common,
    restore_into,
    saved_steps,
    warn_skipped,
)

# Parts of a run's identity that are digests: messages name what they are of, not values.
DIGESTS = {
    "base": "the base",
    "tokenizer": "the tokenizer or its chat template",
    "data": "the data",
    "init_adapter": "the adapter that it continues (init_adapter)",
}
# Where an adapter says that its base is found; training does not depend on it.
LABELS = ("lora.base_model_name_or_path", "lora.revision")
# Settings that decide where a run is and what it does first, not what it computes.
PLACES = ("model", "output_dir", "resume", "plan", "sweep")
# What a run writes into `adapter/`.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# The file of a run folder with the step that `adapter/` was exported at, and its digest.
EXPORTED = ".adapter_step"


def check_run(run: Path, mode: str) -> None:
    """Checks, before anything is read, that the run can be in this folder.

    Raises:
        UsageError: it is no folder, holds a model, cannot be created, or holds a run (or
            none) although `mode` forbids it; see `resume_all`.
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
    _check_adapter(run)


def _check_adapter(run: Path) -> None:
    """Refuses a run that would replace files that no run has written."""
    adapter = run / "adapter"
    names = {path.name for path in adapter.iterdir()} if adapter.is_dir() else set()
    foreign = names - set(ADAPTER_FILES) if saved_steps(run / "checkpoints") else names
    if foreign or (adapter.exists() and not adapter.is_dir()):
        raise UsageError(
            f"{adapter}: holds {listing(sorted(foreign)) or 'a file'}, which this run did "
            "not write and would replace; move it away, or choose another output_dir"
        )


def record_export(run: Path, step: int, held: int) -> None:
    """Records that adapter/, as it is now, was exported at the end of a run.

    Args:
        run: its folder.
        step: the run's last.
        held: the step that adapter/ holds, the last or the best.
    """
    temporary = run / f"{EXPORTED}.partial"
    with about_file(temporary):
        temporary.write_text(f"{_export_record(run, step)} {held}")
        temporary.replace(run / EXPORTED)


def is_newest_export(run: Path) -> bool:
    """Returns whether adapter/ was exported when the run was at its newest checkpoint.

    If not, as in a run that goes on, readers take the newest checkpoint. A folder that was
    changed since its export is warned of.
    """
    step = max(saved_steps(run / "checkpoints"), default=0)
    try:
        # Earlier versions wrote no fourth word, the step that the folder holds.
        record = " ".join((run / EXPORTED).read_text().split()[:3])
        found = _export_record(run, step)
    except (OSError, ValueError):
        return False
    if record != found and record.split()[:1] == [str(step)]:
        warn(
            f"{run / 'adapter'}: not as it was exported; the newest checkpoint is used "
            "instead; to use the folder as it is, give its own path"
        )
    return record == found


def exported_step(run: Path) -> int | None:
    """Returns the step that a run's adapter/ holds, None if it was not recorded."""
    try:
        return int((run / EXPORTED).read_text().split()[3])
    except (OSError, ValueError, IndexError):
        return None


def _export_record(run: Path, step: int) -> str:
    digests = [file_sha256(run / "adapter" / name) for name in ADAPTER_FILES]
    return " ".join([str(step), *digests])


def _check_mode(runs: Sequence[Path], mode: str) -> list[Path]:
    """Returns the checkpoint folders of the runs that have a checkpoint.

    Raises:
        UsageError: there are some with mode=never, or none with mode=must.
    """
    folders = [run / "checkpoints" for run in runs]
    begun = [folder for folder in folders if saved_steps(folder)]
    if mode == "must" and not begun:
        raise UsageError(f"{runs[0]}: no checkpoint to resume from")
    if mode == "never" and begun:
        raise UsageError(
            f"{begun[0].parent}: holds a run already; choose another output_dir, "
            "or continue it with resume=auto"
        )
    return begun


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Creates the run folder and locks it, so that no other run uses it.

    Of several processes of one run, the first holds the lock.

    Raises:
        UsageError: another run holds the lock, or the folder cannot be created.
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


def resume_all(
    runs: Sequence[Path], states: Sequence[Any], metas: Sequence[Any], *, mode: str
) -> list[tuple[Any, dict[str, Any]]]:
    """Returns what to continue from: the newest checkpoint, or the states as given.

    With each state comes what `meta["progress"]` was when it was saved; at first {}.

    Args:
        runs: the folders of one run, or of several that are trained together; all of them
            continue at the same step.
        states: initial states, placed on their devices.
        metas: what checkpoints store beside each state. "identity" must be as it was when
            the run began; changes of "settings" and "versions" are printed. "sweep" names
            all runs that are saved together, so that those which were trained apart are
            recognised if some have no checkpoint.
        mode: auto: resume if there is a checkpoint; never: refuse if there is one; must:
            refuse if there is none.

    Raises:
        UsageError: `mode` forbids it, or the identity differs.
        CorruptError: there are checkpoints, and none is valid.
    """
    begun = _check_mode(runs, mode)
    folders = [run / "checkpoints" for run in runs]
    saved, problems = load_newest_common(folders)
    warn_skipped(problems)
    if not saved:
        _check_first_save(begun, folders, metas[0])
        return [(state, {}) for state in states]
    for run, before, meta in zip(runs, saved, metas, strict=True):
        check_identity(before, meta["identity"], run)
    print(f"resuming after step {saved[0].step}", flush=True)
    pairs = zip(saved, metas, strict=True)
    notes = (line for pair in pairs for line in changed_settings(*pair))
    for line in dict.fromkeys(notes):
        print(f"note: {line}", flush=True)
    return [
        (restore_into(state, before), before.meta.get("progress", {}))
        for state, before in zip(states, saved, strict=True)
    ]


def _check_first_save(
    begun: Sequence[Path], folders: Sequence[Path], meta: dict[str, Any]
) -> None:
    """Refuses runs without a common step, unless their first save was interrupted."""
    for folder in begun:
        saved, _ = load_newest(folder)
        if saved is None or saved.meta.get("sweep") != meta.get("sweep"):
            others = [str(f.parent) for f in folders if f not in begun] or folders
            raise UsageError(
                f"{folder.parent} was trained already, without {listing(others)}; "
                "choose another output_dir, or leave one or the other out of the sweep"
            )


def model_identity(
    config: LlamaConfig, base: Params, continued: Adapter | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns what a run begins with as a part of its identity."""
    fields = asdict(config)
    del fields["sliding_window"]  # no row is so long that it would change a number
    return {
        "rope_parameters": fields.pop("rope_parameters"),
        "config": fields,
        "base": fingerprint(base),
        "init_adapter": fingerprint(continued.tensors) if continued else None,
        "tokenizer": tokenizer.fingerprint,
    }


def check_identity(saved: Saved, identity: dict[str, Any], run: Path) -> None:
    """Raises UsageError if a run continues with another model, data, settings or jlora.

    The message names every key that differs.
    """
    # A field that did not exist when the run began had its default.
    defaults = _by_name({"lora": asdict(LoraConfig()), "optim.optimizer": "adamw"})
    # As text, because a tuple comes back from a checkpoint as a list.
    before, now = (
        {
            name: json.dumps(value, sort_keys=True)
            for name, value in (defaults | _by_name(x)).items()
        }
        for x in (saved.meta.get("identity", {}), identity)
    )
    differing = [
        f"{DIGESTS[name]} differs"
        if name in DIGESTS
        else f"{name} is {now.get(name, 'null')}, was {before.get(name, 'null')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in LABELS
    ]
    if differing:
        raise UsageError(
            f"{run}: cannot resume from step {saved.step}: {listing(differing)}; give what "
            "the run began with, or another output_dir, where "
            f"init_adapter={run} continues its adapter"
        )


def changed_settings(saved: Saved, meta: dict[str, Any]) -> list[str]:
    """Returns a line for every setting and library version that differs from the saved one."""
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
    """Returns {"group.name": value} of nested settings."""
    result = {}
    for key, value in settings.items():
        group = value if isinstance(value, dict) else {"": value}
        result |= {f"{key}.{name}".rstrip("."): item for name, item in group.items()}
    return result
