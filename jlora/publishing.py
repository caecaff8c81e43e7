"""Puts an export on the Hugging Face hub, with a card that says what it is made of."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from jlora.formats.model_card import model_card
from jlora.formats.open_model import open_model
from jlora.hub import check_repository, is_hub_id, license_of, push_files
from jlora.loading import base_model_of, exported_adapter, open_adapter, run_of
from jlora.report.run_folder import RunFolder
from jlora.train.resuming import exported_step

Form = Literal["merged", "adapter", "gguf"]


def push_export(
    folder: Path,
    name: str,
    adapter: str,
    step: int | None,
    model: str | None,
    form: Form,
) -> str:
    """Uploads an exported folder and its card in one commit; returns a line for the user.

    Args:
        folder: what was exported.
        name: of the repository, owner/name; made, and private, if there is none.
        adapter: what was exported from, a run or an adapter.
        step: of the run's checkpoint; None: as `open_adapter` chooses.
        model: its base; None: the one that it names.
        form: of the export.

    Raises:
        UsageError: the hub refuses it, or does not answer.
    """
    base = _base_on_hub(model or base_model_of(adapter), adapter)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    card = model_card(
        name,
        base,
        license_of(base),
        form,
        lora=open_adapter(adapter).config,
        run=_run_until(adapter, step),
    )
    address = push_files(name, {**files, "README.md": card.encode()})
    return f"uploaded {len(files)} files and a model card to {address}"


def _run_until(adapter: str, step: int | None) -> RunFolder | None:
    """Returns the run that an adapter is of, up to the step that it is of, if it is known."""
    path = Path(adapter)
    places = (run_of(adapter), path.parent)
    run = next((p for p in places if (p / "metrics.jsonl").is_file()), None)
    if run is None:
        return None
    if step is None and run_of(adapter) != path:  # RUN/checkpoints/30
        step = int(path.name)
    if step is None and (run != path or exported_adapter(run) is not None):
        step = exported_step(run)
    found = RunFolder.read(run)
    lines = [m for m in found.metrics if step is None or m["step"] <= step]
    return replace(found, metrics=lines)


def check_push(name: str | None) -> None:
    """Raises UsageError for a name that no repository can have."""
    if name is not None:
        check_repository(name)


def _base_on_hub(model: str, adapter: str) -> str:
    """Returns the hub id that the base came from, or else its name as it was given."""
    given = [model]
    if Path(model).exists():
        given = [str(open_model(model).provenance.get("source") or "")]
        given += [open_adapter(adapter).config.base_model_name_or_path or ""]
    ids = [name.partition("@")[0] for name in given if is_hub_id(name)]
    return ids[0] if ids else Path(model).resolve().name
