"""Which leaf of a model's tree each tensor of an adapter becomes, if they fit together."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError, UsageError, listing, nearest, warn
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_embeddings import whole_embeddings
from jlora.formats.peft.adapter_keys import EMBED_PATH, TIED_COPIES, adapter_key
from jlora.formats.tensor_names import (
    all_names,
    is_transposed,
    module_name,
    module_path,
)
from jlora.lora.adapter_tree import HEAD, WEIGHT_LEAVES
from jlora.lora.target_modules import Selection, select_trainable

# Params path of a module -> leaf -> shape; -1 stands for the rank.
_Shapes = dict[str, dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Placement:
    """What an adapter adds to a model, and where."""

    config: LlamaConfig
    """Architecture of the adapted model; the vocabulary may differ from the base's."""
    leaves: dict[str, dict[str, Any]]
    """HF module name -> leaves to add to it."""
    embeddings: dict[str, np.ndarray]
    """Params path -> embedding that may replace the base's, as stored."""


def adapted_config(adapter: Adapter, config: LlamaConfig) -> LlamaConfig:
    """Returns the architecture of base and adapter together."""
    if adapter.vocab_size is None:
        return config
    return replace(config, vocab_size=adapter.vocab_size)


def place_adapter(adapter: Adapter, config: LlamaConfig) -> Placement:
    """Checks that an adapter fits a model, and returns what it adds where.

    Raises:
        UnsupportedError: parts that jlora does not support together.
        CorruptError: lists all missing, surplus and misshapen tensors.
    """
    base_vocab = config.vocab_size
    config = adapted_config(adapter, config)
    shapes = _base_shapes(config)
    # `Adapter.make` has applied the patterns, so they need not match anything here.
    settings = replace(adapter.config, rank_pattern={}, alpha_pattern={})
    names = [module_name(path) for path in shapes]
    own = [module_name(path) for path in adapter.tensors]
    if not {*own} & {*names, HEAD}:
        raise CorruptError(
            f"{adapter.location}: an adapter of another model: this one has none of its "
            f"modules, such as {listing(own, 2)}"
        )
    tied = config.tie_word_embeddings
    try:
        selection = select_trainable(
            settings, names, tied=tied, vocab_size=config.vocab_size, strict=False
        )
    except UsageError as error:
        raise CorruptError(f"{adapter.location}: {error}") from error
    expected = _expected(adapter, selection, shapes)
    problems = _missing(adapter, expected)
    problems += _surplus(adapter, expected, _optional(selection, shapes), names)
    if problems:
        raise CorruptError(
            f"{adapter.location}: does not fit the model: {listing(problems)}"
        )
    embeddings = whole_embeddings(
        adapter, base_vocab, tied=tied, shared=selection.shared
    )
    return Placement(config, _leaves(adapter, selection), embeddings)


def _base_shapes(config: LlamaConfig) -> _Shapes:
    """Returns the shapes of the base model, in its order."""
    shapes: _Shapes = {}
    for name in all_names(config):
        path, _, leaf = name.path.rpartition("/")
        shapes.setdefault(path, {})[leaf] = name.shape
    return shapes


def _expected(adapter: Adapter, selection: Selection, shapes: _Shapes) -> _Shapes:
    """Returns the tensors that the settings require."""
    expected: _Shapes = {}
    vocab, width = shapes[EMBED_PATH]["embedding"]
    head = {"kernel": (width, vocab)}  # also of a tied base, which has no such tensor
    for name in selection.adapted:
        path = module_path(name)
        own = shapes.get(path, head)
        fan_in, fan_out = next(own[leaf] for leaf in WEIGHT_LEAVES if leaf in own)
        leaves = expected.setdefault(path, {})
        leaves |= {"lora_A": (fan_in, -1), "lora_B": (-1, fan_out)}
        if adapter.config.use_dora:
            leaves["lora_magnitude"] = (fan_out,)
    for name in selection.saved:
        path = module_path(name)
        for leaf, shape in shapes.get(path, head).items():
            expected.setdefault(path, {})[f"trained_{leaf}"] = shape
    for name, ids in selection.tokens.items():
        expected.setdefault(module_path(name), {})["token_rows"] = (len(ids), width)
    if adapter.config.bias != "none":
        for path, leaves in shapes.items():
            wanted = adapter.config.bias == "all" or "lora_A" in expected.get(path, {})
            if wanted and "bias" in leaves:
                expected.setdefault(path, {})["trained_bias"] = leaves["bias"]
    return expected


def _optional(selection: Selection, shapes: _Shapes) -> _Shapes:
    """Returns the tensors that may be there: embeddings, and the copy of a tied adapter."""
    vocab, width = shapes[EMBED_PATH]["embedding"]
    optional: _Shapes = {
        EMBED_PATH: {"embedding": (vocab, width)},
        HEAD: {"kernel": (width, vocab)},
    }
    if selection.shared:  # PEFT writes it under both names
        optional[HEAD] |= {
            "lora_A": (width, -1),
            "lora_B": (-1, vocab),
            "trained_kernel": (width, vocab),
        }
    return optional


def _rule(adapter: Adapter) -> str:
    targets = adapter.config.target_modules
    rule = targets if isinstance(targets, str | None) else listing(targets)
    return f"target_modules={rule}"


def _missing(adapter: Adapter, expected: _Shapes) -> list[str]:
    """Returns a phrase for each tensor that the adapter should have."""
    problems = []
    for path, leaves in sorted(expected.items()):
        found = adapter.tensors.get(path, {})
        missing = [leaf for leaf in leaves if leaf not in found]
        if missing[:2] == ["lora_A", "lora_B"]:
            name = module_name(path)
            problems.append(f"{_rule(adapter)} selects {name}, which has no tensors")
        else:
            problems += [
                f"{adapter_key(path, leaf, found)} is missing" for leaf in missing
            ]
    return problems


def _surplus(
    adapter: Adapter, expected: _Shapes, optional: _Shapes, names: list[str]
) -> list[str]:
    """Returns a phrase for each tensor that has no place or another shape."""
    problems = []
    for path, found in sorted(adapter.tensors.items()):
        name = module_name(path)
        known = optional.get(path, {}) | expected.get(path, {})
        if name not in names and path != HEAD:
            problems.append(f"the model has no {name}{nearest(name, names)}")
            continue
        if "lora_A" in found and "lora_A" not in known:
            problems.append(f"{_rule(adapter)} does not select {name}")
            continue
        rank = found["lora_A"].shape[1] if "lora_A" in found else 0
        for leaf, array in found.items():
            key = adapter_key(path, leaf, found)
            if leaf not in known:
                problems.append(f"{key} is not among what the settings select")
                continue
            want = tuple(rank if n == -1 else n for n in known[leaf])
            if array.shape != want:
                order = -1 if is_transposed(leaf) else 1
                problems.append(
                    f"{key} {list(array.shape[::order])} instead of "
                    f"{list(want[::order])}, for {path}/{leaf}"
                )
    return problems


def _leaves(adapter: Adapter, selection: Selection) -> dict[str, dict[str, Any]]:
    """Returns what each module gets: the tensors, their scaling and token ids."""
    added: dict[str, dict[str, Any]] = {}
    for path, arrays in adapter.tensors.items():
        leaves: dict[str, Any] = {
            leaf: array for leaf, array in arrays.items() if leaf not in WEIGHT_LEAVES
        }
        name = module_name(path)
        if "lora_A" in leaves:
            leaves["lora_scaling"] = np.asarray(adapter.scalings[path], np.float32)
        if name in selection.tokens:
            leaves["token_ids"] = np.asarray(selection.tokens[name], np.int32)
        if leaves:
            added[name] = leaves
    if selection.shared:
        embedding, head = added[module_name(EMBED_PATH)], added.get(HEAD, {})
        if _is_same(embedding, head):
            added[HEAD] = {"lora_shared": np.ones((), np.float32)}
        else:
            warn(
                f"{adapter.location}: ensure_weight_tying, but the adapters of embedding "
                "and head differ; both are used"
            )
            added[HEAD] = head
    return added


def _is_same(embedding: dict[str, Any], head: dict[str, Any]) -> bool:
    """Returns whether what the file has for the head is a copy of the embedding's."""
    return all(
        np.array_equal(head[leaf].T, embedding[other])
        for leaf, other in TIED_COPIES.items()
        if leaf in head and other in embedding
    )
