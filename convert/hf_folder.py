"""Hugging Face folders as a `Source`: which files count, and whether they agree.

The index decides, else model.safetensors; nothing else is ever opened. Names, shapes
and dtypes are compared with config.json before a byte of weights is read.
"""

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from convert.blocks import Index, read_box, whole
from convert.checks import check_names, first_non_finite
from convert.files import (
    INDEX,
    SINGLE,
    inside_folder,
    read_json,
    read_side_files,
    reading,
)
from convert.names import Name, all_names
from convert.refusals import (
    ADAPTER,
    META,
    refuse_other_models,
    refuse_other_weights,
    refuse_quantised,
)
from convert.safetensors import Entry, Spec, read_bytes, read_header
from convert.source import Source, parse_config
from jlora.config import LlamaConfig, unused_keys
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing

MAX_INDEX_BYTES = 4 << 20  # a Llama of a thousand layers takes 1 MB
_MAX_NAME_BYTES = 255  # of most file systems
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_log = logging.getLogger(__name__)


def open_hf(folder: Path, provenance: dict[str, Any]) -> Source:
    """Returns the model of a Hugging Face folder.

    Raises:
        UsageError: not a model folder.
        UnsupportedError: not a plain Llama in safetensors.
        CorruptError: files that are damaged or contradict each other.
    """
    hf_config, config = read_config(folder)
    unused = unused_keys(hf_config)
    if unused:
        _log.info("%s: keys of config.json that are not used: %s", folder, unused)
    entries = _find_tensors(folder)
    names = {name.path: name for name in all_names(config)}
    stored = _match(folder, entries, config, list(names.values()))
    _check_dtype(folder, hf_config, {stored[n.key].dtype for n in names.values()})

    def read(path: str, box: Index | None = None) -> np.ndarray:
        name = names[path]
        box = whole(name.shape) if box is None else box
        in_file = box[::-1] if name.transposed else box
        return read_checked(
            stored[name.key], name.key, in_file, transposed=name.transposed
        )

    return Source(
        kind="hf",
        location=folder,
        config=config,
        hf_config=hf_config,
        tensors={
            path: Spec(name.shape, stored[name.key].dtype)
            for path, name in names.items()
        },
        read=read,
        files=read_side_files(folder),
        provenance=provenance,
        weights=tuple(sorted({entry.file for entry in entries.values()})),
    )


def read_checked(entry: Entry, key: str, box: Index, *, transposed: bool) -> np.ndarray:
    """Returns a box of a stored tensor, or its transpose; warns if all of it is zero.

    Raises:
        CorruptError: a NaN or an infinity, or the file became shorter.
    """
    where = f"{entry.file}: tensor {key!r}"
    non_zero = False

    def check(block: np.ndarray, first: int) -> None:
        nonlocal non_zero
        index = first_non_finite(block)
        if index is not None:
            raise CorruptError(
                f"{where}: {block[index]} at {[index[0] + first, *index[1:]]}; the file "
                "is damaged, use another copy"
            )
        non_zero = non_zero or bool(block[:1].any() or block.any())

    with reading(entry.file):
        array = read_box(
            entry.file,
            entry.offset,
            entry.shape,
            entry.dtype,
            box,
            transposed=transposed,
            check=check,
        )
    if array is None:
        raise CorruptError(f"{entry.file}: cut while it was read")
    if array.ndim == 2 and not non_zero:
        _log.warning("%s: every value is zero", where)
    return array


def _check_dtype(
    folder: Path, hf_config: dict[str, Any], stored: set[np.dtype[Any]]
) -> None:
    """Warns if config.json names a dtype that no tensor has; the tensors are believed."""
    declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
    found = sorted(str(dtype) for dtype in stored)
    if declared is not None and declared not in found:
        _log.warning(
            "%s: config.json says dtype %s, the tensors are %s",
            folder,
            declared,
            ", ".join(found),
        )


def read_config(folder: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """Returns config.json as found, and the architecture it describes.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_hf`.
    """
    _require_config(folder)
    hf_config = read_json(folder, "config.json")
    return hf_config, parse_config(hf_config, f"{folder}/")


def _require_config(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if (folder / "params.json").exists():
        raise UnsupportedError(f"{folder}: params.json without config.json is {META}")
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder}: {ADAPTER}")
    if (folder / "checkpoints").is_dir():
        raise UsageError(
            f"{folder}: a run folder, which holds an adapter, not a model; give the base "
            "model here and this folder as the adapter"
        )
    raise UsageError(f"{folder}: holds no config.json, so it is not a model folder")


def _find_tensors(folder: Path) -> dict[str, Entry]:
    """Returns every stored tensor: the index decides, else model.safetensors."""
    if (folder / INDEX).exists():
        return _read_index(folder)
    if (folder / SINGLE).exists():
        return read_header(inside_folder(folder, SINGLE))
    files = sorted(path.name for path in folder.iterdir())
    if any(_SHARD.fullmatch(name) for name in files):
        raise CorruptError(
            f"{folder}: safetensors shards without {INDEX}; download it as well"
        )
    refuse_other_weights(folder, files)
    raise UsageError(f"{folder}: holds no weights; expected {SINGLE} or {INDEX}")


def _read_index(folder: Path) -> dict[str, Entry]:
    index = read_json(folder, INDEX, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"{folder / INDEX}: expected a non-empty weight_map")
    refuse_quantised(f"{folder / INDEX}", weight_map)
    refuse_other_models(f"{folder / INDEX}", weight_map)
    bad = sorted(
        {repr(name) for name in weight_map.values() if not _is_plain_name(name)}
    )
    if bad:
        raise CorruptError(
            f"{folder / INDEX}: not plain .safetensors file names: {listing(bad)}"
        )
    shards = sorted(set(weight_map.values()))
    problems = []
    missing = sorted({*shards} - set(_existing(folder, shards)) | _gaps(shards))
    if missing:
        problems.append(f"missing files: {listing(missing)}")
    entries: dict[str, Entry] = {}
    for shard in _existing(folder, shards):
        tensors = read_header(inside_folder(folder, shard))
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
    """Returns names that the numbering of the shards implies and that are not there.

    A few of each numbering: a wild total, or many of them, must not fill the memory.
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
        _log.warning(
            "%s: total_size is %s, the tensors take %d bytes",
            folder / INDEX,
            declared,
            total,
        )


def _match(
    folder: Path, entries: dict[str, Entry], config: LlamaConfig, names: list[Name]
) -> dict[str, Entry]:
    """Returns the stored tensor of every HF key; all mismatches are raised at once."""
    refuse_quantised(str(folder), entries)
    refuse_other_models(str(folder), entries)
    stored = {k: v for k, v in entries.items() if not k.endswith("rotary_emb.inv_freq")}
    if not any(key.startswith("model.") for key in stored):  # saved as a LlamaModel
        stored = {
            key if key.startswith("lm_head.") else f"model.{key}": entry
            for key, entry in stored.items()
        }
    head = stored.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_names(
        str(folder),
        {key: entry.shape for key, entry in stored.items()},
        {name.key: name.hf_shape for name in names},
    )
    if head is not None and not _same_bytes(head, stored["model.embed_tokens.weight"]):
        raise CorruptError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight; if both are meant, set tie_word_embeddings to "
            "false in config.json"
        )
    return stored


def _same_bytes(a: Entry, b: Entry, chunk: int = 16 << 20) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(
        np.array_equal(
            read_bytes(a.file, a.offset + i, min(chunk, a.nbytes - i)),
            read_bytes(b.file, b.offset + i, min(chunk, a.nbytes - i)),
        )
        for i in range(0, a.nbytes, chunk)
    )
