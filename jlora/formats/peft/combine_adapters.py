"""Combines several adapters into one by weights, as PEFT's `add_weighted_adapter` does.

| method | A and B of the result | rank |
|---|---|---|
| `linear` | sum of A by sign and root of abs(w s), sum of B by the root | as the adapters' |
| `cat` | all A, each times w s, side by side; all B: exact | sum of the adapters' |
| `svd` | best approximation of the sum of w s A B | largest of the adapters', or `svd_rank` |

w is the weight of an adapter and s its scaling; the scaling of the result is 1. `linear`
is not the sum of the updates: the product of its sums also has A of one adapter times B of
another. PEFT's ties, dare and magnitude_prune are not supported.

Source: PEFT 0.21 `tuners/lora/model.py`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jlora.config.lora_config import MAX_RANK, LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.formats.peft.adapter import Adapter, padded_pair
from jlora.formats.tensor_names import module_name

Method = Literal["linear", "cat", "svd"]
_Factors = tuple[np.ndarray, np.ndarray]
# A and B of one module in one adapter, the adapter's weight and scaling.
_Part = tuple[np.ndarray, np.ndarray, float, float]


def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method,
    *,
    svd_rank: int | None = None,
) -> Adapter:
    """Returns one adapter for the weighted sum of the adapters' updates.

    Args:
        adapters: of one base; a module may be adapted by some of them only.
        weights: one for each.
        method: see the table above.
        svd_rank: rank of the result of svd; None: the largest of the adapters'.

    Raises:
        UsageError: weights, ranks or settings that cannot be combined.
        UnsupportedError: an adapter with other tensors than lora_A and lora_B.
        CorruptError: adapters of different bases, or a result that is not finite.
    """
    _check(adapters, weights, method, svd_rank)
    if len(adapters) == 1:  # as PEFT: there is nothing to concatenate
        method = "linear"
    ranks = [_largest_rank(adapter.config) for adapter in adapters]
    rank = sum(ranks) if method == "cat" else svd_rank or max(ranks)
    tensors = {}
    for path in dict.fromkeys(path for a in adapters for path in a.tensors):
        parts = [
            (a.tensors[path]["lora_A"], a.tensors[path]["lora_B"], w, a.scalings[path])
            for a, w in zip(adapters, weights, strict=True)
            if path in a.tensors
        ]
        _check_shapes(path, parts, adapters)
        if method == "linear":
            a, b = _linear(parts)
        elif method == "cat":
            a, b = _concatenated(parts)
        else:
            a, b = _svd(parts, rank)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise CorruptError(f"{module_name(path)}: the combination is not finite")
        # One rank for all modules, as PEFT allocates it.
        tensors[path] = padded_pair(a, b, rank)
    first = adapters[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=first.config.lora_dropout,
        target_modules=[module_name(path) for path in tensors],
        base_model_name_or_path=first.config.base_model_name_or_path,
        revision=first.config.revision,
    )
    return Adapter.make(config, tensors, first.location)


def _largest_rank(config: LoraConfig) -> int:
    return max(config.r, *config.rank_pattern.values(), 0)


def _linear(parts: Sequence[_Part]) -> _Factors:
    """Returns the sums of A and of B by the roots of weight * scaling, its sign on A."""
    _check_one_rank("the ranks of a module", [a.shape[1] for a, *_ in parts])
    scaled = []
    for a, b, weight, scaling in parts:
        root = np.float32(math.sqrt(abs(weight * scaling)))
        sign = 1 if weight * scaling >= 0 else -1
        scaled.append((sign * root * a, root * b))
    return np.sum([a for a, _ in scaled], axis=0), np.sum(
        [b for _, b in scaled], axis=0
    )


def _concatenated(parts: Sequence[_Part]) -> _Factors:
    """Returns all A, each times weight * scaling, side by side, and all B."""
    scaled = [a * np.float32(w) * np.float32(s) for a, _, w, s in parts]
    return np.concatenate(scaled, axis=1), np.concatenate([b for _, b, *_ in parts])


def _svd(parts: Sequence[_Part], rank: int) -> _Factors:
    """Returns U S and V of the sum of w s A B, cut at `rank`.

    The sum has at most as many singular values as the sum R of the ranks. So two QR
    decompositions and the SVD of an R x R matrix, in float64, are enough.
    """
    scaled = [w * s * a.astype(float) for a, _, w, s in parts]
    left, first = np.linalg.qr(np.concatenate(scaled, axis=1))
    stacked = np.concatenate([b for _, b, *_ in parts])
    right, second = np.linalg.qr(stacked.T.astype(float))
    u, values, v = np.linalg.svd(first @ second.T)
    rank = min(rank, len(values))
    a, b = left @ u[:, :rank], values[:rank, None] * (v[:rank] @ right.T)
    return a.astype(np.float32), b.astype(np.float32)


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    svd_rank: int | None,
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise UsageError(
            f"{len(adapters)} adapters and {len(weights)} weights; give one weight each"
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"weights={list(weights)}; expected finite numbers")
    if svd_rank is not None and (method != "svd" or not 1 <= svd_rank <= MAX_RANK):
        raise UsageError(
            f"svd_rank={svd_rank} with how={method}; expected 1 to {MAX_RANK:,}, for svd "
            "only"
        )
    for adapter in adapters:
        leaves = {leaf for pair in adapter.tensors.values() for leaf in pair}
        more = sorted(leaves - {"lora_A", "lora_B"})
        more += ["use_dora"] if adapter.config.use_dora else []
        if more:
            raise UnsupportedError(
                f"{adapter.location}: has {listing(more)}, and only pairs of lora_A and "
                "lora_B add up; merge it into a base of its own with jlora export"
            )
    targets = [adapter.config.target_modules for adapter in adapters]
    are_regexes = {isinstance(t, str) and t.lower() != "all-linear" for t in targets}
    if len(are_regexes) > 1:
        raise UsageError(
            "target_modules is a regular expression in some adapters and a list in "
            "others, which PEFT does not combine either; write them alike"
        )
    if method == "linear":
        ranks = [_largest_rank(adapter.config) for adapter in adapters]
        _check_one_rank("the adapters' ranks", ranks)


def _check_one_rank(what: str, ranks: Sequence[int]) -> None:
    if len(set(ranks)) > 1:
        raise UsageError(
            f"linear adds A to A, and {what} differ: {listing(ranks)}; use cat or svd"
        )


def _check_shapes(
    path: str, parts: Sequence[_Part], adapters: Sequence[Adapter]
) -> None:
    sizes = {(a.shape[0], b.shape[1]) for a, b, *_ in parts}
    if len(sizes) > 1:
        places = listing([str(adapter.location) for adapter in adapters])
        raise CorruptError(
            f"{module_name(path)} is {listing(sorted(sizes))} in the adapters {places}; "
            "they belong to different bases"
        )
