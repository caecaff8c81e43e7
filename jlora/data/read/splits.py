"""Finds the splits of a data set by the names of its files, as Hugging Face's datasets does."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from jlora.errors import UsageError, listing

TRAIN, VALIDATION, TEST = "train", "validation", "test"
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
