"""Merges an adapter into its base and writes a Hugging Face model folder.

One tensor is in memory at a time. What was written is read back and compared before the
folder appears.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_config import export_config
from convert.names import Name, all_names
from convert.peft import Adapter, check_fit, open_adapter
from convert.safetensors import (
    Spec,
    atomic_folder,
    check_target,
    read_header,
    read_tensor,
    write_safetensors,
)
from convert.source import (
    INDEX,
    SINGLE,
    Dtype,
    Source,
    first_non_finite,
    open_source,
    stored_dtype,
)
from convert.verify import check
from jlora.checkpoint import leaf_digest
from jlora.cli import run_command
from jlora.errors import CorruptError
from jlora.lora import merge_kernel

MAX_SHARD_BYTES = 5_000_000_000
# Above this, checking the logits costs minutes; the digests are compared anyway.
MAX_VERIFIED_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Arguments:
    """Merge an adapter into its base model and write a Hugging Face folder."""

    out: str
    """Folder to write; it appears whole or not at all."""
    model: str
    """Base model: converted base, HF folder, hub id (owner/name) or .gguf file."""
    adapter: str
    """PEFT adapter folder or run folder of train.py."""
    dtype: Dtype = "keep"
    """Storage of every tensor; keep: as in the base."""
    overwrite: bool = False
    """Replace OUT if it is a model folder."""
    verify: bool | None = None
    """Compare the logits of base+adapter and OUT; null: if below 1e9 parameters."""


def main(arguments: Arguments) -> None:
    """Merges, writes, reads back and prints the figures."""
    start = time.perf_counter()
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    source = open_source(arguments.model)
    adapter = open_adapter(arguments.adapter)
    check_target(out, arguments.overwrite, adapter.location)
    check_fit(adapter, source.config)
    with atomic_folder(out, arguments.overwrite, source.location) as folder:
        for line in write_merged(source, adapter, folder, arguments.dtype):
            print(line)
        if arguments.verify is None:
            size = sum(math.prod(spec.shape) for spec in source.tensors.values())
            verify = size < MAX_VERIFIED_PARAMETERS
        else:
            verify = arguments.verify
        if verify:
            print(check(source, adapter, folder))
    print(f"{out} written in {time.perf_counter() - start:.1f} s")


def write_merged(
    source: Source, adapter: Adapter, folder: Path, dtype: Dtype
) -> list[str]:
    """Writes the merged model into an existing folder and reads every tensor back.

    Returns:
        Lines that say what was written.

    Raises:
        CorruptError: a merged value is not finite or does not fit the dtype, or the disk
            gives back something else than was written.
    """
    names = {name.key: name for name in all_names(source.config)}
    specs = {
        key: Spec(name.hf_shape, stored_dtype(source.tensors[name.path], dtype))
        for key, name in names.items()
    }
    digests: dict[str, str] = {}

    def read(key: str) -> np.ndarray:
        array = _merged(source, adapter, names[key], specs[key].dtype)
        digests[key] = leaf_digest(array)
        return array

    shards = plan_shards(specs)
    for file, keys in shards.items():
        write_safetensors(folder / file, {key: specs[key] for key in keys}, read)
    total = sum(spec.nbytes for spec in specs.values())
    if len(shards) > 1:
        weight_map = {key: file for file, keys in shards.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
    for name, data in source.files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    _read_back(folder, list(shards), digests)
    main_dtype = _main_dtype(specs)
    _write_json(folder / "config.json", export_config(source, main_dtype))
    return [
        f"merged {len(adapter.tensors)} of {len(specs)} tensors into "
        f"{total:,} bytes of {main_dtype} in {len(shards)} file(s)",
        f"read back {len(digests)} tensors: all as written",
    ]


def _merged(
    source: Source, adapter: Adapter, name: Name, dtype: np.dtype[Any]
) -> np.ndarray:
    """Returns one tensor of the result in HF's layout, rounded once to `dtype`."""
    array = source.read(name.path)
    module = name.path.removesuffix("/kernel")
    adapted = name.transposed and module in adapter.tensors
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if adapted:
            pair = adapter.tensors[module]
            array = merge_kernel(
                array.astype(np.float32, copy=False),
                pair["lora_A"],
                pair["lora_B"],
                adapter.scalings[module],
            )
        result = array.astype(dtype, copy=False)
    if adapted or result is not array:  # `read` checked what is untouched
        _check_finite(name, array, result)
    return name.to_params(result)


def _check_finite(name: Name, exact: np.ndarray, rounded: np.ndarray) -> None:
    index = first_non_finite(rounded)
    if index is None:
        return
    where = (
        f"{name.key}: {exact[index]} at {list(index[:: -1 if name.transposed else 1])}"
    )
    if np.isfinite(exact[index].astype(np.float32)):
        raise CorruptError(
            f"{where} does not fit {rounded.dtype}; choose --dtype float32 or bfloat16"
        )
    raise CorruptError(
        f"{where} after the merge; the adapter is damaged or belongs to another base"
    )


def plan_shards(specs: Mapping[str, Spec]) -> dict[str, list[str]]:
    """Returns {file name: keys}: in order, each file at most MAX_SHARD_BYTES.

    A tensor above the limit gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if groups[-1] and size + spec.nbytes > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += spec.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{i:05d}-of-{count:05d}.safetensors": keys
        for i, keys in enumerate(groups, 1)
    }


def _read_back(folder: Path, files: list[str], digests: Mapping[str, str]) -> None:
    entries = {
        key: entry
        for file in files
        for key, entry in read_header(folder / file).items()
    }
    wrong = sorted(entries.keys() ^ digests.keys()) or [
        key
        for key, entry in entries.items()
        if leaf_digest(read_tensor(entry)) != digests[key]
    ]
    if wrong:
        raise CorruptError(
            f"{folder}: the disk gives back other bytes than were written for "
            f"{', '.join(wrong[:4])}; use another disk"
        )


def _main_dtype(specs: Mapping[str, Spec]) -> str:
    """Returns the dtype that most bytes have."""
    sizes: Counter[str] = Counter()
    for spec in specs.values():
        sizes[spec.dtype.name] += spec.nbytes
    return sizes.most_common(1)[0][0]


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments, positional=("out",)))
