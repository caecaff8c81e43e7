"""Model hub ids: owner/name or owner/name@revision, fetched into the hub's own cache."""

import re
from pathlib import Path

from jlora.errors import UsageError

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_id(path: str) -> bool:
    """Returns whether a path that is not there may be owner/name or owner/name@revision."""
    return _HUB_ID.fullmatch(path) is not None and not path.startswith((".", "~"))


def hub_folder(
    name: str, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    """Returns the local copy of the files of a hub id that match the patterns.

    Raises:
        UsageError: it cannot be fetched.
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
    except Exception as error:  # many classes, of several HTTP libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{name}: no such local folder, and it cannot be fetched from the hub: "
            f"{reason[0]}"
        ) from error
    return Path(folder)
