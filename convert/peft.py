"""LoRA adapters: PEFT folders and runs in, trees with adapters out, and back.

Both directions share one value, `Adapter`, which is checked when it is made: ranks agree
with the settings, so a scaling can be trusted. Reading refuses what PEFT lets pass with a
warning while it serves the base model.

Source: PEFT 0.21 `utils/save_and_load.py`, `tuners/lora/layer.py`.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from convert.names import Params, module_name, module_path
from convert.peft_adapter import Adapter, Tensors, takes_start_out, without_starts
from convert.peft_config import config_to_write
from convert.peft_fit import changed_tables, check_fit, model_config
from convert.peft_keys import EMBEDDING, HEAD, adapter_key, to_leaf
from convert.peft_read import CONFIG, WEIGHTS, find_adapter, read_adapter
from convert.safetensors import Spec, atomic_folder, write_safetensors
from convert.source import load_params, open_source
from jlora.checkpoint import newest_adapter
from jlora.config import LlamaConfig, LoraConfig
from jlora.errors import JloraError, UnsupportedError, UsageError
from jlora.lora import (
    WEIGHTS as BASE_WEIGHTS,
)
from jlora.lora import (
    is_trainable,
    join,
    linear_modules,
    modules,
    norm_squared,
    weight_of,
    with_adapter,
)
from jlora.lora_init import add_lora, initial_pair
from jlora.merge import without_start

__all__ = [
    "Adapter",
    "attach_adapter",
    "check_fit",
    "find_adapter",
    "model_config",
    "open_adapter",
    "plain",
    "read_adapter",
    "save_adapter",
    "start_adapter",
    "start_of",
    "write_adapter",
]


def open_adapter(folder: str | Path) -> Adapter:
    """Returns the adapter of a PEFT folder or hub id, or of a run: its newest checkpoint.

    Raises:
        UsageError: neither an adapter nor a run.
        UnsupportedError, CorruptError: as `read_adapter`.
    """
    found = find_adapter(folder)
    if found is not None:
        return read_adapter(found)
    config, tree, meta = newest_adapter(Path(folder))
    settings = meta["settings"]
    if takes_start_out(config):  # a checkpoint does not hold the start
        base = load_params(
            open_source(settings["model"]), dtype=settings["compute"]["base_dtype"]
        )
        tree = join(tree, add_lora(base, config, jax.random.key(settings["seed"])))
    name = config.base_model_name_or_path or settings["model"]
    return adapter_of(tree, config, Path(folder), name)


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
    adapter: str | Path | Adapter,
    *,
    train: bool = False,
) -> Params:
    """Returns the tree with an adapter's leaves beside its weights; nothing is copied.

    The tables of an adapter with another vocabulary replace those of the base; the model
    is then that of `model_config`.

    Args:
        params: the base model.
        config: its architecture.
        adapter: a PEFT folder, a run folder, or what `open_adapter` returned.
        train: whether training goes on. A start that PEFT took out of the base (PiSSA,
            OLoRA) then becomes leaves, and the base stays as it is.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_adapter`, `check_fit`.
    """
    if not isinstance(adapter, Adapter):
        adapter = open_adapter(adapter)
    if train:
        _check_trainable(adapter, config)
    fit = check_fit(adapter, config)
    base = {name: dict(leaves) for name, leaves in modules(params).items()}
    tables = {path: _leaf(base, path) for path in fit.tables}
    if any(isinstance(table, Tracer) for table in tables.values()):
        tables = {}  # only shapes are wanted, and those are the base's
    replaced: dict[str, dict[str, Any]] = {}
    for path, array in changed_tables(adapter, fit, tables).items():
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
    base: Params, config: LlamaConfig, lora: LoraConfig, seed: int, init: str | None
) -> tuple[Params, LoraConfig]:
    """Returns (base with an adapter to train, its settings); of shapes, shapes.

    Args:
        base: arrays, or their shapes only.
        config: of the base.
        lora: of a new adapter; of a continued one, its dropout and the base's name.
        seed: of a new adapter's start.
        init: PEFT adapter or run to continue from, or None.
    """
    if init is None:
        start = partial(add_lora, config=lora, key=jax.random.key(seed))
    else:
        adapter = open_adapter(init)
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


def start_of(adapter: Adapter, name: str, weight: Any) -> dict[str, Any]:
    """Returns lora_A0 and lora_B0 of a module, as PEFT derives them from its kernel."""
    path = module_path(name)
    a, b = initial_pair(
        str(adapter.config.init_lora_weights),
        weight,
        jax.random.key(0),  # which neither of the two starts draws from
        rank=adapter.tensors[path]["lora_A"].shape[1],
        scaling=adapter.scalings[path],
    )
    return {"lora_A0": a, "lora_B0": b}


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


def plain(adapter: Adapter) -> Adapter:
    """Returns the adapter as plain LoRA on the whole base, which it opens if need be.

    Raises:
        UsageError: the start of a PiSSA or OLoRA adapter cannot be found, as its base
            is not at hand.
    """
    if not adapter.takes_start_out:
        return adapter
    where = adapter.config.base_model_name_or_path
    try:
        source = open_source(where or "")
    except JloraError as error:
        raise UsageError(
            f"{adapter.location}: init_lora_weights="
            f"{adapter.config.init_lora_weights!r} needs its base, named as {where!r}, to "
            f"become plain LoRA: {error}"
        ) from error
    starts: Tensors = {}
    for path in adapter.pairs:
        if path != EMBEDDING:
            tied = path == HEAD and source.config.tie_word_embeddings
            table = f"{EMBEDDING}/embedding" if tied else f"{path}/kernel"
            weight = source.read(table)
            start = start_of(adapter, module_name(path), weight.T if tied else weight)
            starts[path] = {leaf: np.asarray(x) for leaf, x in start.items()}
    return without_starts(adapter, starts)


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
        config = replace(config, base_model_name_or_path=base_model_name_or_path)
    adapter = Adapter.make(config, tensors, location)
    return without_starts(adapter, starts) if takes_start_out(config) else adapter


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
