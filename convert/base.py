"""Converted bases: one Orbax tree per part of the model, so that one layer is in memory.

A base folder holds config.json, tokenizer and template files, `params/<part>/` and
jlora.json, which says where the model came from and the digest of every leaf.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.names import Params, all_names
from convert.safetensors import Spec, atomic_folder
from convert.source import (
    Dtype,
    Source,
    check_names,
    parse_config,
    read_as,
    read_json,
    read_side_files,
    set_leaf,
)
from jlora.checkpoint import leaf_digest, restore_tree, save_tree
from jlora.errors import CorruptError, UnsupportedError

SCHEMA_VERSION = 1
# A line of about 200 bytes per leaf: room for a model of a thousand layers.
MAX_RECORD_BYTES = 16 << 20
_DTYPES = ("float32", "float16", "bfloat16")


def write_base(source: Source, out: Path, dtype: Dtype, overwrite: bool) -> str:
    """Writes a converted base and returns its content digest.

    Raises:
        UsageError: `out` cannot be made or holds something else.
        CorruptError: a NaN, an infinity, or a value that does not fit the dtype.
        ResourceError: the disk is full.
    """
    leaves: dict[str, dict[str, Any]] = {}
    with atomic_folder(out, overwrite, source.location) as folder:
        for part, paths in _parts(list(source.tensors)).items():
            tree: Params = {}
            for path in paths:
                array = np.ascontiguousarray(read_as(source, path, dtype))
                leaves[path] = {
                    "dtype": array.dtype.name,
                    "shape": list(array.shape),
                    "sha256": leaf_digest(array),
                }
                set_leaf(tree, path, array)
            save_tree(folder / "params" / part, tree)
        for name, data in source.files.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        digest = content_digest({k: leaf["sha256"] for k, leaf in leaves.items()})
        record = {
            "schema": SCHEMA_VERSION,
            "content_digest": digest,
            "provenance": source.provenance,
            "leaves": leaves,
        }
        _write_json(folder / "config.json", source.hf_config)
        _write_json(folder / "jlora.json", record)
    return digest


def content_digest(leaf_digests: Mapping[str, str]) -> str:
    """Returns one sha256 over all leaves, independent of time and place.

    A leaf's own digest covers its shape, dtype and bytes.
    """
    lines = (f"{path} {digest}\n" for path, digest in sorted(leaf_digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def _parts(paths: list[str]) -> dict[str, list[str]]:
    """Groups params paths by what is written together: layers.0, norm, ..."""
    parts: dict[str, list[str]] = {}
    for path in paths:
        first, second, *_ = path.split("/")
        part = f"{first}.{second}" if first == "layers" else first
        parts.setdefault(part, []).append(path)
    return parts


def open_base(folder: Path) -> Source:
    """Returns the model of a converted base; digests are compared as leaves are read.

    Raises:
        UnsupportedError: written by another schema of jlora.
        CorruptError: a missing or damaged file, or one that does not fit the others.
    """
    record = read_json(folder, "jlora.json", MAX_RECORD_BYTES)
    if record.get("schema") != SCHEMA_VERSION:
        raise UnsupportedError(
            f"{folder}: a base of schema {record.get('schema')!r}; this jlora reads "
            f"schema {SCHEMA_VERSION}; convert the model again"
        )
    hf_config = read_json(folder, "config.json")
    config = parse_config(hf_config, f"{folder}/")
    tensors, digests = _recorded_leaves(folder, record)
    expected = {name.path: name.shape for name in all_names(config)}
    found = {path: spec.shape for path, spec in tensors.items()}
    check_names(f"{folder / 'jlora.json'}", found, expected)
    part_of = {
        path: part for part, paths in _parts(list(expected)).items() for path in paths
    }

    @functools.lru_cache(maxsize=1)
    def read_part(part: str) -> Params:
        return restore_tree(folder / "params" / part)

    def read(path: str) -> np.ndarray:
        array: Any = read_part(part_of[path])
        for key in path.split("/"):
            array = array.get(key) if isinstance(array, dict) else None
        if array is None or leaf_digest(array) != digests[path]:
            raise CorruptError(
                f"{folder}: {path} is damaged (its digest differs from the one in "
                "jlora.json); convert the model again"
            )
        return array

    return Source(
        kind="base",
        location=folder,
        config=config,
        hf_config=hf_config,
        tensors={path: tensors[path] for path in expected},
        read=read,
        files=read_side_files(folder),
        provenance={
            **record.get("provenance", {}),
            "content_digest": content_digest(digests),
        },
    )


def _recorded_leaves(
    folder: Path, record: dict[str, Any]
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Returns the specs and digests that jlora.json lists."""
    where = folder / "jlora.json"
    leaves = record.get("leaves")
    if not isinstance(leaves, dict):
        raise CorruptError(f"{where}: leaves is not an object")
    specs, digests = {}, {}
    for path, leaf in leaves.items():
        valid = (
            isinstance(leaf, dict)
            and leaf.get("dtype") in _DTYPES
            and isinstance(leaf.get("sha256"), str)
            and isinstance(leaf.get("shape"), list)
        )
        if not valid:
            raise CorruptError(f"{where}: {path}: expected dtype, shape and sha256")
        specs[path] = Spec(tuple(leaf["shape"]), np.dtype(jnp.dtype(leaf["dtype"])))
        digests[path] = leaf["sha256"]
    if content_digest(digests) != record.get("content_digest"):
        raise CorruptError(f"{where}: content_digest does not fit the leaves' digests")
    return specs, digests
