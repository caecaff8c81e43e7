"""Packs several documents into each row: best fit decreasing, few documents per row."""

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# Attention kernels need memory and time for the most documents in any row. So their
# number is limited, if the limit makes at most this share more rows.
_MAX_MORE_ROWS = 0.01
_SMALLEST_LIMIT = 8


@dataclass(frozen=True, eq=False)
class Packing:
    """Which documents each row holds: row i has `documents[starts[i] : starts[i + 1]]`."""

    documents: np.ndarray
    """int64 [num_documents], indices into the lengths, row by row."""
    starts: np.ndarray
    """int64 [num_rows + 1]."""

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.starts) - 1

    @property
    def max_documents(self) -> int:
        """The most documents in any row."""
        return int(np.diff(self.starts).max(initial=0))

    def row(self, index: int) -> np.ndarray:
        """Returns the documents of one row."""
        return self.documents[self.starts[index] : self.starts[index + 1]]


def one_per_row(count: int) -> Packing:
    """Returns a packing of `count` documents, each in a row of its own."""
    return Packing(np.arange(count), np.arange(count + 1))


def pack_documents(lengths: np.ndarray, capacity: int) -> Packing:
    """Packs documents of the given lengths, sorted longest first, into rows.

    The most documents per row is a power of two: the smallest one that costs at most 1 %
    more rows than no limit would. Depends on the lengths alone.

    Raises:
        ValueError: lengths that increase, or do not fit into `capacity` tokens.
    """
    if len(lengths) and not (lengths[-1] > 0 and lengths[0] <= capacity):
        raise ValueError(
            f"lengths {lengths[0]} to {lengths[-1]} in rows of {capacity}; expected 1 to "
            f"{capacity}"
        )
    if (np.diff(lengths) > 0).any():
        raise ValueError("lengths increase; expected them sorted, the longest first")
    # Every document has a token, so this is no limit.
    unlimited = best_fit(lengths, capacity, capacity)
    limit = _SMALLEST_LIMIT
    while limit < unlimited.max_documents:
        if limit * unlimited.num_rows >= len(lengths):  # room for the mean
            packing = best_fit(lengths, capacity, limit)
            if packing.num_rows <= (1 + _MAX_MORE_ROWS) * unlimited.num_rows:
                return packing
        limit *= 2
    return unlimited


def best_fit(lengths: np.ndarray, capacity: int, limit: int) -> Packing:
    """Packs documents, sorted longest first, with at most `limit` in each row.

    Each document goes into the fullest row that has room for it, else into a new one;
    none is split. Documents that are too short to fill a row under the limit come last;
    the longer ones leave room for them in every row. O(n log capacity).
    """
    short = lengths < capacity / limit
    share = lengths[short].sum() / max(1, lengths.sum())
    reserve = int(capacity * share)
    row_of, counts = array("q"), array("q")
    by_room: dict[int, list[int]] = {}  # rows by the room left in them
    rooms: list[int] = []  # its keys, sorted
    for length, is_short in zip(lengths.tolist(), short.tolist(), strict=True):
        at = bisect_left(rooms, length if is_short else length + reserve)
        if at == len(rooms):
            room, row = capacity, len(counts)
            counts.append(0)
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        row_of.append(row)
        counts[row] += 1
        left = room - length
        if left and counts[row] < limit:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    starts = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))])
    return Packing(np.argsort(np.array(row_of, np.int64), kind="stable"), starts)
