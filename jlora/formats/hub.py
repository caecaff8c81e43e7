"""Downloads models and adapters of the Hugging Face hub into its own cache."""

import re
from pathlib import Path

from jlora.errors import UsageError

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_id(path: str) -> bool:
    """Returns whether a string has the form owner/name or owner/name@revision."""
    return _HUB_ID.fullmatch(path) is not None and not path.startswith((".", "~"))


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
            f"{name}: no such local folder, and it cannot be fetched from the hub: "
            f"{reason[0]}"
        ) from error
    return Path(folder)
