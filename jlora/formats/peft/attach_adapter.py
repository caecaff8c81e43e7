"""LoRA adapters on a model: laid beside its weights, from PEFT folders and runs.

Reading and writing share one value, `Adapter`, which is checked when it is made: ranks agree
with the settings, so a scaling can be trusted. Reading refuses what PEFT lets pass with a
warning while it serves the base model.

Source: PEFT 0.21 `utils/save_and_load.py`, `tuners/lora/layer.py`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_base import plain, start_of
from jlora.formats.peft.adapter_embeddings import changed_tables
from jlora.formats.peft.adapter_fit import check_fit, model_config
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD
from jlora.formats.peft.adapter_reader import find_adapter, read_adapter
from jlora.formats.peft.adapter_writer import save_adapter, write_adapter
from jlora.formats.tensor_names import Params, module_name, module_path
from jlora.lora.adapter_tree import modules, with_adapter
from jlora.lora.initialisation import add_lora
from jlora.lora.lora_dense import norm_squared, weight_of
from jlora.lora.merging import without_start

__all__ = [
    "Adapter",
    "attach_adapter",
    "check_fit",
    "find_adapter",
    "model_config",
    "plain",
    "read_adapter",
    "save_adapter",
    "start_adapter",
    "start_of",
    "write_adapter",
]


def _check_trainable(adapter: Adapter, config: LlamaConfig) -> None:
    """Refuses what jlora uses but does not train on.

    Raises:
        UnsupportedError: naming it, and what to do.
    """
    if adapter.config.bias != "none":
        raise UnsupportedError(
            f"{adapter.location}: bias={adapter.config.bias!r}; jlora uses trained biases "
            "but does not train them, so merge this one first (convert.to_hf) and train "
            "on the merged model"
        )
    rows = model_config(adapter, config).vocab_size
    if rows != config.vocab_size:
        raise UnsupportedError(
            f"{adapter.location}: brings tables for {rows} tokens, the base has "
            f"{config.vocab_size}; training writes an adapter for the base as it is, so "
            "merge this one first (convert.to_hf) and train on the merged model"
        )


def attach_adapter(
    params: Params,
    config: LlamaConfig,
    adapter: Adapter,
    *,
    train: bool = False,
) -> Params:
    """Returns the tree with an adapter's leaves beside its weights; nothing is copied.

    The tables of an adapter with another vocabulary replace those of the base; the model
    is then that of `model_config`.

    Args:
        params: the base model.
        config: its architecture.
        adapter: its tensors and settings.
        train: whether training goes on. A start that PEFT took out of the base (PiSSA,
            OLoRA) then becomes leaves, and the base stays as it is.

    Raises:
        UnsupportedError, CorruptError: as `check_fit`.
    """
    if train:
        _check_trainable(adapter, config)
    fit = check_fit(adapter, config)
    base = {name: dict(leaves) for name, leaves in modules(params).items()}
    tables = {path: _leaf(base, path) for path in fit.tables}
    if any(isinstance(table, Tracer) for table in tables.values()):
        tables = {}  # only shapes are wanted, and those are the base's
    replaced: dict[str, dict[str, Any]] = {}
    for path, array in changed_tables(adapter, fit.tables, tables).items():
        name, leaf = _name_and_leaf(path)
        base[name][leaf] = _placed_like(array, base[name][leaf])
        replaced[name] = {leaf: base[name][leaf]}
    laid = {}
    for name, arrays in fit.leaves.items():
        leaves = {leaf: jnp.asarray(array) for leaf, array in arrays.items()}
        weight: Any = _weight(base, name)
        if "lora_A" in leaves and adapter.takes_start_out and name != _TABLE:
            leaves |= _start_or_rest(adapter, name, base, train=train)
            weight = leaves.get("kernel", weight)  # less its start, if it is replaced
        if "lora_magnitude" in leaves:
            leaves["lora_norm_squared"] = norm_squared(weight)
        laid[name] = replaced.pop(name, {}) | leaves
    return with_adapter(params, laid | replaced)


def start_adapter(
    base: Params,
    config: LlamaConfig,
    lora: LoraConfig,
    seed: int,
    adapter: Adapter | None,
) -> tuple[Params, LoraConfig]:
    """Returns (base with an adapter to train, its settings); of shapes, shapes.

    Args:
        base: arrays, or their shapes only.
        config: of the base.
        lora: of a new adapter; of a continued one, its dropout and the base's name.
        seed: of a new adapter's start.
        adapter: to continue from, or None.
    """
    if adapter is None:
        start = partial(add_lora, config=lora, key=jax.random.key(seed))
    else:
        lora = replace(
            adapter.config,
            lora_dropout=lora.lora_dropout,
            base_model_name_or_path=lora.base_model_name_or_path,
            revision=lora.revision,
        )
        start = partial(attach_adapter, config=config, adapter=adapter, train=True)
    is_real = isinstance(jax.tree.leaves(base)[0], jax.Array)
    return start(base) if is_real else jax.eval_shape(start, base), lora


_TABLE = module_name(EMBEDDING)


def _name_and_leaf(path: str) -> tuple[str, str]:
    module, _, leaf = path.rpartition("/")
    return module_name(module), leaf


def _leaf(base: dict[str, Params], path: str) -> Any:
    name, leaf = _name_and_leaf(path)
    return base[name][leaf]


def _weight(base: dict[str, Params], name: str) -> Any:
    """Returns a module's kernel or embedding; for a tied head, the table's transpose."""
    leaves = base.get(name, {})
    if name == HEAD and "kernel" not in leaves:
        return base[_TABLE]["embedding"].T
    return weight_of(leaves)


def _placed_like(array: np.ndarray, like: Any) -> Any:
    return jax.device_put(array.astype(like.dtype), like.sharding)


def _start_or_rest(
    adapter: Adapter, name: str, base: dict[str, Params], *, train: bool
) -> dict[str, Any]:
    """Returns the start's leaves, or the kernel that PEFT leaves without the start."""
    kernel = _weight(base, name)
    start = start_of(adapter, name, kernel)
    if train or "kernel" not in base.get(name, {}):
        return start
    a, b = (np.asarray(start[leaf]) for leaf in ("lora_A0", "lora_B0"))
    scaling = adapter.scalings[module_path(name)]
    rest = without_start(np.asarray(kernel), a, b, scaling)
    return {"kernel": _placed_like(rest, kernel)}
