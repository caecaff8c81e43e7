"""Combines several adapters into one by weights, as PEFT's `add_weighted_adapter` does.

| how | A and B of the result | rank |
|---|---|---|
| `linear` | sums of A, with sign, and of B by sqrt(abs(w s)): mixes the adapters | theirs |
| `cat` | every w s A beside each other, every B: exact | the sum of theirs |
| `svd` | the best of its rank for the sum of w s A B | the largest, or `svd_rank` |

s is an adapter's scaling; the result's is 1. PEFT's ties, dare and magnitude_prune are not
here. Several adapters are merged into a base by `convert.to_hf` one after another, which
rounds after each as PEFT's merge does, bit for bit; or combined by `cat` and merged once,
which rounds once.

Source: PEFT 0.21 `tuners/lora/model.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL
from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.formats.atomic_folder import check_target
from jlora.formats.peft.attach_adapter import Adapter, save_adapter
from jlora.formats.tensor_names import module_name
from jlora.loading import open_adapter

Pair = dict[str, np.ndarray]
How = Literal["linear", "cat", "svd"]


@dataclass(frozen=True)
class Arguments:
    """Combine several adapters into one PEFT adapter folder."""

    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    adapters: list[str]
    """PEFT adapter folders or run folders: [A,B]."""
    weights: list[float]
    """Weight of each adapter, also negative: [1,-0.5]."""
    how: How = "cat"
    """cat: exact, ranks add up; svd: best of svd_rank; linear: weights on A and on B."""
    svd_rank: int | None = None
    """Rank of the result of svd; null: the largest of the adapters'."""
    overwrite: bool = False
    """Replace OUT if it is an adapter folder."""


def main(arguments: Arguments) -> None:
    """Reads, combines and writes."""
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    adapters = [open_adapter(folder) for folder in arguments.adapters]
    for adapter in adapters:
        check_target(out, arguments.overwrite, adapter.location)
    combined = combine(
        adapters, arguments.weights, arguments.how, svd_rank=arguments.svd_rank
    )
    save_adapter(combined, out, overwrite=arguments.overwrite)
    print(
        f"{out}: {len(combined.tensors)} modules of rank {combined.config.r}, "
        f"{arguments.how} of {len(adapters)} adapters"
    )


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: How,
    *,
    svd_rank: int | None = None,
) -> Adapter:
    """Returns one adapter of scaling 1 for the weighted adapters.

    Args:
        adapters: of one base; a module may be adapted by some of them only.
        weights: one for each.
        how: see the module.
        svd_rank: of the result of svd; None takes the adapters' largest.

    Raises:
        UsageError: weights, ranks or settings that do not go together.
        UnsupportedError: an adapter that is more than pairs of A and B.
        CorruptError: adapters of different bases, or a result that is not finite.
    """
    _check(adapters, weights, how, svd_rank)
    if len(adapters) == 1:  # as PEFT: there is nothing to concatenate
        how = "linear"
    ranks = [_rank(adapter.config) for adapter in adapters]
    rank = sum(ranks) if how == "cat" else svd_rank or max(ranks)
    tensors: dict[str, Pair] = {}
    for path in dict.fromkeys(path for a in adapters for path in a.tensors):
        parts = [
            (a.tensors[path], weight, a.scalings[path])
            for a, weight in zip(adapters, weights, strict=True)
            if path in a.tensors
        ]
        _check_shapes(path, [pair for pair, _, _ in parts], adapters)
        pair = {"linear": _linear, "cat": _cat, "svd": _svd}[how](parts, rank)
        if not all(np.isfinite(x).all() for x in pair.values()):
            raise CorruptError(f"{module_name(path)}: the combination is not finite")
        tensors[path] = pair
    first = adapters[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=first.config.lora_dropout,
        target_modules=[module_name(path) for path in tensors],
        base_model_name_or_path=first.config.base_model_name_or_path,
        revision=first.config.revision,
    )
    return Adapter.make(
        config,
        {path: _padded(pair, rank) for path, pair in tensors.items()},
        first.location,
    )


def _rank(config: LoraConfig) -> int:
    return max(config.r, *config.rank_pattern.values(), 0)


Part = tuple[Mapping[str, np.ndarray], float, float]


def _linear(parts: Sequence[Part], rank: int) -> Pair:
    """Returns the sums of A and of B by the roots of weight * scaling, its sign on A."""
    shapes = {pair["lora_A"].shape for pair, _, _ in parts}
    if len(shapes) > 1:
        raise UsageError(
            f"linear adds A to A, and the ranks of a module differ: "
            f"{listing(sorted(s[1] for s in shapes))}; use cat or svd"
        )
    roots = [math.sqrt(abs(weight * scaling)) for _, weight, scaling in parts]
    signs = [1 if weight * scaling >= 0 else -1 for _, weight, scaling in parts]
    a = [np.float32(r * s) for r, s in zip(roots, signs, strict=True)]
    b = [np.float32(r) for r in roots]
    return {
        "lora_A": _sum(a, [pair["lora_A"] for pair, _, _ in parts]),
        "lora_B": _sum(b, [pair["lora_B"] for pair, _, _ in parts]),
    }


def _sum(weights: Sequence[np.float32], arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum([w * x for w, x in zip(weights, arrays, strict=True)], axis=0)


def _cat(parts: Sequence[Part], rank: int) -> Pair:
    """Returns all A by weight * scaling beside each other, and all B."""
    a = [
        pair["lora_A"] * np.float32(weight) * np.float32(scaling)
        for pair, weight, scaling in parts
    ]
    return {
        "lora_A": np.concatenate(a, axis=1),
        "lora_B": np.concatenate([pair["lora_B"] for pair, _, _ in parts], axis=0),
    }


def _svd(parts: Sequence[Part], rank: int) -> Pair:
    """Returns U S and V of the sum of weight * scaling * A B, cut at `rank`.

    The sum has at most the ranks' sum R of singular values, so that two QR
    decompositions and the SVD of an R x R matrix, in float64, are enough.
    """
    scaled = [
        weight * scaling * pair["lora_A"].astype(float)
        for pair, weight, scaling in parts
    ]
    left, first = np.linalg.qr(np.concatenate(scaled, axis=1))
    stacked = np.concatenate([pair["lora_B"] for pair, _, _ in parts], axis=0)
    right, second = np.linalg.qr(stacked.T.astype(float))
    u, s, v = np.linalg.svd(first @ second.T)
    rank = min(rank, len(s))
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    return {
        "lora_A": (left @ u).astype(np.float32),
        "lora_B": (s[:, None] * (v @ right.T)).astype(np.float32),
    }


def _padded(pair: Pair, rank: int) -> Pair:
    """Returns the pair at one rank for all modules, as PEFT allocates it."""
    extra = rank - pair["lora_A"].shape[1]
    return {
        "lora_A": np.pad(pair["lora_A"], ((0, 0), (0, extra))),
        "lora_B": np.pad(pair["lora_B"], ((0, extra), (0, 0))),
    }


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: str,
    svd_rank: int | None,
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise UsageError(
            f"{len(adapters)} adapters and {len(weights)} weights; give one weight each"
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"weights={list(weights)}; expected finite numbers")
    if svd_rank is not None and (how != "svd" or svd_rank < 1):
        raise UsageError(
            f"svd_rank={svd_rank} with how={how}; expected at least 1, for svd only"
        )
    for adapter in adapters:
        kinds = {leaf for pair in adapter.tensors.values() for leaf in pair}
        more = sorted(kinds - {"lora_A", "lora_B"})
        more += ["use_dora"] * adapter.config.use_dora
        if more:
            raise UnsupportedError(
                f"{adapter.location}: has {listing(more)}, and only pairs of lora_A and "
                "lora_B add up; merge it into a base of its own with convert.to_hf"
            )
    # PEFT adds up regular expressions and lists of targets, but not one with the other.
    if len({_is_expression(adapter.config) for adapter in adapters}) > 1:
        raise UsageError(
            "target_modules is a regular expression in some adapters and a list in "
            "others, which PEFT does not combine either; write them alike"
        )
    ranks = [_rank(adapter.config) for adapter in adapters]
    if how == "linear" and len(set(ranks)) > 1:
        raise UsageError(
            f"linear adds A to A, and the adapters' ranks differ: {listing(ranks)}; "
            "use cat or svd"
        )


def _is_expression(config: LoraConfig) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() != "all-linear"


def _check_shapes(
    path: str, pairs: Sequence[Mapping[str, np.ndarray]], adapters: Sequence[Adapter]
) -> None:
    sizes = {(p["lora_A"].shape[0], p["lora_B"].shape[1]) for p in pairs}
    if len(sizes) > 1:
        places = listing([str(adapter.location) for adapter in adapters])
        raise CorruptError(
            f"{module_name(path)} is {listing(sorted(sizes))} in the adapters {places}; "
            "they belong to different bases"
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
