"""Downloads models and adapters of the Hugging Face hub into its own cache."""

import os
import re
from pathlib import Path

from jlora.errors import UsageError, nearest_path

# As the hub allows it: letters, digits and single . and - between them, or any _.
_PART = r"(?!\S*(?:--|\.\.))\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"({_PART})/({_PART})(@[\w./-]+)?", re.ASCII)
_MAX_LENGTH = 96
# Of files, which are not named like repositories.
_FILES = (".gguf", ".safetensors", ".bin", ".json", ".git")


def is_hub_id(path: str) -> bool:
    """Returns whether a string means a model or adapter of the hub, and nothing local.

    It has the form owner/name or owner/name@revision, and nothing exists there. Beside
    a local folder `owner`, only the form with a revision counts: the other may be a
    mistyped path, which nobody else should be asked about.
    """
    found = _HUB_ID.fullmatch(path)
    if found is None or os.path.exists(path):
        return False
    owner, name, revision = found.groups()
    if len(f"{owner}/{name}") > _MAX_LENGTH or name.lower().endswith(_FILES):
        return False
    return revision is not None or not os.path.exists(owner)


def nothing_there(path: str, expected: str) -> UsageError:
    """Returns the error for a path that is neither local nor a hub id.

    Args:
        path: what the user gave.
        expected: what it could have been, such as "an HF folder".
    """
    hint = nearest_path(path)
    if not hint and is_hub_id(f"{path}@main"):
        hint = f"; to download it beside the folder of that name, give {path}@main"
    return UsageError(
        f"{path}: no such file or folder{hint}; give {expected} or a hub id (owner/name)"
    )


def hub_folder(
    name: str, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    """Downloads the files of a hub id that match the patterns; returns their folder.

    Raises:
        UsageError: it cannot be downloaded.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{name}: no such local folder, and hub ids need huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
    except Exception as error:  # of many classes, from several HTTP libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{name}: no such local folder{nearest_path(name)}, and it cannot be fetched "
            f"from the hub: {reason[0]}"
        ) from error
    return Path(folder)
