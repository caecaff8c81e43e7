"""Chooses the records to hold out and how often to repeat the others.

Both follow a rank, which is a hash of the record's tokens and the seed. So neither the
order of the file nor the other records matter, and copies are held out together.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int, UInt64

from jlora.errors import UsageError


def content_ranks(records: Iterable[np.ndarray], seed: int) -> UInt64[np.ndarray, " n"]:
    """Returns a pseudo-random rank of each record (int32 token ids)."""
    key = seed.to_bytes(16, "little")
    contents = (np.ascontiguousarray(tokens, "<i4").tobytes() for tokens in records)
    hashes = (hashlib.blake2b(text, digest_size=8, key=key) for text in contents)
    return np.frombuffer(b"".join(h.digest() for h in hashes), "<u8")


def hold_out(
    ranks: UInt64[np.ndarray, " n"], fraction: float
) -> Bool[np.ndarray, " n"]:
    """Returns which records to hold out: `fraction` of the distinct ones.

    Raises:
        UsageError: too few distinct records to hold any out.
    """
    different = np.unique(ranks)
    count = max(1, round(fraction * len(different)))
    if count >= len(different):
        raise UsageError(
            f"data.eval_fraction={fraction} of {len(different)} different records "
            "leaves none to train on; give more records or a data.eval file"
        )
    return ranks < different[count]


def repeat_records(
    ranks: UInt64[np.ndarray, " n"], passes: float
) -> Int[np.ndarray, " passes_n"]:
    """Returns the indices of one epoch in order, each `passes` times on average.

    2.25 takes every record twice and a quarter of them once more; 0.25 takes a quarter,
    but at least one.
    """
    whole, part = divmod(passes, 1.0)
    times = np.full(len(ranks), int(whole))
    extra = round(part * len(ranks))
    if len(ranks) and not whole:
        extra = max(extra, 1)
    times[np.argsort(ranks, kind="stable")[:extra]] += 1
    return np.repeat(np.arange(len(ranks)), times)
