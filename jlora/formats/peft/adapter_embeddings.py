"""Whole embeddings in an adapter: of a resized vocabulary, or copies of the base's.

The kernel of `lm_head`, the output embedding, counts as an embedding here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.errors import CorruptError, listing, warn
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_keys import EMBED_PATH, adapter_key
from jlora.lora.adapter_tree import HEAD
from jlora.parallel.processes import to_host

INPUT, OUTPUT = f"{EMBED_PATH}/embedding", f"{HEAD}/kernel"


def whole_embeddings(
    adapter: Adapter, base_vocab: int, *, tied: bool, shared: bool
) -> dict[str, np.ndarray]:
    """Returns {params path: embedding that may replace the base's}, as stored.

    Args:
        adapter: where they come from.
        base_vocab: vocabulary size of the base.
        tied: whether the base uses one matrix as input and output embedding.
        shared: whether the head also uses what is trained on the input embedding.

    Raises:
        CorruptError: embeddings that contradict each other or the settings, or one
            embedding of a resized vocabulary is missing.
    """
    found = _embeddings(adapter)
    if tied and OUTPUT in found:
        kernel = found.pop(OUTPUT)
        if not np.array_equal(found.setdefault(INPUT, kernel.T), kernel.T):
            raise CorruptError(
                f"{adapter.location}: two different embeddings, but the base uses one "
                "for input and output; save the adapter again"
            )
    if adapter.vocab_size not in (None, base_vocab):
        # The model uses a trained copy, so the weight below it is not needed. Of a tied
        # base that is only so if the head uses the copy too.
        if not tied or shared:
            found = _embeddings(adapter, "trained_") | found
        _check_complete(adapter, found, base_vocab, tied=tied)
    elif adapter.has_own_embeddings and adapter.config.modules_to_save:
        raise CorruptError(
            f"{adapter.location}: weights of the base beside modules_to_save="
            f"{adapter.config.modules_to_save}, though the vocabulary is the base's; "
            "train or save the adapter again"
        )
    return found


def _embeddings(adapter: Adapter, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns {params path: embedding} from the leaves whose names have the prefix."""
    found = {}
    for path in (INPUT, OUTPUT):
        module, leaf = path.split("/")
        leaves = adapter.tensors.get(module, {})
        if f"{prefix}{leaf}" in leaves:
            found[path] = leaves[f"{prefix}{leaf}"]
    return found


def _check_complete(
    adapter: Adapter, found: Mapping[str, Any], base_vocab: int, *, tied: bool
) -> None:
    """Refuses a resized vocabulary for which an embedding of the model is missing."""
    missing = {INPUT, *([] if tied else [OUTPUT])} - found.keys()
    if missing:
        keys = [adapter_key(*path.rsplit("/", 1)) for path in sorted(missing)]
        raise CorruptError(
            f"{adapter.location}: its vocabulary has {adapter.vocab_size} tokens, the "
            f"base's {base_vocab}, and {listing(keys)} is missing; save the adapter with "
            "save_embedding_layers=True, or merge it with PEFT where it was trained"
        )


def changed_embeddings(
    adapter: Adapter, stored: Mapping[str, np.ndarray], base: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the adapter's embeddings that differ from the base's, in the base's dtype.

    Args:
        adapter: where they come from.
        stored: what `whole_embeddings` returned.
        base: params path -> embedding of the base.

    Raises:
        CorruptError: one of the base's size differs, and no setting says it was trained.
    """
    changed = {}
    for path, embedding in base.items():
        before = to_host(embedding)
        array = stored[path].astype(before.dtype)
        if np.array_equal(array, before):
            continue
        if array.shape != before.shape:
            warn(f"{adapter.location}: {path} {list(array.shape)} replaces the base's")
        elif adapter.has_own_embeddings:
            raise CorruptError(
                f"{adapter.location}: {adapter_key(*path.rsplit('/', 1))} "
                "differs from the base, and modules_to_save does not say that it was "
                "trained; save the adapter again"
            )
        else:
            warn(f"{adapter.location}: its copy of {path} replaces a different base's")
        changed[path] = array
    return changed
