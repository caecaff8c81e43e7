"""Writes the adapter of a tree of parameters, or an `Adapter`, as a PEFT folder.

Source: PEFT 0.21 `utils/save_and_load.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.peft.adapter import Adapter, Tensors
from jlora.formats.peft.adapter_config import config_to_write
from jlora.formats.peft.adapter_keys import (
    EMBED_PATH,
    TIED_COPIES,
    adapter_key,
    convert_layout,
)
from jlora.formats.peft.adapter_reader import CONFIG, WEIGHTS
from jlora.formats.peft.plain_lora import with_initial_factors
from jlora.formats.safetensors_file import Spec, write_safetensors
from jlora.formats.tensor_names import module_path
from jlora.hub import is_hub_id
from jlora.lora.adapter_tree import (
    HEAD,
    WEIGHT_LEAVES,
    Params,
    is_trainable,
    linear_modules,
    modules,
)
from jlora.lora.initialisation import needs_residual_base


def save_adapter(
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
    write_adapter_folder(
        adapter_of(params, lora_config, where, base_model_name_or_path),
        where,
        linears=list(linear_modules(params)),
        dtypes=_base_dtypes(params),
        overwrite=overwrite,
    )


def adapter_of(
    params: Params,
    config: LoraConfig,
    location: Path,
    base_model_name_or_path: str | None = None,
) -> Adapter:
    """Returns a tree's adapter, as plain LoRA if it was initialised as PiSSA or OLoRA.

    Args:
        params: a tree with an adapter; leaves of the base are not needed.
        config: what it was trained with.
        location: for messages.
        base_model_name_or_path: where readers find the base; None: as the settings say.
    """
    tensors: Tensors = {}
    initial: Tensors = {}
    for name, leaves in modules(params).items():
        path = module_path(name)
        for leaf, array in leaves.items():
            if is_trainable(leaf):
                tensors.setdefault(path, {})[leaf] = np.ascontiguousarray(array)
            elif leaf in ("lora_A0", "lora_B0"):
                initial.setdefault(path, {})[leaf] = np.asarray(array)
    if base_model_name_or_path is not None:
        config = _with_base(config, base_model_name_or_path)
    adapter = Adapter.make(config, tensors, location)
    if needs_residual_base(config):
        return with_initial_factors(adapter, initial)
    return adapter


def _with_base(config: LoraConfig, name: str) -> LoraConfig:
    """Returns the settings with the base's name; PEFT keeps a revision apart from it."""
    repository, _, revision = name.partition("@")
    if revision and is_hub_id(name):
        return replace(config, base_model_name_or_path=repository, revision=revision)
    return replace(config, base_model_name_or_path=name)


def _base_dtypes(params: Params) -> dict[str, Any]:
    """Returns {params path of a module: dtype of the base's weight}, where it is there."""
    dtypes = {
        module_path(name): np.dtype(leaf.dtype)
        for name, leaves in modules(params).items()
        for key, leaf in leaves.items()
        if key in (*WEIGHT_LEAVES, "scale")
    }
    if EMBED_PATH in dtypes:
        dtypes.setdefault(HEAD, dtypes[EMBED_PATH])
    return dtypes


def write_adapter_folder(
    adapter: Adapter,
    folder: Path,
    *,
    linears: list[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    source: Path | None = None,
) -> None:
    """Writes an adapter as a PEFT folder that every PEFT since 0.6 reads.

    Args:
        adapter: what to write, as plain LoRA.
        folder: appears whole or not at all.
        linears: HF names of all linear layers of the base, if they are known.
        dtypes: params path of a module -> dtype of its fully trained weights; others
            are written in float32.
        overwrite: replace an adapter that is there.
        source: the folder that the adapter was read from, which is not overwritten.
    """
    if needs_residual_base(adapter.config):
        raise UnsupportedError(
            f"{adapter.location}: init_lora_weights="
            f"{adapter.config.init_lora_weights!r} has to become plain LoRA first; use "
            "jlora export --to peft"
        )
    text = json.dumps(config_to_write(adapter, linears), indent=2, sort_keys=True)
    arrays = _arrays(adapter, dtypes or {})
    specs = {key: Spec(array.shape, array.dtype) for key, array in arrays.items()}
    with atomic_folder(folder, overwrite, source) as temporary:
        write_safetensors(temporary / WEIGHTS, specs, arrays.__getitem__)
        (temporary / CONFIG).write_text(text + "\n", "utf-8")


def _arrays(adapter: Adapter, dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns {PEFT key: array in PEFT's layout}."""
    tensors = dict(adapter.tensors)
    if adapter.config.ensure_weight_tying and not tensors.get(HEAD):
        embedding = tensors.get(EMBED_PATH, {})
        tensors[HEAD] = {
            leaf: embedding[other].T
            for leaf, other in TIED_COPIES.items()
            if other in embedding
        }
    arrays = {}
    for path, leaves in tensors.items():
        for leaf, array in leaves.items():
            if leaf in WEIGHT_LEAVES and not adapter.has_own_embeddings:
                continue  # a copy of the base's embedding
            if leaf.startswith("trained_") and path in dtypes:
                array = array.astype(dtypes[path])
            arrays[adapter_key(path, leaf, leaves)] = convert_layout(leaf, array)
    return arrays
