"""The base model that an adapter's settings name."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from jlora.errors import JloraError, UsageError, warn
from jlora.formats.model_source import ModelSource
from jlora.formats.open_model import open_config, open_model
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_embeddings import INPUT, OUTPUT
from jlora.hub import is_hub_id

Opened = TypeVar("Opened")


def open_named_base(
    adapter: Adapter, open_base: Callable[[str], Opened], why: str
) -> Opened:
    """Opens the base model of an adapter: a folder, a file or a hub id.

    Args:
        adapter: its settings name the base, and its revision on the hub.
        open_base: `open_model`, or `open_config` where the architecture is enough.
        why: what needs the base, for messages.

    Raises:
        UsageError: the settings name no base.
        JloraError: as `open_base`.
    """
    name, revision = adapter.config.base_model_name_or_path, adapter.config.revision
    if not name:
        raise UsageError(
            f"{adapter.location}: the adapter names no base: {why} needs it; set "
            "base_model_name_or_path in its adapter_config.json to a model's folder or "
            "hub id"
        )
    if revision and is_hub_id(name) and "@" not in name:
        name = f"{name}@{revision}"
    try:
        return open_base(name)
    except JloraError as error:
        raise type(error)(
            f"{adapter.location}: {why} needs its base, named as {name!r}: {error}"
        ) from error


def name_for_peft(source: ModelSource, given: str) -> str | None:
    """Returns what PEFT can load as the base, None if that is not known.

    It is a Hugging Face folder, or a hub id with its revision; for a base, what it was
    converted from.

    Args:
        source: the base model.
        given: what the user called it.
    """
    name, revision = (source.provenance.get(key) for key in ("source", "revision"))
    if source.provenance.get("format") != "hf" or not isinstance(name, str):
        return None
    if source.kind == "hf":
        return given
    return f"{name}@{revision}" if revision else name


def mark_own_embeddings(adapter: Adapter) -> Adapter:
    """Sets `has_own_embeddings` if the adapter's untrained embeddings are not its base's.

    PEFT also saves the embeddings of adapted modules. Where these are copies of the
    base's, they are not written again. Of a base on the hub only the vocabulary is
    compared, because its weights would have to be fetched.
    """
    has_embeddings = any(
        {"embedding", "kernel"} & leaves.keys() for leaves in adapter.tensors.values()
    )
    if adapter.has_own_embeddings or not has_embeddings:
        return adapter
    try:
        base = open_named_base(adapter, open_config, "comparing the vocabularies")
    except JloraError as error:
        warn(f"{error}; its copy of the base's embeddings is left out")
        return adapter
    has_own = base.vocab_size != adapter.vocab_size or _differ(adapter)
    return replace(adapter, has_own_embeddings=has_own)


def _differ(adapter: Adapter) -> bool:
    """Returns whether an untrained embedding has other values than the base's, if local."""
    name = adapter.config.base_model_name_or_path
    if name is None or is_hub_id(name):
        return False
    base = open_model(name)
    for path in (INPUT, OUTPUT):
        module, leaf = path.split("/")
        array = adapter.tensors.get(module, {}).get(leaf)
        if array is not None and path in base.tensors:
            before = base.read(path)
            if not np.array_equal(array.astype(before.dtype), before):
                return True
    return False
