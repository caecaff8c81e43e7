"""Finds the data files behind what the user gave: files, folders, globs, weights."""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from jlora.config.strict_json import parse_json_object
from jlora.data.read.data_source import DataPaths, DataSource
from jlora.data.read.hub_data import find_hub_source, is_data_id
from jlora.data.read.splits import (
    DATA_ENDINGS,
    TO_TRAIN,
    TRAIN,
    choose_split,
    files_by_split,
)
from jlora.errors import (
    CorruptError,
    UnsupportedError,
    UsageError,
    listing,
)
from jlora.hub import nothing_there

_MAX_DEPTH = 4  # of folders, as in owner/name/config/split


def find_data_sources(
    given: DataPaths, splits: Sequence[str] = TO_TRAIN
) -> list[DataSource]:
    """Returns the sources in the given order, the files of each sorted by name.

    Args:
        given: files, folders, globs, and data sets of the hub.
        splits: of a folder with several splits the first of these is read.

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
    return [_find_source(name, weight, splits) for name, weight in weights.items()]


def check_disjoint(train: Sequence[DataSource], held_out: Sequence[DataSource]) -> None:
    """Raises UsageError if a file is in both, also under another name."""

    def files(sources: Sequence[DataSource]) -> dict[tuple[int, int], Path]:
        found = (file for source in sources for file in source.files)
        return {(file.stat().st_dev, file.stat().st_ino): file for file in found}

    mine, theirs = files(train), files(held_out)
    if both := [str(theirs[key]) for key in theirs if key in mine]:
        raise UsageError(
            f"{listing(both, 4)}: in data.train and in data.eval, so the model would be "
            "evaluated on what it was trained on; leave it out of one of them, or hold "
            "out a share with data.eval_fraction"
        )


def _find_source(name: str, weight: float, splits: Sequence[str]) -> DataSource:
    if not 0 < weight <= 1000:
        raise UsageError(
            f"{name}: the weight {weight} is not above 0 and at most 1000; a weight of "
            "2 shows each record twice per epoch, one of 0.5 half of the records"
        )
    path = Path(name)
    if path.is_dir():
        return replace(_read_folder(path, splits), name=name, weight=weight)
    if not path.exists() and glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))
        files = tuple(file for file in found if file.is_file())
        if not files:
            raise UsageError(f"{name}: no file matches")
        return DataSource(name, files, weight)
    if not path.exists():
        if is_data_id(name):
            return replace(find_hub_source(name, splits), weight=weight)
        raise nothing_there(name, "a file, a folder, a glob")
    if not path.is_file():
        raise UsageError(
            f"{path}: no records; it is a device or a pipe, and jlora reads files "
            "(more than once); write the records to a file"
        )
    return DataSource(name, (path,), weight)


def _read_folder(path: Path, wanted: Sequence[str]) -> DataSource:
    """Returns the files of the wanted split of a folder, or all its files if it has none."""
    if (path / "state.json").is_file():
        return DataSource("", _saved_files(path))
    names = sorted(
        file.name
        for file in path.iterdir()
        if file.is_file() and not file.name.startswith(".")
    )
    if (path / "dataset_dict.json").is_file():
        splits = {name: _saved_files(path / name) for name in _saved_splits(path)}
    else:
        splits = {
            split: tuple(path / name for name in found)
            for split, found in files_by_split([*names, *_nested(path)]).items()
        }
        if not splits:
            _raise_no_data(path)
    split = choose_split(splits, wanted)
    if split is None:
        raise UsageError(
            f"{path} holds the splits {listing(list(splits))} and none is named "
            f"{' or '.join(wanted)}; name the files of one, with a glob if there are many"
        )
    chosen = splits.pop(split)
    read = {file.name for files in (chosen, *splits.values()) for file in files}
    ignored = tuple(name for name in names if name not in read)
    return DataSource("", chosen, 1.0, ignored, split if splits else "", splits)


def _nested(path: Path) -> list[str]:
    """Returns the relative names of the files in the folders of a folder."""
    names = []
    for folder, folders, files in os.walk(path):
        here = Path(folder).relative_to(path)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        if len(here.parts) >= _MAX_DEPTH:
            folders.clear()
        names += [
            (here / name).as_posix()
            for name in sorted(files)
            if here.parts and not name.startswith(".")
        ]
    return names


def _raise_no_data(path: Path) -> NoReturn:
    inside = sorted(item.name for item in path.iterdir() if item.is_dir())
    hint = f"; it has the folders {listing(inside)}" if inside else ""
    raise UsageError(f"{path} is a folder with no data files ({DATA_ENDINGS}){hint}")


def _saved_splits(path: Path) -> list[str]:
    """Returns the names of the splits of a saved Hugging Face `DatasetDict`."""
    splits = _read_object(path / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(s, str) for s in splits):
        raise CorruptError(f"{path / 'dataset_dict.json'}: no list of splits")
    if not choose_split(dict.fromkeys(splits), (TRAIN,)):
        raise UsageError(
            f"{path} holds the splits {splits} and none is named train; "
            f"name one of its folders, such as {path / 'NAME'}"
        )
    if wrong := [name for name in splits if Path(name).name != name]:
        raise CorruptError(f"{path / 'dataset_dict.json'}: the split {wrong[0]!r}")
    return splits


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
