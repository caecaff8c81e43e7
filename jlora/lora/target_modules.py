"""Which modules get an adapter or are trained in full, and how: PEFT's rules.

Source: PEFT `tuners/tuners_utils.py`, `check_target_module_exists`,
`_maybe_include_all_linear_layers` and `_check_tied_modules`; `utils/other.py`,
`get_pattern_key`, `_set_trainable` and `set_additional_trainable_modules`. Above 300 lines,
as these rules read one another's results.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError, listing, nearest, warn

DEFAULT_TARGETS: tuple[str, ...] = ("q_proj", "v_proj")
TABLES = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Selection:
    """What a `LoraConfig` puts where, by HF module name."""

    adapted: dict[str, tuple[int, float]]
    """Rank and scaling."""
    saved: list[str]
    """Trained in full."""
    tokens: dict[str, list[int]]
    """Tables of which these rows are trained."""
    shared: bool
    """Whether the head of a tied base uses what the embedding has."""

    @property
    def names(self) -> set[str]:
        """All that is named."""
        return {*self.adapted, *self.saved, *self.tokens}


def select(
    config: LoraConfig,
    names: Sequence[str],
    *,
    tied: bool,
    vocab_size: int,
    strict: bool,
) -> Selection:
    """Returns what `config` selects among all modules that hold weights.

    Args:
        config: what to adapt.
        names: HF names, such as `model.layers.0.mlp.up_proj` and `model.norm`.
        tied: whether the head is the embedding's table.
        vocab_size: rows of the tables.
        strict: as `select_modules`.

    Raises:
        UsageError, UnsupportedError: as `select_modules`; or parts that exclude each other.
    """
    names = list(dict.fromkeys([*names, TABLES[1]]))
    linears = [n for n in names if n in TABLES or n.endswith("_proj")]
    adapted = select_modules(config, linears, strict=strict)
    saved = _saved_modules(config, names, strict)
    tokens = _token_rows(config, vocab_size, {*adapted, *saved})
    embedding, head = TABLES
    shared = tied and config.ensure_weight_tying and head not in tokens
    if shared and embedding in saved:
        saved = [name for name in saved if name != head]
        adapted.pop(head, None)
    elif shared and embedding in adapted and head not in saved:
        adapted.pop(head, None)
        if config.use_dora:
            raise UnsupportedError(
                "lora.use_dora with lora.ensure_weight_tying and the embedding among the "
                "targets: one pair cannot have two magnitudes; leave one of them out"
            )
    else:
        if config.ensure_weight_tying and embedding not in tokens:
            reason = "no table is adapted" if tied else "the base is not tied"
            text = f"lora.ensure_weight_tying has no effect, as {reason}"
            if strict:
                raise UsageError(f"{text}; leave it out")
            warn(text)
        shared = False
    if tied and embedding in tokens and head in adapted:
        raise UnsupportedError(
            "lora.trainable_token_indices of a tied table together with an adapter on "
            "lm_head is not supported; leave one of them out"
        )
    if tied and tokens.get(head) == tokens.get(embedding):
        tokens.pop(head, None)
    return Selection(adapted, saved, tokens, shared)


def select_modules(
    config: LoraConfig, names: Sequence[str], *, strict: bool
) -> dict[str, tuple[int, float]]:
    """Returns {HF module name: (rank, scaling)} of the modules that get an adapter.

    Args:
        config: what to adapt.
        names: HF names of the adaptable modules, such as `model.layers.0.mlp.up_proj`.
        strict: refuse list entries and patterns that match nothing, targets inside
            modules_to_save, and patterns that contradict each other (training);
            otherwise warn (loading a saved adapter).

    Raises:
        UsageError: nothing is selected, a bad regular expression or, if strict, the above.
    """
    containers = _containers(names)
    targets = config.target_modules
    if targets is None:
        targets = list(DEFAULT_TARGETS)
    if not targets:
        raise UsageError(
            f"lora.target_modules={targets!r} is empty; name modules such as "
            "[q_proj,v_proj], or all-linear"
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [name for name in names if name not in TABLES]
    used: set[str] = set()
    excluded = {n for n in containers if _matches(config.exclude_modules, n, used)}
    targeted = [n for n in containers if _is_target(targets, n, config, used)]
    selected = [name for name in targeted if name not in excluded]
    inside = [name for name in selected if _is_inside_saved(config, name)]
    selected = [name for name in selected if name not in inside]
    if inside and strict:
        raise UsageError(
            f"lora.modules_to_save trains {listing(inside)} in full, and "
            "lora.target_modules selects it, too; name it in lora.exclude_modules"
        )
    wrong = [name for name in selected if name not in names]
    if wrong:
        raise UsageError(
            f"lora.target_modules selects {listing(wrong)}, which is not a linear layer; "
            f"linear layers end in {listing(sorted({n.rsplit('.')[-1] for n in names}))}"
        )
    if not selected:
        _refuse_no_target(targets, {name.rsplit(".")[-1] for name in names})
    result = {}
    for name in selected:
        rank = _pattern_value(config.rank_pattern, name, config.r, used, strict)
        alpha = _pattern_value(
            config.alpha_pattern, name, config.lora_alpha, used, strict
        )
        result[name] = (int(rank), config.scaling(int(rank), alpha))
    _report_unused(config, targets, used, names, strict)
    return result


def _refuse_no_target(targets: list[str] | str, known: set[str]) -> None:
    if isinstance(targets, str):
        first, hint = targets, "; a string is a regular expression for whole names"
        parts = {part.strip() for part in targets.split(",")}
        hint += f", so write [{targets}]" if parts <= known else ""
    else:
        first, hint = listing(targets), nearest(targets[0], known)
    raise UsageError(f"lora.target_modules={first} selects no module{hint}")


def _is_inside_saved(config: LoraConfig, name: str) -> bool:
    entries = config.modules_to_save or []
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in entries)


def is_saved(config: LoraConfig, name: str) -> bool:
    """Returns whether modules_to_save captures a module.

    Its name, or that of one around it, ends in an entry, with or without a dot before.
    """
    entries = config.modules_to_save or []
    return any(part.endswith(m) for part in _containers([name]) for m in entries)


def _saved_modules(config: LoraConfig, names: Sequence[str], strict: bool) -> list[str]:
    """Returns the modules that modules_to_save captures."""
    entries = config.modules_to_save or []
    saved = [name for name in names if is_saved(config, name)]
    around = {name: _containers([name]) for name in names}
    idle = [
        entry
        for entry in entries
        if not any(part.endswith(entry) for name in saved for part in around[name])
    ]
    known = {name.rsplit(".")[-1] for name in names} | set(names)
    text = listing(
        [
            f"lora.modules_to_save: {entry!r} matches no module{nearest(entry, known)}"
            for entry in idle
        ]
    )
    if idle and strict:
        raise UsageError(text)
    if idle:
        warn(text)
    return saved


def _token_rows(
    config: LoraConfig, vocab_size: int, taken: set[str]
) -> dict[str, list[int]]:
    """Returns the rows of each table that trainable_token_indices names, in its order."""
    wanted = config.trainable_token_indices or {}
    if isinstance(wanted, list):
        wanted = {TABLES[0]: wanted}
    tokens = {}
    for entry, ids in wanted.items():
        [*found] = [name for name in TABLES if name.endswith(entry)] if entry else []
        if not found:
            raise UsageError(
                f"lora.trainable_token_indices: {entry!r} is not a table of tokens; "
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


def _containers(names: Sequence[str]) -> list[str]:
    """Returns the names and every module that contains them, in order."""
    seen: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            seen[".".join(parts[:i])] = None
    return list(seen)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UsageError(
            f"lora: {pattern!r} is not a regular expression ({error})"
        ) from error


def _matches(entries: list[str] | str | None, name: str, used: set[str]) -> bool:
    if not entries:
        return False
    if isinstance(entries, str):
        hit = _fullmatch(entries, name)
        used |= {entries} if hit else set()
        return hit
    hits = {x for x in entries if name == x or name.endswith("." + x)}
    used |= hits
    return bool(hits)


def _is_target(
    targets: list[str] | str, name: str, config: LoraConfig, used: set[str]
) -> bool:
    if isinstance(targets, str):
        return _matches(targets, name, used)
    if name in targets:  # an exact name is not filtered by layer, as in PEFT
        return _matches(targets, name, used)
    wanted = _wanted_layers(config)
    if wanted and _layer_index(name, config.layers_pattern) not in wanted:
        return False
    return _matches(targets, name, used)


def _wanted_layers(config: LoraConfig) -> list[int]:
    """Returns the indices of layers_to_transform; none means all."""
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers or []


def _layer_index(name: str, patterns: list[str] | str | None) -> int | None:
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(match.group(1)) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1))
    return None


def _pattern_value(
    patterns: Mapping[str, float],
    name: str,
    default: float,
    used: set[str],
    strict: bool,
) -> float:
    """Returns the value of the first pattern that matches, in the dictionary's order."""
    hits = [key for key in patterns if _fullmatch(rf"(.*\.)?({key})", name)]
    used |= set(hits)
    if strict and len({patterns[key] for key in hits}) > 1:
        raise UsageError(
            f"lora: the patterns {listing(hits)} give {name} different values; "
            "make them exclude each other"
        )
    return patterns[hits[0]] if hits else default


def _report_unused(
    config: LoraConfig,
    targets: list[str] | str,
    used: set[str],
    names: Sequence[str],
    strict: bool,
) -> None:
    excludes = config.exclude_modules or []
    entries = {
        "target_modules": targets if isinstance(targets, list) else [],
        "exclude_modules": [excludes] if isinstance(excludes, str) else excludes,
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
    }
    known = {name.rsplit(".")[-1] for name in names} | set(names)
    idle = [
        f"lora.{group}: {entry!r} matches no module{nearest(entry, known)}"
        for group, items in entries.items()
        for entry in items
        if entry not in used
    ]
    layers = {_layer_index(name, config.layers_pattern) for name in names}
    idle += [
        f"lora.layers_to_transform: {index} matches no layer"
        for index in _wanted_layers(config)
        if index not in layers
    ]
    if idle and strict:
        raise UsageError(listing(idle))
    if idle:
        warn(listing(idle))
