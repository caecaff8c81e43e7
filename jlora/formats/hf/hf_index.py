"""Finds the tensors of a Hugging Face folder, in one file or in shards with an index.

Only model.safetensors is opened, or the files that the index names if there is none.
"""

import itertools
import re
from pathlib import Path
from typing import Any

from jlora.config.json_fields import joined
from jlora.errors import CorruptError, JloraError, UsageError, listing, warn
from jlora.formats.model_files import INDEX, SINGLE, inside_folder, read_json
from jlora.formats.refusals import (
    refuse_other_models,
    refuse_other_weights,
    refuse_quantised,
)
from jlora.formats.safetensors_file import Entry, read_header

MAX_INDEX_BYTES = 4 << 20  # a Llama of a thousand layers takes 1 MB
_MAX_NAME_BYTES = 255  # of most file systems
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def find_tensors(folder: Path, *, quantized: bool = False) -> dict[str, Entry]:
    """Returns {HF key: tensor} of all the files with weights.

    Args:
        folder: the model.
        quantized: whether its configuration says that tensors are quantised.
    """
    if (folder / SINGLE).exists():  # which Transformers takes before an index
        _warn_of_second_model(folder)
        return read_header(inside_folder(folder, SINGLE), quantised=quantized)
    if (folder / INDEX).exists():
        return _read_index(folder, quantized)
    files = sorted(path.name for path in folder.iterdir())
    if any(_SHARD.fullmatch(name) for name in files):
        raise CorruptError(
            f"{folder}: safetensors shards without {INDEX}; download it as well"
        )
    refuse_other_weights(folder, files)
    raise UsageError(f"{folder}: holds no weights; expected {SINGLE} or {INDEX}")


def _warn_of_second_model(folder: Path) -> None:
    """Says so if shards of an index are there as well, such as of a model saved earlier."""
    try:
        shards = sorted(set(_parse_index(folder)["weight_map"].values()))
    except JloraError:  # no index, or a damaged one, which nobody needs
        return
    if others := [name for name in _existing(folder, shards) if name != SINGLE]:
        warn(
            f"{folder} holds two models: {SINGLE} was read, as Transformers does; "
            f"{INDEX} and {listing(others, 2)} were ignored"
        )


def _parse_index(folder: Path) -> dict[str, Any]:
    """Returns the index, whose weight_map has only plain file names."""
    index = read_json(folder, INDEX, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"{folder / INDEX}: expected a non-empty weight_map")
    bad = sorted(
        {repr(name) for name in weight_map.values() if not _is_plain_name(name)}
    )
    if bad:
        raise CorruptError(
            f"{folder / INDEX}: not plain .safetensors file names: {listing(bad)}"
        )
    return index


def _read_index(folder: Path, quantized: bool) -> dict[str, Entry]:
    index = _parse_index(folder)
    weight_map = index["weight_map"]
    if not quantized:
        refuse_quantised(f"{folder / INDEX}", weight_map)
    refuse_other_models(f"{folder / INDEX}", weight_map)
    shards = sorted(set(weight_map.values()))
    problems = []
    missing = sorted({*shards} - set(_existing(folder, shards)) | _gaps(shards))
    if missing:
        problems.append(f"missing files: {listing(missing)}")
    entries: dict[str, Entry] = {}
    for shard, tensors in _read_headers(
        folder, _existing(folder, shards), quantized
    ).items():
        twice = [
            f"{key} ({entries[key].file.name} and {shard})"
            for key in tensors
            if key in entries
        ]
        unlisted = sorted(key for key in tensors if key not in weight_map)
        absent = sorted(
            key
            for key, file in weight_map.items()
            if file == shard and key not in tensors
        )
        for text, keys in (
            ("tensors in two shards", twice),
            (f"tensors of {shard} that the index does not name", unlisted),
            (f"tensors the index expects in {shard}", absent),
        ):
            if keys:
                problems.append(f"{text}: {listing(keys)}")
        entries.update(tensors)
    if problems:
        raise CorruptError(
            f"{folder}: {INDEX} and the shards disagree; {'; '.join(problems)}; "
            "download the model again"
        )
    _check_total_size(folder, index, entries)
    return entries


def _read_headers(
    folder: Path, shards: list[str], quantized: bool
) -> dict[str, dict[str, Entry]]:
    """Returns {shard: its tensors}; one error names all shards that are damaged."""
    headers, problems = {}, []
    for shard in shards:
        try:
            path = inside_folder(folder, shard)
            headers[shard] = read_header(path, quantised=quantized)
        except CorruptError as error:
            problems.append(str(error))
    if problems:
        raise CorruptError(joined(problems))
    return headers


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
        and len(name.encode()) <= _MAX_NAME_BYTES
    )


def _existing(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if (folder / name).exists()]


def _gaps(shards: list[str]) -> set[str]:
    """Returns names that the numbering of the shards implies and the index does not have.

    At most 13 of each numbering, as a damaged name may imply 99,999.
    """
    present = set(shards)
    gaps: set[str] = set()
    numberings = {(m[1], m[3]) for m in filter(None, map(_SHARD.fullmatch, shards))}
    for stem, total in numberings:
        implied = (
            f"{stem}-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)
        )
        gaps.update(itertools.islice((n for n in implied if n not in present), 13))
    return gaps


def _check_total_size(
    folder: Path, index: dict[str, Any], entries: dict[str, Entry]
) -> None:
    metadata = index.get("metadata")
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in entries.values())
    if declared is not None and declared != total:
        warn(
            f"{folder / INDEX}: total_size is {declared}, the tensors take {total} bytes"
        )
