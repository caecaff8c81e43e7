"""A PEFT adapter folder, run folder or hub id -> a checked `Adapter`.

The file is long because every fault of a key has its own sentence.

Source: PEFT 0.21 `utils/save_and_load.py`.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing, nearest
from jlora.formats.hub import hub_folder, is_hub_id
from jlora.formats.model_files import inside_folder, read_json
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_config import read_config, warn
from jlora.formats.peft.adapter_keys import (
    EMBEDDING,
    FORM,
    HEAD,
    adapter_key,
    parse_key,
    to_leaf,
)
from jlora.formats.safetensors_file import Entry, read_header, read_tensor
from jlora.formats.tensor_checks import first_non_finite
from jlora.formats.tensor_names import module_path
from jlora.lora.target_modules import is_saved

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TABLES = {EMBEDDING: "embedding", HEAD: "kernel"}
_DIMENSIONS = {"lora_magnitude": 1, "bias": 1, "base_bias": 1}


def find_adapter(folder: str | Path) -> Path | None:
    """Returns the folder in PEFT's form that `folder` is, holds as a run, or names.

    A hub id (owner/name or owner/name@revision) is fetched.

    Returns:
        None for a run that has checkpoints only.

    Raises:
        UsageError: neither an adapter nor a run.
    """
    name, folder = str(folder), Path(folder)
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        return None
    if not folder.exists() and is_hub_id(name):
        return find_adapter(hub_folder(name, ["adapter_*", "*/adapter_*"]))
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; give an adapter or run folder, or a hub id "
            "(owner/name)"
        )
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = f"; did you mean its subfolder {listing(named)}?" if named else ""
    raise UsageError(f"{folder}: neither {CONFIG} nor a run's checkpoints in it{hint}")


def read_adapter(folder: str | Path) -> Adapter:
    """Returns the adapter of a PEFT folder, every value checked; all in float32.

    Raises:
        UnsupportedError: a PEFT feature that jlora does not have.
        CorruptError: damaged, incomplete or contradicting files.
    """
    folder = Path(folder)
    document = read_json(folder, CONFIG)
    config = read_config(document, f"{folder / CONFIG}")
    if not (folder / WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{folder}: adapter_model.bin is a pickle, which is never opened as it "
                "may run code; load the adapter with PEFT where you trust it and save "
                "it again with save_pretrained(folder)"
            )
        raise CorruptError(f"{folder}: {CONFIG} without {WEIGHTS}; copy both")
    where = folder / WEIGHTS
    entries = _by_module(read_header(inside_folder(folder, WEIGHTS)), where)
    _refuse_unexplained(entries, config, where)
    tensors = {
        module_path(name): _leaves(name, found, config, where)
        for name, found in entries.items()
    }
    if config.ensure_weight_tying and HEAD not in tensors:  # of an untied base
        config = replace(config, ensure_weight_tying=False)
    pairs = [leaves for leaves in tensors.values() if "lora_A" in leaves]
    if not pairs:
        raise CorruptError(f"{where}: no tensors of an adapter")
    if not any(leaves["lora_B"].any() for leaves in pairs) and len(pairs) == len(
        tensors
    ):
        warn(f"{where}: every lora_B is zero, so it changes nothing")
    return Adapter.make(config, tensors, folder, _has_loose_tables(entries, config))


Found = dict[str, dict[str, tuple[str, Entry]]]


def _by_module(entries: dict[str, Entry], where: Path) -> Found:
    """Returns {HF module name: {leaf: (key, entry)}}; all that is wrong with keys at once."""
    found: Found = {}
    problems, strange = [], []
    for key, entry in sorted(entries.items()):
        parsed = parse_key(key)
        if parsed is None:
            strange.append(key)
            continue
        module, leaf = parsed
        leaves = found.setdefault(module, {})
        if leaf in leaves:
            problems.append(f"two tensors for {module}.{leaf}")
        leaves[leaf] = (key, entry)
    if strange:
        known = [key for leaves in found.values() for key, _ in leaves.values()]
        problems.append(
            f"keys that are not of the form {FORM}: "
            + listing([f"{key}{nearest(key, known)}" for key in strange])
        )
    for module, leaves in found.items():
        problems += _problems(module, leaves)
    if problems or not found:
        raise CorruptError(f"{where}: {listing(problems) or 'no tensors'}")
    return found


def _problems(module: str, leaves: dict[str, tuple[str, Entry]]) -> list[str]:
    path = module_path(module)
    pair = {leaf: leaves[leaf] for leaf in ("lora_A", "lora_B") if leaf in leaves}
    if len(pair) == 1 or (not pair and "lora_magnitude" in leaves):
        missing = [leaf for leaf in ("lora_A", "lora_B") if leaf not in pair]
        return [f"{adapter_key(path, leaf)} is missing" for leaf in missing]
    bad = []
    for leaf, (key, entry) in leaves.items():
        shape, expected = list(entry.shape), _DIMENSIONS.get(leaf, 2)
        if leaf == "weight" and module.endswith("norm"):
            expected = 1
        if len(shape) != expected:
            bad.append(f"{key} {shape} is not a {['vector', 'matrix'][expected - 1]}")
    if not bad and pair:
        (key_a, a), (key_b, b) = pair["lora_A"], pair["lora_B"]
        if a.shape[0] != b.shape[1]:
            bad.append(
                f"{key_a} {list(a.shape)} and {key_b} {list(b.shape)} have different "
                "ranks"
            )
    return bad


def _has_loose_tables(found: Found, config: LoraConfig) -> bool:
    """Returns whether tables come that the adapter neither adapts nor trains."""
    return any(
        module_path(module) in _TABLES
        and "weight" in leaves
        and not _is_saved(config, module)
        for module, leaves in found.items()
    )


def _refuse_unexplained(found: Found, config: LoraConfig, where: Path) -> None:
    strange = [
        key
        for module, leaves in found.items()
        for leaf, (key, _) in leaves.items()
        if _leaf_name(module, leaf, config, leaves) is None
    ]
    if strange:
        raise CorruptError(
            f"{where}: {listing(strange)}: weights of the base, and the settings do not "
            f"say that they were trained (modules_to_save={config.modules_to_save}, "
            f"bias={config.bias!r}); train or save the adapter again"
        )


def _leaves(
    module: str, found: dict[str, tuple[str, Entry]], config: LoraConfig, where: Path
) -> dict[str, np.ndarray]:
    """Returns the leaves of one module, in jlora's layout."""
    leaves = {}
    for leaf, (key, entry) in found.items():
        name = _leaf_name(module, leaf, config, found)
        assert name is not None  # or it was refused
        array = _read(entry, f"{where}: {key}")
        if name not in _TABLES.values():
            array = array.astype(np.float32)
        array = to_leaf(name, array)
        if name in leaves and not np.array_equal(leaves[name], array):
            raise CorruptError(
                f"{where}: {key} and another tensor of the file are both "
                f"{module_path(module)}/{name}, and differ; save the adapter again"
            )
        leaves[name] = array
    return leaves


def _leaf_name(
    module: str, leaf: str, config: LoraConfig, beside: Collection[str]
) -> str | None:
    """Returns the name in the tree of what a key holds; None for no known purpose."""
    path = module_path(module)
    saved = _is_saved(config, module)
    if leaf.endswith("bias"):
        return "trained_bias" if saved or config.bias != "none" else None
    if leaf == "copy" and not (saved and "weight" in beside):
        return None  # PEFT writes it beside the weight, in a resized vocabulary
    if leaf in ("weight", "copy"):
        return f"trained_{_weight_name(path)}" if saved else _TABLES.get(path)
    if leaf == "base_weight":
        return _TABLES.get(path) if saved or "lora_A" in beside else None
    return leaf


def _is_saved(config: LoraConfig, module: str) -> bool:
    # PEFT writes the head that is tied to a saved embedding under both names.
    twin = module_path(module) == HEAD and config.ensure_weight_tying
    return is_saved(config, module) or (twin and is_saved(config, EMBEDDING))


def _weight_name(path: str) -> str:
    if path == EMBEDDING:
        return "embedding"
    return "scale" if path.endswith("norm") else "kernel"


def _read(entry: Entry, where: str) -> np.ndarray:
    if entry.dtype == np.float64:
        raise UnsupportedError(f"{where}: float64; save the adapter in float32")
    array: Any = read_tensor(entry)
    index = first_non_finite(array)
    if index is not None:
        raise CorruptError(
            f"{where}: {array[index]} at {list(index)}; train or copy the adapter again"
        )
    return array
