"""Downloads from the Hugging Face hub into its own cache, and uploads exports."""

import functools
import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jlora.errors import UsageError, listing, nearest_path

# As the hub allows it: letters, digits and single . and - between them, or any _.
_PART = r"(?!\S*(?:--|\.\.))\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"({_PART})/({_PART})(@[\w./-]+)?", re.ASCII)
_MAX_LENGTH = 96
# Of files, which are not named like repositories.
_FILES = (
    *(".gguf", ".safetensors", ".bin", ".json", ".jsonl", ".ndjson", ".csv", ".tsv"),
    *(".parquet", ".arrow", ".gz", ".zst", ".txt", ".git"),
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class DataSetFiles:
    """What a data set of the hub holds at one commit."""

    commit: str
    files: tuple[str, ...]
    configs: Any
    """`configs` of the README's YAML, unchecked; None without."""


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
    name: str,
    patterns: list[str],
    ignored: list[str] | None = None,
    kind: Kind = "model",
) -> Path:
    """Downloads the files of a hub id that match the patterns; returns their folder.

    Raises:
        UsageError: it cannot be downloaded; the message says why and what to do.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
    except Exception as error:  # of many classes, from several HTTP libraries
        raise _hub_error(name, kind, error) from error
    return Path(folder)


def check_repository(name: str) -> None:
    """Raises UsageError unless a repository can have this name, owner/name."""
    found = _HUB_ID.fullmatch(name)
    if found is None or found[3] or len(name) > _MAX_LENGTH:
        raise UsageError(
            f"push={name!r}; expected owner/name, as of a hub's repository"
        )


def license_of(name: str) -> str | None:
    """Returns the licence that the card of a model on the hub names; None if unknown."""
    if name.count("/") != 1:
        return None
    import huggingface_hub

    with suppress(Exception):  # gated, gone, no connection: then it is not known
        card = huggingface_hub.HfApi().model_info(name).card_data
        found = card.to_dict().get("license") if card else None
        return found if isinstance(found, str) else None
    return None


def push_files(name: str, files: Mapping[str, Path | bytes]) -> str:
    """Uploads files in one commit to a model repository; returns its address.

    A repository that does not exist is made, and is private.

    Raises:
        UsageError: it cannot be made or written; the message says why and what to do.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path, content)
        for path, content in sorted(files.items())
    ]
    try:
        made = api.create_repo(name, private=True, exist_ok=True)
        api.create_commit(name, operations, commit_message="Upload by jlora")
    except Exception as error:  # as in `hub_folder`
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{name}: cannot be uploaded to the hub: {reason[0]}; {_LOG_IN} with a token "
            "that may write there"
        ) from error
    return str(made)


# Once a run, so that data to train on and to evaluate on are of one commit.
@functools.cache
def list_data_set(name: str) -> DataSetFiles:
    """Returns the files of a data set: owner/name, or owner/name@revision.

    If the hub does not answer, as it last was.

    Raises:
        UsageError: it cannot be listed; the message says why and what to do.
    """
    import huggingface_hub

    # A commit is the name of its folder in the hub's cache.
    commit = hub_folder(name, ["README.md"], kind="dataset").name
    repository = name.partition("@")[0]
    kept = jlora_cache() / "hub" / f"{repository.replace('/', '--')}@{commit}.json"
    if found := _read_listing(kept):
        return found
    try:
        info = huggingface_hub.HfApi().dataset_info(repository, revision=commit)
    except Exception as error:  # as above
        raise _hub_error(name, "dataset", error) from error
    card = info.card_data.to_dict() if info.card_data else {}
    files = tuple(sorted(file.rfilename for file in info.siblings or ()))
    found = DataSetFiles(commit, files, card.get("configs"))
    _write_listing(kept, found)
    return found


def data_set_files(name: str, files: Sequence[str]) -> tuple[Path, ...]:
    """Downloads files of a data set; returns their paths in the same order.

    Raises:
        UsageError: they cannot be downloaded.
    """
    folder = hub_folder(name, [glob.escape(file) for file in files], kind="dataset")
    paths = tuple(folder / file for file in files)
    if missing := [path for path in paths if not path.is_file()]:
        raise UsageError(
            f"{name}: {listing(missing, 2)} not in the hub's cache, and the hub does not "
            "answer; download the data set where there is a network"
        )
    return paths


def jlora_cache() -> Path:
    """Returns the folder for what jlora keeps between runs: $JLORA_CACHE or ~/.cache/jlora."""
    return Path(os.environ.get("JLORA_CACHE") or Path.home() / ".cache" / "jlora")


def _read_listing(path: Path) -> DataSetFiles | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text())
        return DataSetFiles(stored["commit"], tuple(stored["files"]), stored["configs"])
    return None


def _write_listing(path: Path, found: DataSetFiles) -> None:
    """Keeps a listing for when the hub does not answer; nothing is lost without it."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(found)))
        temporary.replace(path)


def _hub_error(name: str, kind: Kind, error: Exception) -> UsageError:
    """Returns the error for a hub id: why it cannot be fetched, and what to do."""
    from huggingface_hub import constants, errors

    repository, _, revision = name.partition("@")
    status = getattr(getattr(error, "response", None), "status_code", None)
    # No connection, and not in the cache; the cause says why.
    is_unreachable = isinstance(error, errors.LocalEntryNotFoundError)
    what = "data set" if kind == "dataset" else "model or adapter"
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repository}"
    cause = (is_unreachable and error.__cause__) or error
    first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    if isinstance(error, errors.GatedRepoError):
        reason = f"it is gated: ask for access at {page}, then {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"{page} has no revision {revision}; leave it out for the newest"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = (
            f"the hub has no {what} of that name, or a private one; correct the name, or "
            f"for a private one {_LOG_IN}"
        )
    elif status in (401, 403):
        reason = f"the hub refuses access ({first}); {_LOG_IN}"
    elif constants.HF_HUB_OFFLINE:
        reason = (
            "HF_HUB_OFFLINE keeps it from being fetched, and it is not whole in the hub's "
            f"cache; where there is a network, run `hf download {repository}"
            f"{' --repo-type dataset' * (kind == 'dataset')}`"
        )
    elif is_unreachable or (status or 0) >= 500:
        reason = (
            f"the hub ({constants.ENDPOINT}) does not answer: {first}; try again later, "
            "or give a local folder"
        )
    else:
        reason = f"it cannot be fetched from the hub: {first}"
    return UsageError(f"{name}: no such local path{nearest_path(name)}; {reason}")
