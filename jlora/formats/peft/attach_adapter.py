"""Puts an adapter's leaves into the tree of a model's parameters.

Source: PEFT 0.21 `tuners/lora/layer.py`.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError, listing
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_embeddings import changed_embeddings
from jlora.formats.peft.adapter_placement import adapted_config, place_adapter
from jlora.formats.peft.plain_lora import initial_factors
from jlora.formats.tensor_names import module_name, module_path
from jlora.lora.adapter_tree import Params, modules, weight_in, with_adapter
from jlora.lora.initialisation import add_lora, norm_squared
from jlora.lora.merging import placed_like, without_initial_update
from jlora.lora.target_modules import select_targets

# Settings that a run may change for an adapter that it continues.
_TAKEN = ("lora_dropout", "base_model_name_or_path", "revision")
# HF module name -> leaf -> array.
_Modules = dict[str, dict[str, Any]]


def initialise_adapter(
    base: Params,
    config: LlamaConfig,
    lora: LoraConfig,
    *,
    seed: int,
    adapter: Adapter | None,
) -> tuple[Params, LoraConfig]:
    """Returns (the base with a trainable adapter, the adapter's settings).

    Args:
        base: arrays; or `jax.ShapeDtypeStruct`s, and the result has such leaves too.
        config: architecture of the base.
        lora: settings of a new adapter; of a given one, only the dropout and the name of
            the base are used.
        seed: of a new adapter's random values.
        adapter: what to continue training, from `open_adapter`; None for a new adapter.

    Raises:
        UsageError: a setting would have no effect, as the given adapter has another.
    """
    if adapter is None:
        initialise = partial(add_lora, config=lora, key=jax.random.key(seed))
    else:
        names = [module_name(path) for path in modules(base)]
        projections = [name for name in names if name.endswith("_proj")]
        _check_settings(lora, adapter.config, projections)
        lora = replace(
            adapter.config,
            lora_dropout=lora.lora_dropout,
            base_model_name_or_path=lora.base_model_name_or_path,
            revision=lora.revision,
        )
        initialise = partial(attach_adapter, config=config, adapter=adapter, train=True)
    has_arrays = isinstance(jax.tree.leaves(base)[0], jax.Array)
    return initialise(base) if has_arrays else jax.eval_shape(initialise, base), lora


def _check_settings(given: LoraConfig, own: LoraConfig, names: Sequence[str]) -> None:
    """Refuses settings that are neither the defaults nor those of the adapter itself.

    Args:
        given: what the run asks for.
        own: settings of the adapter.
        names: HF names of the base's projections, which targets may select in other words.
    """
    default = LoraConfig()
    other = [
        item.name
        for item in fields(LoraConfig)
        if item.name not in _TAKEN
        and getattr(given, item.name)
        not in (getattr(default, item.name), getattr(own, item.name))
    ]
    if "target_modules" in other:
        asked = replace(own, target_modules=given.target_modules)
        selected, adapted = (
            select_targets(x, names, strict=False) for x in (asked, own)
        )
        if selected == adapted:
            other.remove("target_modules")
    if other:
        ignored = [f"lora.{name} (it has {getattr(own, name)!r})" for name in other]
        raise UsageError(
            "the adapter given as init_adapter keeps its own settings, so these have no "
            f"effect: {listing(ignored)}; leave them out"
        )


def attach_adapter(
    params: Params,
    config: LlamaConfig,
    adapter: Adapter,
    *,
    train: bool = False,
) -> Params:
    """Returns the tree with an adapter's leaves beside its weights, which are not copied.

    The embeddings of an adapter with another vocabulary replace those of the base; the
    configuration of the model is then `adapted_config`.

    Args:
        params: the base model.
        config: its architecture.
        adapter: its tensors and settings.
        train: whether it will be trained further. A PiSSA or OLoRA adapter then gets
            leaves lora_A0 and lora_B0; otherwise its kernels become residual ones, and
            only modules without a plain kernel get these leaves.

    Raises:
        UnsupportedError, CorruptError: as `place_adapter`; for training, also what jlora
            does not train.
    """
    if train:
        _check_trainable(adapter, config)
    placement = place_adapter(adapter, config)
    base = {name: dict(leaves) for name, leaves in modules(params).items()}
    added = _replaced_embeddings(adapter, placement.embeddings, base)
    if train and added:
        _refuse_training(
            adapter, f"its copies of {listing(list(added))} differ from the base's"
        )
    for name, leaves in added.items():
        base[name] |= leaves
    for name, arrays in placement.leaves.items():
        leaves = {leaf: jnp.asarray(array) for leaf, array in arrays.items()}
        weight: Any = weight_in(base, name)
        factors = initial_factors(adapter, name, weight)
        if train or "kernel" not in base.get(name, {}):
            leaves |= factors
        elif factors:
            scaling = adapter.scalings[module_path(name)]
            weight = leaves["kernel"] = _residual(weight, factors, scaling)
        if "lora_magnitude" in leaves:
            leaves["lora_norm_squared"] = norm_squared(weight)
        added[name] = added.get(name, {}) | leaves
    return with_adapter(params, added)


def _check_trainable(adapter: Adapter, config: LlamaConfig) -> None:
    """Refuses adapters that jlora can use but not train."""
    tokens = adapted_config(adapter, config).vocab_size
    if adapter.config.bias != "none":
        _refuse_training(
            adapter,
            f"bias={adapter.config.bias!r}; jlora uses trained biases but does not train "
            "them",
        )
    if tokens != config.vocab_size:
        _refuse_training(
            adapter,
            f"has embeddings for {tokens} tokens, the base has {config.vocab_size}",
        )


def _refuse_training(adapter: Adapter, why: str) -> NoReturn:
    raise UnsupportedError(
        f"{adapter.location}: {why}; training writes an adapter for the base as it is, so "
        "merge this one first (jlora export) and train on the merged model"
    )


def _replaced_embeddings(
    adapter: Adapter, stored: dict[str, np.ndarray], base: _Modules
) -> _Modules:
    """Returns the adapter's embeddings that differ from the base's, on its devices."""
    found = {}
    for path in stored:
        module, leaf = path.split("/")
        found[path] = base[module_name(module)][leaf]
    if any(isinstance(embedding, Tracer) for embedding in found.values()):
        return {}  # only shapes are wanted, and those are the base's
    replaced: _Modules = {}
    for path, array in changed_embeddings(adapter, stored, found).items():
        module, leaf = path.split("/")
        replaced[module_name(module)] = {leaf: placed_like(array, found[path])}
    return replaced


def _residual(kernel: Any, factors: dict[str, Any], scaling: float) -> Any:
    """Returns the kernel that PiSSA or OLoRA leave: without the initial update."""
    a, b = (np.asarray(factors[leaf]) for leaf in ("lora_A0", "lora_B0"))
    residual = without_initial_update(np.asarray(kernel), a, b, scaling)
    return placed_like(residual.astype(kernel.dtype), kernel)
