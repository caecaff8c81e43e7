"""Which modules get an adapter, and with which rank and scaling: PEFT's rules.

Source: PEFT `tuners/tuners_utils.py`, `check_target_module_exists` and
`_maybe_include_all_linear_layers`; `utils/other.py`, `get_pattern_key`.
"""

import re
import sys
from collections.abc import Mapping, Sequence

from jlora.config import LoraConfig
from jlora.errors import UnsupportedError, UsageError, listing, nearest

DEFAULT_TARGETS: tuple[str, ...] = ("q_proj", "v_proj")
TABLES = ("model.embed_tokens", "lm_head")


def select_modules(
    config: LoraConfig, names: Sequence[str], *, strict: bool
) -> dict[str, tuple[int, float]]:
    """Returns {HF module name: (rank, scaling)} of the modules that get an adapter.

    Args:
        config: what to adapt.
        names: HF names of the adaptable modules, such as `model.layers.0.mlp.up_proj`.
        strict: refuse list entries and patterns that match nothing, and patterns that
            contradict each other (training); otherwise warn (loading a saved adapter).

    Raises:
        UsageError: nothing is selected, a bad regular expression or, if strict, the above.
        UnsupportedError: an embedding table or the head is selected.
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
    wrong = [name for name in selected if name not in names]
    if wrong:
        raise UsageError(
            f"lora.target_modules selects {listing(wrong)}, which is not a linear layer; "
            f"linear layers end in {listing(sorted({n.rsplit('.')[-1] for n in names}))}"
        )
    if not selected:
        known = {name.rsplit(".")[-1] for name in names}
        if isinstance(targets, str):
            first, hint = targets, "; a string is a regular expression for whole names"
            hint += f", so write [{targets}]" if targets in known else ""
        else:
            first = listing(targets)
            hint = nearest(first, known)
        raise UsageError(f"lora.target_modules={first} selects no module{hint}")
    tables = [name for name in selected if name in TABLES]
    if tables:
        raise UnsupportedError(
            f"lora.target_modules selects {listing(tables)}; adapters on the embedding "
            "and the head are not supported yet"
        )
    result = {}
    for name in selected:
        rank = _pattern_value(config.rank_pattern, name, config.r, used, strict)
        alpha = _pattern_value(
            config.alpha_pattern, name, config.lora_alpha, used, strict
        )
        result[name] = (int(rank), config.scaling(int(rank), alpha))
    _report_unused(config, targets, used, names, strict)
    return result


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
        used.add(name)
        return True
    layers = config.layers_to_transform
    if layers is not None and layers != []:
        index = _layer_index(name, config.layers_pattern)
        wanted = [layers] if isinstance(layers, int) else layers
        if index not in wanted:
            return False
    return _matches(targets, name, used)


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
    if idle and strict:
        raise UsageError(listing(idle))
    if idle:
        print(f"warning: {listing(idle)}", file=sys.stderr)
