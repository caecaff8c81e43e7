"""Data sets of the Hugging Face hub: which files a configuration and a split of one are.

A name is owner/name, owner/name@revision, and after either :configuration or
:configuration/split. Configurations are those of the README's YAML (`configs`). Without it
there is one, `default`, with the splits that the names of the files tell, and each folder
is a configuration, too.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.data.read.data_source import DataSource
from jlora.data.read.splits import (
    DATA_ENDINGS,
    TRAIN,
    choose_split,
    data_names,
    files_by_split,
)
from jlora.errors import CorruptError, UsageError, listing, nearest
from jlora.hub import DataSetFiles, data_set_files, is_hub_id, list_data_set

_DEFAULT = "default"
_Splits = dict[str, list[str]]


def is_data_id(given: str) -> bool:
    """Returns whether a string means a data set of the hub, and nothing local."""
    return is_hub_id(given.partition(":")[0])


def find_hub_source(given: str, wanted: Sequence[str]) -> DataSource:
    """Downloads a split of a data set; of several the one named, else the first wanted.

    Raises:
        UsageError: no such data set, configuration or split, or it cannot be fetched.
        CorruptError: the README's configurations are not as `datasets` reads them.
    """
    name, _, part = given.partition(":")
    config, _, split = part.partition("/")
    found = list_data_set(name)
    hub = f"{name.partition('@')[0]}@{found.commit}"
    config, splits = _configuration(name, config, found)
    if not splits:
        raise UsageError(
            f"{name}: its configuration {config} has no data files ({DATA_ENDINGS}); the "
            f"hub may have converted it: try {name.partition('@')[0]}@refs/convert/parquet"
        )
    if split and split not in splits:
        raise UsageError(
            f"{given}: no split {split!r}{nearest(split, splits)}; {name}:{config} has the "
            f"splits {listing(list(splits))}"
        )
    chosen = split or choose_split(splits, wanted)
    if chosen is None:
        raise UsageError(
            f"{given}: has the splits {listing(list(splits))} and none is named "
            f"{' or '.join(wanted)}; name one, such as {name}:{config}/{next(iter(splits))}"
        )
    others = {key: tuple(map(Path, files)) for key, files in splits.items()}
    del others[chosen]
    return DataSource(
        given,
        data_set_files(hub, splits[chosen]),
        split=chosen,
        other_splits={} if split else others,
        hub=hub,
    )


def _configuration(name: str, wanted: str, found: DataSetFiles) -> tuple[str, _Splits]:
    """Returns the name of a configuration, and its files by split."""
    files = [file for file in found.files if not _is_hidden(file)]
    configs = _declared(name, found.configs)
    if not configs:
        if wanted in ("", _DEFAULT):
            return _DEFAULT, files_by_split(files)
        inside = [file for file in files if file.startswith(f"{wanted}/")]
        if not inside:
            folders = sorted({file.partition("/")[0] for file in files if "/" in file})
            raise UsageError(
                f"{name}:{wanted}: the data set has no configurations, and no folder "
                f"{wanted!r}{nearest(wanted, folders)}; leave it out, or name a folder"
            )
        return wanted, _in_folder(wanted, inside)
    defaults = [key for key, one in configs.items() if one.get("default")]
    defaults += [key for key in configs if key == _DEFAULT or len(configs) == 1]
    config = wanted or next(iter(defaults), "")
    if config not in configs:
        asked = (
            f"no configuration {wanted!r}{nearest(wanted, configs)}; " if wanted else ""
        )
        raise UsageError(
            f"{name}: {asked}it has the configurations {listing(list(configs))}; name one, "
            f"such as {name}:{next(iter(configs))}"
        )
    return config, _files_of(f"{name}:{config}", configs[config], files)


def _is_hidden(file: str) -> bool:
    return any(part.startswith((".", "__")) for part in file.split("/"))


def _declared(name: str, configs: Any) -> dict[str, dict[str, Any]]:
    """Returns {name: configuration} of the README's YAML."""
    if not configs:
        return {}
    if not isinstance(configs, list) or not all(isinstance(x, dict) for x in configs):
        raise CorruptError(
            f"{name}: the configs in its README are no list of configurations; download "
            "the files and give a folder"
        )
    return {str(one.get("config_name", _DEFAULT)): one for one in configs}


def _files_of(where: str, config: dict[str, Any], files: list[str]) -> _Splits:
    """Returns the files of a declared configuration by split."""
    folder = str(config.get("data_dir") or "").strip("./")
    patterns = config.get("data_files")
    if patterns is None:
        inside = [file for file in files if not folder or file.startswith(f"{folder}/")]
        return _in_folder(folder, inside)
    splits: _Splits = {}
    for split, pattern in _patterns(where, patterns):
        path = f"{folder}/{pattern}" if folder else pattern
        pattern = path.removeprefix("./")
        found = data_names([file for file in files if _matches(pattern, file)])
        if not found:
            raise UsageError(
                f"{where}: its README names {path}, which no data file ({DATA_ENDINGS}) is; "
                "download the files that you want and give a folder"
            )
        splits[split] = [*splits.get(split, []), *found]
    return splits


def _in_folder(folder: str, files: list[str]) -> _Splits:
    if not folder:
        return files_by_split(files)
    inside = [file.removeprefix(f"{folder}/") for file in files]
    return {
        split: [f"{folder}/{file}" for file in found]
        for split, found in files_by_split(inside).items()
    }


def _patterns(where: str, data_files: Any) -> list[tuple[str, str]]:
    """Returns the (split, pattern) of `data_files`, in each form that `datasets` takes."""
    if isinstance(data_files, dict):
        data_files = [{"split": k, "path": v} for k, v in data_files.items()]
    pairs = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = TRAIN, entry
        if isinstance(entry, dict):
            split, paths = entry.get("split", TRAIN), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str) or not isinstance(split, str):
                raise CorruptError(
                    f"{where}: the data_files in its README are neither paths nor splits "
                    "with paths; download the files and give a folder"
                )
            pairs.append((split, path))
    return pairs


def _matches(pattern: str, path: str) -> bool:
    """Returns whether a path is one of a pattern's; * and ? stay inside a folder.

    In time that grows with the product of both lengths, whatever a stranger's pattern is.
    """
    tokens = re.findall(r"\*\*/|\*\*|.", pattern, re.DOTALL)

    def reached(states: set[tuple[int, bool]]) -> set[tuple[int, bool]]:
        """Adds what follows without a character."""
        for place, token in enumerate(tokens):
            if token.startswith("*") and (place, False) in states:
                states.add((place + 1, False))
        return states

    # The place in `tokens`, and whether it is within the folders of a "**/".
    now = reached({(0, False)})
    for char in path:
        following: set[tuple[int, bool]] = set()
        for place, _ in now:
            token = tokens[place] if place < len(tokens) else ""
            if token == "**/":
                following.add((place, True))
                if char == "/":
                    following.add((place + 1, False))
            elif token == "**" or (token == "*" and char != "/"):
                following.add((place, False))
            elif token in (char, "?") and (token != "?" or char != "/"):
                following.add((place + 1, False))
        now = reached(following)
    return (len(tokens), False) in now
