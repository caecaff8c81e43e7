"""Finds the data files behind what the user gave: files, folders, globs, weights."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.config.strict_json import parse_json_object
from jlora.errors import (
    CorruptError,
    UnsupportedError,
    UsageError,
    listing,
    nearest_path,
)

_JSON_ENDINGS = tuple(
    name + compression
    for name in (".jsonl", ".ndjson", ".json")
    for compression in ("", ".gz", ".zst")
)
DataPaths = str | Path | Sequence[str] | Mapping[str, float]
"""One path, several, or {path: passes per epoch}."""


@dataclass(frozen=True)
class DataSource:
    """One of the given paths and its files, which have the same format."""

    name: str
    """The path as the user gave it."""
    files: tuple[Path, ...]
    weight: float = 1.0
    """Passes over the source per epoch."""
    ignored: tuple[str, ...] = ()
    """Names of the other files in a folder."""


def find_data_sources(given: DataPaths) -> list[DataSource]:
    """Returns the sources in the given order, the files of each sorted by name.

    Raises:
        UsageError: nothing there, a path given twice, or a weight out of range.
        UnsupportedError: a Hugging Face data-set folder of an old version.
        CorruptError: a Hugging Face data-set folder whose files are missing.
    """
    weights = {str(given): 1.0} if isinstance(given, str | Path) else given
    if not isinstance(weights, Mapping):
        names = [str(name) for name in weights]
        if double := [name for name in names if names.count(name) > 1]:
            raise UsageError(
                f"{double[0]} is given twice; to train on it more often give weights: "
                f"{{{double[0]}: 2}}"
            )
        weights = dict.fromkeys(names, 1.0)
    if not weights:
        raise UsageError("no data is named; give a file, a folder or a glob")
    return [_find_source(name, weight) for name, weight in weights.items()]


def _find_source(name: str, weight: float) -> DataSource:
    if not 0 < weight <= 1000:
        raise UsageError(
            f"{name}: the weight {weight} is not above 0 and at most 1000; a weight of "
            "2 shows each record twice per epoch, one of 0.5 half of the records"
        )
    path = Path(name)
    if path.is_dir():
        files, ignored = _list_folder(path)
        return DataSource(name, files, weight, ignored)
    if not path.exists() and glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))
        files = tuple(file for file in found if file.is_file())
        if not files:
            raise UsageError(f"{name}: no file matches")
        return DataSource(name, files, weight)
    if not path.exists():
        raise UsageError(f"{path}: no such file{nearest_path(name)}")
    if not path.is_file():
        raise UsageError(
            f"{path}: no records; it is a device or a pipe, and jlora reads files "
            "(more than once); write the records to a file"
        )
    return DataSource(name, (path,), weight)


def _list_folder(path: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Returns the data files of a folder, and the names of its other files."""
    if (path / "dataset_dict.json").is_file():
        return _list_folder(_training_split(path))
    if (path / "state.json").is_file():
        return _saved_files(path), ()
    names = sorted(
        file.name
        for file in path.iterdir()
        if file.is_file() and not file.name.startswith(".")
    )
    data = [
        name
        for name in names
        if name.endswith((*_JSON_ENDINGS, ".parquet", ".arrow"))
        and name not in ("dataset_info.json", "dataset_infos.json")  # metadata
    ]
    if not data:
        inside = sorted(item.name for item in path.iterdir() if item.is_dir())
        hint = f"; it has the folders {listing(inside)}" if inside else ""
        raise UsageError(
            f"{path} is a folder with no data files (.jsonl, .ndjson, .json, .parquet, "
            f".arrow, the first three also .gz or .zst){hint}"
        )
    ignored = tuple(name for name in names if name not in data)
    return tuple(path / name for name in data), ignored


def _training_split(path: Path) -> Path:
    """Returns the folder of split `train` of a saved Hugging Face `DatasetDict`."""
    splits = _read_object(path / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or "train" not in splits:
        raise UsageError(
            f"{path} holds the splits {splits} and none is named train; "
            f"name one of its folders, such as {path / 'NAME'}"
        )
    return path / "train"


def _saved_files(path: Path) -> tuple[Path, ...]:
    """Returns the files of a saved Hugging Face `Dataset`, in its order."""
    state = _read_object(path / "state.json")
    if state.get("_indices_data_files"):
        raise UnsupportedError(
            f"{path} is a selection of rows that an old version of datasets saved; "
            "load it and save it again with a new one"
        )
    try:
        names = [str(entry["filename"]) for entry in state.get("_data_files") or ()]
    except (TypeError, KeyError) as error:
        raise CorruptError(f"{path / 'state.json'}: no list _data_files") from error
    missing = [
        name for name in names if Path(name).name != name or not (path / name).is_file()
    ]
    if missing or not names:
        raise CorruptError(
            f"{path / 'state.json'} names files that are not in the folder: "
            f"{listing(missing) or '(none at all)'}"
        )
    return tuple(path / name for name in names)


def _read_object(path: Path) -> dict[str, Any]:
    return parse_json_object(path.read_bytes(), str(path))
