"""Puts an export on the Hugging Face hub, with a card that says what it is made of."""

from pathlib import Path
from typing import Literal

from jlora.formats.model_card import model_card
from jlora.formats.open_model import open_model
from jlora.hub import check_repository, license_of, push_files
from jlora.loading import base_model_of, open_adapter, run_of
from jlora.report.run_folder import RunFolder

Form = Literal["merged", "adapter", "gguf"]


def push_export(
    folder: Path, name: str, adapter: str, model: str | None, form: Form
) -> str:
    """Uploads an exported folder and its card in one commit; returns a line for the user.

    Args:
        folder: what was exported.
        name: of the repository, owner/name; made, and private, if there is none.
        adapter: what was exported from, a run or an adapter.
        model: its base; None: the one that it names.
        form: of the export.

    Raises:
        UsageError: the hub refuses it, or does not answer.
    """
    base = _base_on_hub(model or base_model_of(adapter), adapter)
    run = next(
        (
            RunFolder.read(place)
            for place in (run_of(adapter), Path(adapter).parent)
            if (place / "metrics.jsonl").is_file()
        ),
        None,
    )
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
        run=run,
    )
    address = push_files(name, {**files, "README.md": card.encode()})
    return f"uploaded {len(files)} files and a model card to {address}"


def check_push(name: str | None) -> None:
    """Raises UsageError for a name that no repository can have."""
    if name is not None:
        check_repository(name)


def _base_on_hub(model: str, adapter: str) -> str:
    """Returns the hub id that the base came from, or else its name as it was given."""
    if not Path(model).exists():
        return model.partition("@")[0]
    source = str(open_model(model).provenance.get("source") or "")
    if source and not Path(source).exists() and source.count("/") == 1:
        return source
    named = open_adapter(adapter).config.base_model_name_or_path or ""
    is_id = named.count("/") == 1 and not Path(named).exists()
    return named if is_id else Path(model).name
