"""The tables that an adapter brings: of a resized vocabulary, or copies of the base's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.errors import CorruptError, listing
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_config import warn
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD, adapter_key
from jlora.parallel.processes import to_host

_TABLE, _KERNEL = f"{EMBEDDING}/embedding", f"{HEAD}/kernel"


def own_tables(
    adapter: Adapter, base_vocab: int, *, tied: bool, shared: bool
) -> dict[str, np.ndarray]:
    """Returns {params path: table that may replace the base's}, as stored.

    Args:
        adapter: what brings them.
        base_vocab: rows of the base's tables.
        tied: whether the base has one table for both ends.
        shared: whether what is trained on the embedding serves the head, too.

    Raises:
        CorruptError: tables that contradict each other or the settings, or not all of a
            resized vocabulary.
    """
    tables = _tables(adapter, tied=tied)
    if adapter.vocab_size not in (None, base_vocab):
        # Where nothing but a trained copy is used, it stands in for what it shadows.
        if not tied or shared:
            tables = _trained_tables(adapter) | tables
        _check_tables(adapter, tables, base_vocab, tied=tied)
    elif adapter.resized and adapter.config.modules_to_save:
        raise CorruptError(
            f"{adapter.location}: weights of the base beside modules_to_save="
            f"{adapter.config.modules_to_save}, though the vocabulary is the base's; "
            "train or save the adapter again"
        )
    return tables


def _tables(adapter: Adapter, *, tied: bool) -> dict[str, np.ndarray]:
    """Returns {params path: table that replaces the base's}; a tied base has one."""
    table = adapter.tensors.get(EMBEDDING, {}).get("embedding")
    kernel = adapter.tensors.get(HEAD, {}).get("kernel")
    if tied and kernel is not None:
        if table is not None and not np.array_equal(table, kernel.T):
            raise CorruptError(
                f"{adapter.location}: brings two different tables for the one that the "
                "base ties; save the adapter again"
            )
        table, kernel = kernel.T, None
    found = {_TABLE: table, _KERNEL: kernel}
    return {path: array for path, array in found.items() if array is not None}


def _trained_tables(adapter: Adapter) -> dict[str, np.ndarray]:
    """Returns {params path: trained copy} of the tables that modules_to_save names."""
    return {
        path: adapter.tensors[module][f"trained_{leaf}"]
        for path in (_TABLE, _KERNEL)
        for module, leaf in [path.split("/")]
        if f"trained_{leaf}" in adapter.tensors.get(module, {})
    }


def _check_tables(
    adapter: Adapter, tables: dict[str, np.ndarray], base_vocab: int, *, tied: bool
) -> None:
    """Refuses a resized vocabulary that does not come with every table of the model."""
    missing = {_TABLE, *([] if tied else [_KERNEL])} - tables.keys()
    if missing:
        keys = [adapter_key(*path.rsplit("/", 1)) for path in sorted(missing)]
        raise CorruptError(
            f"{adapter.location}: its vocabulary has {adapter.vocab_size} tokens, the "
            f"base's {base_vocab}, and {listing(keys)} is missing; save the adapter with "
            "save_embedding_layers=True, or merge it with PEFT where it was trained"
        )


def changed_tables(
    adapter: Adapter, own: Mapping[str, np.ndarray], tables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the adapter's tables that are not the base's own, in the base's dtype.

    Args:
        adapter: what fits.
        own: what `own_tables` returned, of `Fit.tables`.
        tables: params path -> table of the base.

    Raises:
        CorruptError: a table of the old size differs, and nothing says it was trained.
    """
    changed = {}
    for path, table in tables.items():
        base = to_host(table)
        array = own[path].astype(base.dtype)
        if np.array_equal(array, base):
            continue
        if array.shape != base.shape:
            warn(
                f"{adapter.location}: brings {path} {list(array.shape)} for its tokens"
            )
        elif adapter.resized:
            raise CorruptError(
                f"{adapter.location}: {adapter_key(*path.rsplit('/', 1))} "
                "differs from the base, and modules_to_save does not say that it was "
                "trained; save the adapter again"
            )
        else:
            warn(f"{adapter.location}: its copy of {path} replaces a different base's")
        changed[path] = array
    return changed
