"""Does an adapter fit a model? What it lays beside the model's weights, if it does."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError, UsageError, listing, nearest
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_config import warn
from jlora.formats.peft.adapter_embeddings import own_tables
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD, adapter_key, is_transposed
from jlora.formats.tensor_names import all_names, module_name, module_path
from jlora.lora.lora_dense import WEIGHTS
from jlora.lora.target_modules import Selection, select

Shapes = dict[str, dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Fit:
    """An adapter laid over a model."""

    config: LlamaConfig
    """Of the adapted model: the vocabulary may be another."""
    leaves: dict[str, dict[str, Any]]
    """HF module name -> leaves to put beside its weights."""
    tables: dict[str, np.ndarray]
    """Params path -> table that replaces the base's, as stored."""


def model_config(adapter: Adapter, config: LlamaConfig) -> LlamaConfig:
    """Returns the architecture of base and adapter together."""
    if adapter.vocab_size is None:
        return config
    return replace(config, vocab_size=adapter.vocab_size)


def check_fit(adapter: Adapter, config: LlamaConfig) -> Fit:
    """Returns what the adapter puts where, if it has exactly what its settings select.

    Raises:
        UnsupportedError: parts that jlora does not have together.
        CorruptError: lists all missing, surplus and misshapen tensors.
    """
    base_vocab = config.vocab_size
    config = model_config(adapter, config)
    shapes = _shapes(config)
    # Ranks and alphas were matched when the adapter was made.
    rules = replace(adapter.config, rank_pattern={}, alpha_pattern={})
    names = [module_name(path) for path in shapes]
    tied = config.tie_word_embeddings
    try:
        selection = select(
            rules, names, tied=tied, vocab_size=config.vocab_size, strict=False
        )
    except UsageError as error:
        raise CorruptError(f"{adapter.location}: {error}") from error
    expected = _expected(adapter, selection, shapes)
    optional = _optional(selection, shapes)
    problems = _compare(adapter, expected, optional, names)
    if problems:
        raise CorruptError(
            f"{adapter.location}: does not fit the model: {listing(problems)}"
        )
    tables = own_tables(adapter, base_vocab, tied=tied, shared=selection.shared)
    return Fit(config, _laid_over(adapter, selection), tables)


def _shapes(config: LlamaConfig) -> Shapes:
    """Returns {params path of a module: {leaf: shape}} of the base, in order."""
    shapes: Shapes = {}
    for name in all_names(config):
        path, _, leaf = name.path.rpartition("/")
        shapes.setdefault(path, {})[leaf] = name.shape
    return shapes


def _expected(adapter: Adapter, selection: Selection, shapes: Shapes) -> Shapes:
    """Returns the tensors that the settings demand; R in a shape is a rank, -1."""
    expected: Shapes = {}
    head = {"kernel": shapes[EMBEDDING]["embedding"][::-1]}
    for name in selection.adapted:
        path = module_path(name)
        fan_in, fan_out = _weight(shapes.get(path, head))
        leaves = expected.setdefault(path, {})
        leaves |= {"lora_A": (fan_in, -1), "lora_B": (-1, fan_out)}
        if adapter.config.use_dora:
            leaves["lora_magnitude"] = (fan_out,)
    for name in selection.saved:
        path = module_path(name)
        for leaf, shape in shapes.get(path, head).items():
            expected.setdefault(path, {})[f"trained_{leaf}"] = shape
    for name, ids in selection.tokens.items():
        width = shapes[EMBEDDING]["embedding"][1]
        expected.setdefault(module_path(name), {})["token_rows"] = (len(ids), width)
    if adapter.config.bias != "none":
        for path, leaves in shapes.items():
            wanted = adapter.config.bias == "all" or "lora_A" in expected.get(path, {})
            if wanted and "bias" in leaves:
                expected.setdefault(path, {})["trained_bias"] = leaves["bias"]
    return expected


def _weight(leaves: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return next(leaves[name] for name in WEIGHTS if name in leaves)


def _optional(selection: Selection, shapes: Shapes) -> Shapes:
    """Returns the tensors that may be there: tables, and the head that shares one."""
    table = shapes[EMBEDDING]["embedding"]
    optional: Shapes = {EMBEDDING: {"embedding": table}, HEAD: {"kernel": table[::-1]}}
    if selection.shared:
        # PEFT writes what is shared under both names.
        optional[HEAD] |= {
            "lora_A": (table[1], -1),
            "lora_B": (-1, table[0]),
            "trained_kernel": table[::-1],
        }
    return optional


def _compare(
    adapter: Adapter, expected: Shapes, optional: Shapes, names: list[str]
) -> list[str]:
    config = adapter.config
    targets = config.target_modules
    rule = targets if isinstance(targets, str | None) else listing(targets)
    problems = []
    for path, leaves in sorted(expected.items()):
        found = adapter.tensors.get(path, {})
        missing = [leaf for leaf in leaves if leaf not in found]
        if missing[:2] == ["lora_A", "lora_B"]:
            name = module_name(path)
            problems.append(
                f"target_modules={rule} selects {name}, which has no tensors"
            )
        else:
            problems += [
                f"{adapter_key(path, leaf, found)} is missing" for leaf in missing
            ]
    for path, found in sorted(adapter.tensors.items()):
        name = module_name(path)
        known = optional.get(path, {}) | expected.get(path, {})
        if name not in names and path != HEAD:
            problems.append(f"the model has no {name}{nearest(name, names)}")
        elif "lora_A" in found and "lora_A" not in known:
            problems.append(f"target_modules={rule} does not select {name}")
        else:
            problems += _misfits(path, found, known)
    return problems


def _misfits(
    path: str, found: dict[str, np.ndarray], known: dict[str, tuple[int, ...]]
) -> list[str]:
    problems = []
    for leaf, array in found.items():
        key = adapter_key(path, leaf, found)
        if leaf not in known:
            problems.append(f"{key} is not among what the settings select")
            continue
        rank = found["lora_A"].shape[1] if "lora_A" in found else 0
        want = tuple(rank if n == -1 else n for n in known[leaf])
        if array.shape != want:
            turn = -1 if is_transposed(leaf) else 1
            problems.append(
                f"{key} {list(array.shape[::turn])} instead of {list(want[::turn])}, "
                f"for {path}/{leaf}"
            )
    return problems


def _laid_over(adapter: Adapter, selection: Selection) -> dict[str, dict[str, Any]]:
    """Returns the leaves beside each module's weights: tensors, scalings and ids."""
    laid: dict[str, dict[str, Any]] = {}
    for path, arrays in adapter.tensors.items():
        leaves: dict[str, Any] = {
            leaf: array for leaf, array in arrays.items() if leaf not in WEIGHTS
        }
        name = module_name(path)
        if "lora_A" in leaves:
            leaves["lora_scaling"] = np.asarray(adapter.scalings[path], np.float32)
        if name in selection.tokens:
            leaves["token_ids"] = np.asarray(selection.tokens[name], np.int32)
        if leaves:
            laid[name] = leaves
    if selection.shared:
        laid[HEAD] = _shared_head(
            laid[module_name(EMBEDDING)], laid.get(HEAD, {}), adapter
        )
    return laid


def _shared_head(
    table: dict[str, Any], head: dict[str, Any], adapter: Adapter
) -> dict[str, Any]:
    """Returns the head's mark, or its own leaves where the file's two copies differ."""
    own = {
        "lora_A": "lora_B",
        "lora_B": "lora_A",
        "trained_kernel": "trained_embedding",
    }
    same = all(
        np.array_equal(head[leaf].T, table[other])
        for leaf, other in own.items()
        if leaf in head and other in table
    )
    if same:
        return {"lora_shared": np.ones((), np.float32)}
    warn(
        f"{adapter.location}: ensure_weight_tying, but embedding and head differ; they "
        "are used as two"
    )
    return head
