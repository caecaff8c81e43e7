"""Adapters out, of trees and runs, as PEFT folders.

Source: PEFT 0.21 `utils/save_and_load.py`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.hub import is_hub_id
from jlora.formats.peft.adapter import Adapter, Tensors, takes_start_out, without_starts
from jlora.formats.peft.adapter_config import config_to_write
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD, adapter_key, to_leaf
from jlora.formats.peft.adapter_reader import CONFIG, WEIGHTS
from jlora.formats.safetensors_file import Spec, write_safetensors
from jlora.formats.tensor_names import Params, module_name, module_path
from jlora.lora.adapter_tree import is_trainable, linear_modules, modules
from jlora.lora.lora_dense import WEIGHTS as BASE_WEIGHTS


def adapter_of(
    params: Params,
    config: LoraConfig,
    location: Path,
    base_model_name_or_path: str | None = None,
) -> Adapter:
    """Returns a tree's adapter, plain LoRA whatever it started from.

    Args:
        params: a tree with an adapter; the base's leaves may be absent, but for those
            that a trained copy takes its dtype from.
        config: what it was trained with.
        location: for messages.
        base_model_name_or_path: where readers find the base; None: as the settings say.
    """
    found = modules(params)
    tensors: Tensors = {}
    starts: Tensors = {}
    for name, leaves in found.items():
        path = module_path(name)
        for leaf, array in leaves.items():
            if is_trainable(leaf):
                tensors.setdefault(path, {})[leaf] = np.ascontiguousarray(array)
            elif leaf in ("lora_A0", "lora_B0"):
                starts.setdefault(path, {})[leaf] = np.asarray(array)
    if base_model_name_or_path is not None:
        config = _with_base(config, base_model_name_or_path)
    adapter = Adapter.make(config, tensors, location)
    return without_starts(adapter, starts) if takes_start_out(config) else adapter


def _with_base(config: LoraConfig, name: str) -> LoraConfig:
    """Returns the settings with the base named as PEFT does, its revision apart."""
    repository, _, revision = name.partition("@")
    if revision and is_hub_id(name) and not Path(name).exists():
        return replace(config, base_model_name_or_path=repository, revision=revision)
    return replace(config, base_model_name_or_path=name)


def write_adapter(
    params: Params,
    lora_config: LoraConfig,
    folder: str | Path,
    base_model_name_or_path: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a tree's adapter as a PEFT folder; the same input gives the same bytes.

    Args:
        params: a tree with an adapter; see `adapter_of`.
        lora_config: what it was trained with.
        folder: appears whole or not at all.
        base_model_name_or_path: where readers find the base; None: as the settings say.
        overwrite: replace an adapter that is there.

    Raises:
        UsageError: the tree has no adapter, or the folder cannot be written.
    """
    where = Path(folder)
    if not any(is_trainable(leaf) for x in modules(params).values() for leaf in x):
        raise UsageError(f"{where}: nothing to write, the parameters have no adapter")
    adapter = adapter_of(params, lora_config, where, base_model_name_or_path)
    save_adapter(
        adapter,
        where,
        linears=list(linear_modules(params)),
        dtypes=_dtypes(params),
        overwrite=overwrite,
    )


def _dtypes(params: Params) -> dict[str, Any]:
    """Returns {params path of a module: dtype of the base's weights}, where it is known."""
    found = modules(params)
    dtypes = {}
    for name, leaves in found.items():
        base = [x for key, x in leaves.items() if key in (*BASE_WEIGHTS, "scale")]
        if base:
            dtypes[module_path(name)] = np.dtype(base[0].dtype)
    if HEAD not in dtypes and EMBEDDING in dtypes:
        dtypes[HEAD] = dtypes[EMBEDDING]
    return dtypes


def save_adapter(
    adapter: Adapter,
    folder: Path,
    *,
    linears: list[str] | None = None,
    dtypes: dict[str, Any] | None = None,
    overwrite: bool = False,
    source: Path | None = None,
) -> None:
    """Writes an adapter as a PEFT folder that every PEFT since 0.6 reads.

    Args:
        adapter: what to write; `plain`.
        folder: appears whole or not at all.
        linears: HF names of the base's linear layers, if they are known.
        dtypes: params path -> dtype that whole weights are written in; float32 where
            the base's is not known, which readers round as they load.
        overwrite: replace an adapter that is there.
        source: what the adapter comes from; must not lie inside `folder`.
    """
    if adapter.takes_start_out:
        raise UnsupportedError(
            f"{adapter.location}: init_lora_weights="
            f"{adapter.config.init_lora_weights!r} has to become plain LoRA first; use "
            "python -m convert.to_peft"
        )
    pairs = adapter.pairs
    names = {module_name(path): path for path in pairs}
    settings = config_to_write(
        adapter.config,
        {name: pairs[path]["lora_A"].shape[1] for name, path in names.items()},
        {name: adapter.scalings[path] for name, path in names.items()},
        linears,
    )
    text = json.dumps(settings, indent=2, sort_keys=True)
    arrays = _to_write(adapter, dtypes or {})
    specs = {key: Spec(array.shape, array.dtype) for key, array in arrays.items()}
    with atomic_folder(folder, overwrite, source) as temporary:
        write_safetensors(temporary / WEIGHTS, specs, arrays.__getitem__)
        (temporary / CONFIG).write_text(text + "\n", "utf-8")


def _to_write(adapter: Adapter, dtypes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns {PEFT key: array in PEFT's layout}.

    Tables are written where the vocabulary is new, not where PEFT copies the base's.
    """
    tensors = {path: dict(leaves) for path, leaves in adapter.tensors.items()}
    table, head = tensors.get(EMBEDDING, {}), tensors.get(HEAD, {})
    if adapter.config.ensure_weight_tying and not head:  # PEFT has it twice
        twice = {"lora_A": "lora_B", "lora_B": "lora_A"}
        twice |= {"trained_kernel": "trained_embedding"}
        head = {new: table[old].T for new, old in twice.items() if old in table}
        tensors |= {HEAD: head} if head else {}
    arrays = {}
    for path, leaves in tensors.items():
        for leaf, array in leaves.items():
            if leaf in BASE_WEIGHTS and not adapter.resized:
                continue
            if leaf.startswith("trained_") and path in dtypes:
                array = array.astype(dtypes[path])
            key = adapter_key(path, leaf, leaves)
            arrays[key] = to_leaf(leaf, array)
    return arrays
