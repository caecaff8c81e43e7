"""Merges an adapter into its base and writes a Hugging Face model folder.

One tensor is in memory at a time. What was written is read back and compared before the
folder appears.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL
from jlora.errors import CorruptError
from jlora.formats.atomic_folder import atomic_folder, check_space, check_target
from jlora.formats.digests import leaf_digest
from jlora.formats.hf.hf_config import export_config, reader_notes
from jlora.formats.model_files import INDEX, SINGLE
from jlora.formats.model_source import Dtype, ModelSource, size_as, stored_dtype
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_embeddings import changed_tables
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD
from jlora.formats.peft.attach_adapter import Adapter, check_fit, start_of
from jlora.formats.safetensors_file import (
    Spec,
    read_header,
    read_tensor,
    write_safetensors,
)
from jlora.formats.tensor_checks import first_non_finite
from jlora.formats.tensor_names import Name, all_names, module_name
from jlora.formats.verify_export import check
from jlora.loading import open_adapter
from jlora.lora.merging import merge_module, merge_tied_head

MAX_SHARD_BYTES = 5_000_000_000
# Above this, checking the logits costs minutes; the digests are compared anyway.
MAX_VERIFIED_PARAMETERS = 1_000_000_000
_TABLE = f"{EMBEDDING}/embedding"


@dataclass(frozen=True)
class Arguments:
    """Merge an adapter into its base model and write a Hugging Face folder."""

    out: str = field(metadata=POSITIONAL)
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
    source = open_model(arguments.model)
    adapter = open_adapter(arguments.adapter)
    check_target(out, arguments.overwrite, adapter.location)
    check_fit(adapter, source.config)
    check_space(out, size_as(source, arguments.dtype))
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
    for note in reader_notes(source.config):
        print(note)
    print(f"{out} written in {time.perf_counter() - start:.1f} s")


def write_merged(
    source: ModelSource, adapter: Adapter, folder: Path, dtype: Dtype
) -> list[str]:
    """Writes the merged model into an existing folder and reads every tensor back.

    Returns:
        Lines that say what was written.

    Raises:
        CorruptError: a merged value is not finite or does not fit the dtype, or the disk
            gives back something else than was written.
    """
    merger = Merger(source, adapter, dtype)
    names = {name.key: name for name in merger.names}
    specs = {
        key: Spec(name.hf_shape, merger.dtype_of(name)) for key, name in names.items()
    }
    digests: dict[str, str] = {}

    def read(key: str) -> np.ndarray:
        array = merger.read(names[key])
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
    document = export_config(source.hf_config, source.config, main_dtype)
    # Said in so many words, as the base may say it by leaving it out.
    if merger.config != source.config:
        document["tie_word_embeddings"] = merger.config.tie_word_embeddings
        document["vocab_size"] = merger.config.vocab_size
    _write_json(folder / "config.json", document)
    return [
        f"merged {len(adapter.tensors)} of {len(specs)} tensors into "
        f"{total:,} bytes of {main_dtype} in {len(shards)} file(s)",
        f"read back {len(digests)} tensors: all as written",
    ]


class Merger:
    """The merged model, tensor by tensor."""

    def __init__(self, source: ModelSource, adapter: Adapter, dtype: Dtype) -> None:
        """Checks that the adapter fits, and whether it parts a tied head from its table."""
        self._source, self._adapter = source, adapter
        self._dtype: Dtype = dtype
        self._fit = check_fit(adapter, source.config)
        self._tables = changed_tables(
            adapter,
            self._fit.tables,
            {path: source.read(path) for path in self._fit.tables},
        )
        self.config = self._fit.config
        if self.config.tie_word_embeddings and self._tied_head() is not None:
            self.config = replace(self.config, tie_word_embeddings=False)
        self.names: list[Name] = all_names(self.config)
        """All tensors of the result."""

    def dtype_of(self, name: Name) -> np.dtype[Any]:
        """Returns the dtype a tensor is stored in."""
        path = name.path if name.path in self._source.tensors else _TABLE
        return stored_dtype(self._source.tensors[path], self._dtype)

    def read(self, name: Name) -> np.ndarray:
        """Returns one tensor of the result in HF's layout, rounded once to its dtype.

        Raises:
            CorruptError: a value is not finite or does not fit the dtype.
        """
        path, _, leaf = name.path.rpartition("/")
        dtype = self.dtype_of(name)
        if name.path not in self._source.tensors:
            head = self._tied_head()
            assert head is not None  # or there would be no such name
            _check_finite(name, head, head)
            return name.to_params(head)
        base = self._base(name.path)
        leaves = {leaf: base, **self._leaves(path, base)}
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            result = merge_module(leaves, dtype)[leaf]
            if result is not base and first_non_finite(result) is not None:
                _check_finite(name, merge_module(leaves, np.float32)[leaf], result)
        return name.to_params(result)

    def _base(self, path: str) -> np.ndarray:
        return self._tables[path] if path in self._tables else self._source.read(path)

    def _leaves(self, path: str, weight: np.ndarray) -> dict[str, Any]:
        """Returns the adapter's leaves of a module; their start, if they have one."""
        leaves = dict(self._fit.leaves.get(module_name(path), {}))
        if "lora_A" in leaves and self._adapter.takes_start_out and path != EMBEDDING:
            start = start_of(self._adapter, module_name(path), weight)
            leaves |= {leaf: np.asarray(array) for leaf, array in start.items()}
        return leaves

    def _tied_head(self) -> np.ndarray | None:
        """Returns the kernel of the head, if it differs from the merged table."""
        table = self._base(_TABLE)
        dtype = stored_dtype(self._source.tensors[_TABLE], self._dtype)
        return merge_tied_head(
            {"embedding": table, **self._leaves(EMBEDDING, table)},
            self._leaves(HEAD, table.T),
            dtype,
        )


def _check_finite(name: Name, exact: np.ndarray, rounded: np.ndarray) -> None:
    """Says whether the merge or its rounding made what is not finite."""
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
    raise SystemExit(run_command(main, Arguments))
