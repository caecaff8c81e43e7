"""Select the modules that get an adapter or are trained in full, by PEFT's rules.

Source: PEFT `tuners/tuners_utils.py` (`check_target_module_exists`,
`_maybe_include_all_linear_layers`, `_check_tied_modules`) and `utils/other.py`
(`get_pattern_key`, `_set_trainable`, `set_additional_trainable_modules`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError, listing, nearest, warn
from jlora.lora.adapter_tree import EMBEDDING, HEAD
from jlora.lora.name_matching import (
    inside,
    layer_indices,
    matching,
    pattern_values,
)

DEFAULT_TARGETS: tuple[str, ...] = ("q_proj", "v_proj")
# The two modules with a row, or a column, for each token.
VOCAB_MODULES = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Selection:
    """What a `LoraConfig` trains, by HF module name."""

    adapted: dict[str, tuple[int, float]]
    """Modules with LoRA: rank and scaling."""
    saved: list[str]
    """Modules that are trained in full and saved whole."""
    tokens: dict[str, list[int]]
    """Embedding and head, if only some of their rows are trained: the tokens of those."""
    shared: bool
    """Whether a tied head uses what is trained on the embedding."""


def select_trainable(
    config: LoraConfig,
    names: Sequence[str],
    *,
    tied: bool,
    vocab_size: int,
    strict: bool,
) -> Selection:
    """Returns what `config` trains of a model.

    Args:
        config: the settings of the adapter.
        names: HF names of all modules with weights, such as `model.norm`.
        tied: whether the head uses the embedding matrix.
        vocab_size: rows of that matrix.
        strict: as in `select_targets`.

    Raises:
        UsageError, UnsupportedError: as `select_targets`, or parts exclude each other.
    """
    names = list(dict.fromkeys([*names, HEAD]))
    linears = [n for n in names if n in VOCAB_MODULES or n.endswith("_proj")]
    adapted = select_targets(config, linears, strict=strict)
    saved = _saved_modules(config, names, strict=strict)
    tokens = _trained_tokens(config, vocab_size, {*adapted, *saved})
    shared = tied and config.ensure_weight_tying and HEAD not in tokens
    if shared and EMBEDDING in saved:
        saved = [name for name in saved if name != HEAD]
        adapted.pop(HEAD, None)
    elif shared and EMBEDDING in adapted and HEAD not in saved:
        adapted.pop(HEAD, None)
        if config.use_dora:
            raise UnsupportedError(
                "lora.use_dora with lora.ensure_weight_tying and the embedding among the "
                "targets: one pair cannot have two magnitudes; leave one of them out"
            )
    else:
        shared = False
        if config.ensure_weight_tying and EMBEDDING not in tokens:
            reason = "the embedding is not adapted" if tied else "the base is not tied"
            text = f"lora.ensure_weight_tying has no effect, as {reason}; leave it out"
            _refuse_or_warn(text, strict=strict)
    if tied and EMBEDDING in tokens and HEAD in adapted:
        raise UnsupportedError(
            "lora.trainable_token_indices of a tied embedding together with an adapter on "
            "lm_head is not supported; leave one of them out"
        )
    if tied and tokens.get(HEAD) == tokens.get(EMBEDDING):
        tokens.pop(HEAD, None)
    return Selection(adapted, saved, tokens, shared)


def select_targets(
    config: LoraConfig, names: Sequence[str], *, strict: bool
) -> dict[str, tuple[int, float]]:
    """Returns {HF module name: (rank, scaling)} of the modules that get LoRA.

    Args:
        config: the settings of the adapter.
        names: HF names of the modules that can have it, such as `model.layers.0.mlp.up_proj`.
        strict: raise for entries and patterns that match nothing, targets inside
            modules_to_save, and patterns that contradict each other, as before a training;
            otherwise warn, as for a saved adapter.

    Raises:
        UsageError: nothing is selected, a bad regular expression or, if strict, the above.
    """
    targets = config.target_modules
    if targets is None:
        targets = list(DEFAULT_TARGETS)
    if not targets:
        raise UsageError(
            f"lora.target_modules={targets!r} is empty; name modules such as "
            "[q_proj,v_proj], or all-linear"
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [name for name in names if name not in VOCAB_MODULES]
    used: set[str] = set()
    selected = _matching_modules(config, targets, _with_parents(names), used)
    skipped = inside(config.modules_to_save or [], selected)
    if skipped and strict:
        raise UsageError(
            f"lora.modules_to_save trains {listing(sorted(skipped))} in full, and "
            "lora.target_modules selects it, too; name it in lora.exclude_modules"
        )
    selected = [name for name in selected if name not in skipped]
    endings = {name.rsplit(".")[-1] for name in names}
    if wrong := [name for name in selected if name not in names]:
        raise UsageError(
            f"lora.target_modules selects {listing(wrong)}, which is not a linear layer; "
            f"linear layers end in {listing(sorted(endings))}"
        )
    if not selected:
        _refuse_no_target(targets, endings)
    ranks = pattern_values(config.rank_pattern, selected, config.r, used, strict=strict)
    alphas = pattern_values(
        config.alpha_pattern, selected, config.lora_alpha, used, strict=strict
    )
    result = {
        name: (int(ranks[name]), config.scaling(int(ranks[name]), alphas[name]))
        for name in selected
    }
    _report_unused(config, targets, used, names, strict)
    return result


def is_saved(config: LoraConfig, name: str) -> bool:
    """Returns whether modules_to_save captures a module.

    It does if the module's name, or that of a parent, ends in an entry, even within a word.
    """
    entries = config.modules_to_save or []
    return any(part.endswith(x) for part in _with_parents([name]) for x in entries)


def _saved_modules(
    config: LoraConfig, names: Sequence[str], *, strict: bool
) -> list[str]:
    parents = _with_parents(names)
    unused = [
        f"lora.modules_to_save: {entry!r} matches no module{_hint(entry, names)}"
        for entry in config.modules_to_save or []
        if not any(parent.endswith(entry) for parent in parents)
    ]
    _refuse_or_warn(listing(unused), strict=strict)
    return [name for name in names if is_saved(config, name)]


def _trained_tokens(
    config: LoraConfig, vocab_size: int, taken: set[str]
) -> dict[str, list[int]]:
    """Returns the tokens of trainable_token_indices, by the module of their rows."""
    wanted = config.trainable_token_indices or {}
    if isinstance(wanted, list):
        wanted = {EMBEDDING: wanted}
    tokens = {}
    for entry, ids in wanted.items():
        found = [name for name in VOCAB_MODULES if entry and name.endswith(entry)]
        if not found:
            raise UsageError(
                f"lora.trainable_token_indices: {entry!r} has no rows of tokens; "
                "expected embed_tokens or lm_head"
            )
        if found[0] in taken:
            raise UsageError(
                f"lora.trainable_token_indices trains rows of {found[0]}, which "
                "target_modules or modules_to_save has already; leave one of them out"
            )
        wrong = sorted({i for i in ids if ids.count(i) > 1 or not 0 <= i < vocab_size})
        if wrong:
            raise UsageError(
                f"lora.trainable_token_indices: {listing(wrong)} is given "
                f"twice or not in 0..{vocab_size - 1}"
            )
        tokens[found[0]] = list(ids)
    return tokens


def _with_parents(names: Sequence[str]) -> list[str]:
    """Returns the names and those of the modules around them, each once."""
    parts = [name.split(".") for name in names]
    return list(
        dict.fromkeys(".".join(p[:i]) for p in parts for i in range(1, len(p) + 1))
    )


def _matching_modules(
    config: LoraConfig, targets: list[str] | str, names: list[str], used: set[str]
) -> list[str]:
    """Returns the names that are targets and not excluded; adds what matched to `used`."""
    excluded = matching(config.exclude_modules, names, used)
    if config.layer_indices and not isinstance(targets, str):
        layers = layer_indices(names, config.layers_pattern)
        # As in PEFT, layers_to_transform does not filter an exact name.
        names = [x for x in names if x in targets or layers[x] in config.layer_indices]
    found = matching(targets, names, used)
    return [name for name in names if name in found and name not in excluded]


def _refuse_no_target(targets: list[str] | str, endings: set[str]) -> None:
    if isinstance(targets, str):
        first, hint = targets, "; a string is a regular expression for whole names"
        parts = {part.strip() for part in targets.split(",")}
        is_list = parts <= endings
        hint += f", so write [{targets}]" if is_list else nearest(targets, endings)
    else:
        first, hint = listing(targets), nearest(targets[0], endings)
    raise UsageError(f"lora.target_modules={first} selects no module{hint}")


def _report_unused(
    config: LoraConfig,
    targets: list[str] | str,
    used: set[str],
    names: Sequence[str],
    strict: bool,
) -> None:
    """Refuses, or warns of, entries and layers that match no module."""
    excludes = config.exclude_modules or []
    entries = {
        "target_modules": targets if isinstance(targets, list) else [],
        "exclude_modules": [excludes] if isinstance(excludes, str) else excludes,
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
    }
    unused = [
        f"lora.{group}: {entry!r} matches no module{_hint(entry, names)}"
        for group, items in entries.items()
        for entry in items
        if entry not in used
    ]
    layers = set(layer_indices(names, config.layers_pattern).values())
    unused += [
        f"lora.layers_to_transform: {index} matches no layer"
        for index in config.layer_indices
        if index not in layers
    ]
    _refuse_or_warn(listing(unused), strict=strict)


def _hint(entry: str, names: Sequence[str]) -> str:
    return nearest(entry, {*names, *(name.rsplit(".")[-1] for name in names)})


def _refuse_or_warn(text: str, *, strict: bool) -> None:
    if text and strict:
        raise UsageError(text)
    if text:
        warn(text)
