"""A PEFT adapter folder, run folder or hub id -> a checked `Adapter`.

Source: PEFT 0.21 `utils/save_and_load.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import (
    CorruptError,
    UnsupportedError,
    UsageError,
    listing,
    nearest,
    warn,
)
from jlora.formats.model_files import inside_folder, read_json
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_config import read_config
from jlora.formats.peft.adapter_keys import (
    EMBED_PATH,
    EXAMPLE,
    adapter_key,
    convert_layout,
    parse_key,
    unwrapped,
)
from jlora.formats.peft.other_adapters import (
    is_mlx,
    read_mlx,
    refuse_other_adapter,
    refuse_other_keys,
)
from jlora.formats.safetensors_file import Entry, read_header, read_tensor
from jlora.formats.tensor_checks import first_non_finite
from jlora.formats.tensor_names import module_path
from jlora.hub import hub_folder, is_hub_id, nothing_there
from jlora.lora.adapter_tree import HEAD
from jlora.lora.target_modules import is_saved

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_EMBEDDINGS = {EMBED_PATH: "embedding", HEAD: "kernel"}
_DIMENSIONS = {"lora_magnitude": 1, "bias": 1, "base_bias": 1}
# Leaf as `parse_key` names it -> (key, place in the file).
_Entries = dict[str, tuple[str, Entry]]


def find_adapter(folder: str | Path) -> Path | None:
    """Returns the PEFT folder that `folder` is or contains; a hub id is downloaded.

    Args:
        folder: a PEFT folder, a run folder or a hub id (owner/name, or
            owner/name@revision).

    Returns:
        None for a run that only has checkpoints.

    Raises:
        UsageError: neither an adapter nor a run.
    """
    name, folder = str(folder), Path(folder)
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        return None
    refuse_other_adapter(folder)
    if is_hub_id(name):
        return find_adapter(hub_folder(name, ["adapter_*", "*/adapter_*"]))
    if not folder.is_dir():
        raise nothing_there(name, "an adapter folder, a run folder")
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = f"; did you mean its subfolder {listing(named)}?" if named else ""
    raise UsageError(f"{folder}: neither {CONFIG} nor a run's checkpoints in it{hint}")


def read_adapter(folder: str | Path) -> Adapter:
    """Reads a PEFT folder and checks every value.

    Tensors become float32, except whole untrained embeddings: those keep their dtype.

    Raises:
        UnsupportedError: a PEFT feature that jlora does not have.
        CorruptError: damaged, incomplete or contradicting files.
    """
    folder = Path(folder)
    settings = read_json(folder, CONFIG)
    if is_mlx(settings, folder):
        return read_mlx(settings, folder)
    config = read_config(settings, f"{folder / CONFIG}")
    where = folder / WEIGHTS
    if not where.exists():
        if (folder / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{folder}: adapter_model.bin is a pickle, which is never opened as it "
                "may run code; load the adapter with PEFT where you trust it and save "
                "it again with save_pretrained(folder)"
            )
        raise CorruptError(f"{folder}: {CONFIG} without {WEIGHTS}; copy both")
    header = read_header(inside_folder(folder, WEIGHTS))
    refuse_other_keys(header, where)
    found = _by_module(header, where)
    names = _leaf_names(found, config, where)
    tensors = {
        module_path(module): _read_leaves(module_path(module), entries, names, where)
        for module, entries in found.items()
    }
    if config.ensure_weight_tying and HEAD not in tensors:  # the base is not tied
        config = replace(config, ensure_weight_tying=False)
    pairs = [leaves for leaves in tensors.values() if "lora_A" in leaves]
    if not pairs:
        raise CorruptError(f"{where}: no tensors of an adapter")
    if len(pairs) == len(tensors) and not any(x["lora_B"].any() for x in pairs):
        warn(f"{where}: every lora_B is zero, so it changes nothing")
    has_own_embeddings = any(
        module_path(module) in _EMBEDDINGS
        and "weight" in entries
        and not _is_saved(config, module)
        for module, entries in found.items()
    )
    return Adapter.make(config, tensors, folder, has_own_embeddings)


def _by_module(header: dict[str, Entry], where: Path) -> dict[str, _Entries]:
    """Groups the file's tensors by HF module name, and lists all that is wrong at once."""
    found: dict[str, _Entries] = {}
    problems, strange = [], []
    if header and all(0 in entry.shape for entry in header.values()):
        raise CorruptError(
            f"{where}: saved without gathering, every tensor is empty, as DeepSpeed "
            "ZeRO-3 leaves them; gather the weights and save the adapter again"
        )
    plain = unwrapped(header)
    for key, entry in sorted(header.items()):
        parsed = parse_key(plain[key])
        if parsed is None:
            strange.append(key)
            continue
        module, leaf = parsed
        entries = found.setdefault(module, {})
        if leaf in entries:
            problems.append(f"two tensors for {module}.{leaf}")
        entries[leaf] = (key, entry)
    if strange:
        known = [key for entries in found.values() for key, _ in entries.values()]
        problems.append(
            f"keys that are not of the form {EXAMPLE}: "
            + listing([f"{key}{nearest(key, known)}" for key in strange], 2)
        )
    for module, entries in found.items():
        problems += _shape_problems(module, entries)
    if problems or not found:
        raise CorruptError(f"{where}: {listing(problems) or 'no tensors'}")
    return found


def _shape_problems(module: str, entries: _Entries) -> list[str]:
    """Returns what is missing or misshapen in one module, without knowing the base."""
    pair = [leaf for leaf in ("lora_A", "lora_B") if leaf in entries]
    if len(pair) == 1 or (not pair and "lora_magnitude" in entries):
        missing = {"lora_A", "lora_B"} - set(pair)
        path = module_path(module)
        return [f"{adapter_key(path, leaf)} is missing" for leaf in sorted(missing)]
    problems = []
    for leaf, (key, entry) in entries.items():
        shape, expected = list(entry.shape), _DIMENSIONS.get(leaf, 2)
        if leaf == "weight" and module.endswith("norm"):
            expected = 1
        if len(shape) != expected:
            form = ["vector", "matrix"][expected - 1]
            problems.append(f"{key} {shape} is not a {form}")
    if not problems and pair:
        (key_a, a), (key_b, b) = entries["lora_A"], entries["lora_B"]
        if a.shape[0] != b.shape[1]:
            problems.append(
                f"{key_a} {list(a.shape)} and {key_b} {list(b.shape)} have different "
                "ranks"
            )
    return problems


def _leaf_names(
    found: dict[str, _Entries], config: LoraConfig, where: Path
) -> dict[str, str]:
    """Returns {key: leaf of the tree}; refuses weights that the settings do not mention."""
    names = {
        key: _tree_leaf(module, leaf, config, entries)
        for module, entries in found.items()
        for leaf, (key, _) in entries.items()
    }
    strange = [key for key, name in names.items() if name is None]
    if strange:
        raise CorruptError(
            f"{where}: {listing(strange)}: weights of the base, and the settings do not "
            f"say that they were trained (modules_to_save={config.modules_to_save}, "
            f"bias={config.bias!r}); train or save the adapter again"
        )
    return {key: name for key, name in names.items() if name is not None}


def _read_leaves(
    path: str, entries: _Entries, names: Mapping[str, str], where: Path
) -> dict[str, np.ndarray]:
    """Reads the leaves of one module, in jlora's layout."""
    leaves = {}
    for key, entry in entries.values():
        name = names[key]
        array = _read(entry, f"{where}: {key}")
        if name not in _EMBEDDINGS.values():
            array = array.astype(np.float32)
        array = convert_layout(name, array)
        if name in leaves and not np.array_equal(leaves[name], array):
            raise CorruptError(
                f"{where}: {key} and another tensor of the file are both "
                f"{path}/{name}, and differ; save the adapter again"
            )
        leaves[name] = array
    return leaves


def _tree_leaf(
    module: str, leaf: str, config: LoraConfig, siblings: Collection[str]
) -> str | None:
    """Returns the leaf of the tree that a leaf of `parse_key` is.

    None if the settings do not explain why the file has it.
    """
    path, saved = module_path(module), _is_saved(config, module)
    embedding = _EMBEDDINGS.get(path)  # no other untrained weight may be in the file
    trained = f"trained_{embedding or ('scale' if path.endswith('norm') else 'kernel')}"
    match leaf:
        case "bias" | "base_bias":
            return "trained_bias" if saved or config.bias != "none" else None
        case "weight":
            return trained if saved else embedding
        case "copy":  # PEFT writes it beside the weight, in a resized vocabulary
            return trained if saved and "weight" in siblings else None
        case "base_weight":
            return embedding if saved or "lora_A" in siblings else None
        case _:
            return leaf


def _is_saved(config: LoraConfig, module: str) -> bool:
    # PEFT writes a head that is tied to a saved embedding under both names.
    tied = module_path(module) == HEAD and config.ensure_weight_tying
    return is_saved(config, module) or (tied and is_saved(config, EMBED_PATH))


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
