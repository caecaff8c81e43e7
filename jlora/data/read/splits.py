"""Finds the splits of a data set by the names of its files, as Hugging Face's datasets does."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from jlora.errors import UsageError, listing

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# Which of the splits is read: the first of these.
TO_TRAIN, TO_EVALUATE = (TRAIN,), (VALIDATION, TEST, TRAIN)
_KEYWORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "dev", "val"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
# The keyword is a word of the name: these letters, or an end, are around it.
_WORD = {
    split: re.compile(rf"(^|[-._ 0-9])({'|'.join(words)})([-._ 0-9]|$)")
    for split, words in _KEYWORDS.items()
}
# How the hub stores what `push_to_hub` uploads; a split may have any name there.
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")

_JSON_ENDINGS = tuple(
    name + compression
    for name in (".jsonl", ".ndjson", ".json")
    for compression in ("", ".gz", ".zst")
)
_TABLE_ENDINGS = tuple(
    name + compression
    for name in (".csv", ".tsv")
    for compression in ("", ".gz", ".zst")
)
DATA_ENDINGS = (
    ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; all but the last two also .gz "
    "or .zst"
)


def files_by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns {split: data files} of a folder; all are to train on if none is named.

    Args:
        names: relative paths of all its files.
    """
    top = data_names([name for name in names if "/" not in name])
    nested = data_names([name for name in names if "/" in name])
    if top:
        nested = [name for name in nested if tells_split(name.partition("/")[0])]
    splits = group_by_split([*top, *nested])
    if not choose_split(splits, (TRAIN,)):
        told = {name for names in splits.values() for name in names}
        untold = top or [name for name in nested if name.startswith("data/")]
        if rest := [name for name in untold if name not in told]:
            splits[TRAIN] = rest
    return splits


def data_names(names: Sequence[str]) -> list[str]:
    """Returns the names of data files; of tables only if there are no others."""
    metadata = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
    endings = (*_JSON_ENDINGS, ".parquet", ".arrow")
    rows = [
        name
        for name in names
        if name.endswith(endings) and name.rpartition("/")[2] not in metadata
    ]
    return rows or [name for name in names if name.endswith(_TABLE_ENDINGS)]


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns {split: names} of relative paths; names that tell no split are left out.

    Raises:
        UsageError: a name that tells several splits.
    """
    names = list(names)
    splits: dict[str, list[str]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            splits.setdefault(shard[1], []).append(name)
    if splits:
        return splits
    for name in names:
        path = PurePosixPath(name)
        found = _splits_of(*path.parts[:-1]) or _splits_of(path.name)
        if len(found) > 1:
            raise UsageError(
                f"{name} is of the splits {listing(found)} by its name; give the files "
                "themselves or a glob, for data.train and data.eval"
            )
        if found:
            splits.setdefault(found[0], []).append(name)
    return splits


def choose_split(splits: Mapping[str, object], wanted: Iterable[str]) -> str | None:
    """Returns the first of the splits that is one of `wanted`, by its name or a keyword."""
    for split in wanted:
        if split in splits:
            return split
        named = [name for name in splits if name in _KEYWORDS[split]]
        if named:
            return named[0]
    return None


def tells_split(name: str) -> bool:
    """Returns whether a folder's or file's name tells a split."""
    return bool(_splits_of(name))


def _splits_of(*parts: str) -> list[str]:
    return [
        split
        for split, word in _WORD.items()
        if any(word.search(part) for part in parts)
    ]
