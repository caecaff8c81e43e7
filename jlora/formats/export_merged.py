"""Writes the merged model of base and adapter as a Hugging Face folder, tensor by tensor."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import CorruptError
from jlora.formats.digests import leaf_digest
from jlora.formats.hf.export_config import export_config
from jlora.formats.model_files import INDEX, SINGLE
from jlora.formats.model_source import Dtype, ModelSource, stored_dtype
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_embeddings import INPUT, changed_embeddings
from jlora.formats.peft.adapter_keys import EMBED_PATH
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.plain_lora import initial_factors
from jlora.formats.safetensors_file import (
    Spec,
    read_header,
    read_tensor,
    write_safetensors,
)
from jlora.formats.tensor_checks import first_non_finite
from jlora.formats.tensor_names import Name, all_names, module_name
from jlora.lora.adapter_tree import HEAD
from jlora.lora.merging import merge_module, merge_tied_head

MAX_SHARD_BYTES = 5_000_000_000


def write_merged(
    source: ModelSource, adapter: Adapter, folder: Path, dtype: Dtype
) -> list[str]:
    """Writes the merged model into an existing folder and reads every tensor back.

    Tensors are merged one at a time. Only replaced embeddings, and a head that is no longer
    tied, stay in memory.

    Returns:
        Lines for the user about what was written.

    Raises:
        CorruptError: a merged value is not finite or does not fit the dtype, or the disk
            gives back something else than was written.
    """
    merged = MergedModel(source, adapter, dtype)
    names = {name.key: name for name in merged.names}
    specs = {
        key: Spec(name.hf_shape, merged.dtype_of(name)) for key, name in names.items()
    }
    digests: dict[str, str] = {}

    def read(key: str) -> np.ndarray:
        array = merged.read(names[key])
        digests[key] = leaf_digest(array)
        return array

    shards = plan_shards(specs)
    for file, keys in shards.items():
        write_safetensors(folder / file, {key: specs[key] for key in keys}, read)
    sizes: Counter[str] = Counter()
    for spec in specs.values():
        sizes[spec.dtype.name] += spec.nbytes
    total, main_dtype = sizes.total(), sizes.most_common(1)[0][0]
    if len(shards) > 1:
        weight_map = {key: file for file, keys in shards.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
    for name, data in source.files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    _read_back(folder, list(shards), digests)
    document = export_config(source.hf_config, source.config, main_dtype)
    if merged.config != source.config:  # the base's file may leave out these defaults
        document["tie_word_embeddings"] = merged.config.tie_word_embeddings
        document["vocab_size"] = merged.config.vocab_size
    _write_json(folder / "config.json", document)
    quantized = (
        f"merged onto {source.location} as it is dequantised from {source.quantize}; give "
        "the original model as --model to merge onto its weights"
    )
    return [
        *([quantized] if source.quantize != "none" else []),
        f"merged {len(adapter.tensors)} of {len(specs)} tensors into "
        f"{total:,} bytes of {main_dtype} in {len(shards)} file(s)",
        f"read back {len(digests)} tensors: all as written",
    ]


class MergedModel:
    """Base and adapter, merged one tensor at a time when it is read."""

    def __init__(self, source: ModelSource, adapter: Adapter, dtype: Dtype) -> None:
        """Checks that the adapter fits, and whether input and output embedding stay tied."""
        self._source, self._adapter = source, adapter
        self._dtype: Dtype = dtype
        placement = place_adapter(adapter, source.config)
        self._leaves = placement.leaves
        self._embeddings = changed_embeddings(
            adapter,
            placement.embeddings,
            {path: source.read(path) for path in placement.embeddings},
        )
        self.config = placement.config
        self._head = self._untied_head() if self.config.tie_word_embeddings else None
        if self._head is not None:
            self.config = replace(self.config, tie_word_embeddings=False)
        self.names: list[Name] = all_names(self.config)
        """All tensors of the result."""

    def dtype_of(self, name: Name) -> np.dtype[Any]:
        """Returns the dtype that a tensor is stored in."""
        path = name.path if name.path in self._source.tensors else INPUT
        return stored_dtype(self._source.tensors[path], self._dtype)

    def read(self, name: Name) -> np.ndarray:
        """Returns one tensor of the result in HF's layout and in `dtype_of`.

        Raises:
            CorruptError: a value is not finite or does not fit the dtype.
        """
        path, _, leaf = name.path.rpartition("/")
        if name.path not in self._source.tensors:
            assert self._head is not None  # otherwise the name would not be in `names`
            _check_finite(name, self._head, self._head)
            return name.to_params(self._head)
        base = self._read_base(name.path)
        leaves = {leaf: base, **self._adapter_leaves(path, base)}
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            result = merge_module(leaves, self.dtype_of(name))[leaf]
            if result is not base and first_non_finite(result) is not None:
                _check_finite(name, merge_module(leaves, np.float32)[leaf], result)
        return name.to_params(result)

    def _read_base(self, path: str) -> np.ndarray:
        if path in self._embeddings:
            return self._embeddings[path]
        return self._source.read(path)

    def _adapter_leaves(self, path: str, weight: np.ndarray) -> dict[str, Any]:
        name = module_name(path)
        factors = initial_factors(self._adapter, name, weight)
        arrays = {leaf: np.asarray(array) for leaf, array in factors.items()}
        return self._leaves.get(name, {}) | arrays

    def _untied_head(self) -> np.ndarray | None:
        """Returns the kernel of a tied head; None if it still equals the embedding."""
        embedding = self._read_base(INPUT)
        return merge_tied_head(
            {"embedding": embedding, **self._adapter_leaves(EMBED_PATH, embedding)},
            self._adapter_leaves(HEAD, embedding.T),
            stored_dtype(self._source.tensors[INPUT], self._dtype),
        )


def _check_finite(name: Name, exact: np.ndarray, rounded: np.ndarray) -> None:
    """Refuses a tensor that is not finite, and says whether merging or rounding made it so."""
    index = first_non_finite(rounded)
    if index is None:
        return
    hf_index = list(index[::-1] if name.transposed else index)
    where = f"{name.key}: {exact[index]} at {hf_index}"
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


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
