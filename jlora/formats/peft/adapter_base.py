"""The base that an adapter names, and the start that PEFT took out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jlora.errors import JloraError, UsageError
from jlora.formats.hub import is_hub_id
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter import Adapter, Tensors, without_starts
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD
from jlora.formats.tensor_names import module_name, module_path
from jlora.lora.initialisation import initial_pair

Found = TypeVar("Found")


def from_base(adapter: Adapter, read: Callable[[str], Found], why: str) -> Found:
    """Returns what `read` makes of the folder, file or hub id that the adapter names.

    Args:
        adapter: its settings name the base, and its revision on the hub.
        read: `open_model`, or `open_config` where the architecture is enough.
        why: what needs the base, for messages.

    Raises:
        UsageError: it names no base.
        JloraError: as `read`.
    """
    name, revision = adapter.config.base_model_name_or_path, adapter.config.revision
    if not name:
        raise UsageError(
            f"{adapter.location}: the adapter names no base: {why} needs it; set "
            "base_model_name_or_path in its adapter_config.json to a model's folder or "
            "hub id"
        )
    on_hub = is_hub_id(name) and not Path(name).exists()
    if revision and on_hub and "@" not in name:
        name = f"{name}@{revision}"
    try:
        return read(name)
    except JloraError as error:
        raise type(error)(
            f"{adapter.location}: {why} needs its base, named as {name!r}: {error}"
        ) from error


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


def plain(adapter: Adapter) -> Adapter:
    """Returns the adapter as plain LoRA on the whole base, which it opens if need be.

    Raises:
        UsageError: it names no base, which the start of PiSSA and OLoRA comes from.
        JloraError: that base cannot be opened.
    """
    if not adapter.takes_start_out:
        return adapter
    why = f"init_lora_weights={adapter.config.init_lora_weights!r}"
    source = from_base(adapter, open_model, why)
    starts: Tensors = {}
    for path in adapter.pairs:
        if path != EMBEDDING:
            tied = path == HEAD and source.config.tie_word_embeddings
            table = f"{EMBEDDING}/embedding" if tied else f"{path}/kernel"
            weight = source.read(table)
            start = start_of(adapter, module_name(path), weight.T if tied else weight)
            starts[path] = {leaf: np.asarray(x) for leaf, x in start.items()}
    return without_starts(adapter, starts)
