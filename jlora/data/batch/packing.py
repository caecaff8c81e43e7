"""Several documents in one row: best fit decreasing, few documents in any row."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# A kernel's memory and time grow with the most documents in a row, so their number is
# limited where that makes at most this share more rows.
_WORTH = 0.01
_FEWEST = 8


@dataclass(frozen=True, eq=False)
class Packing:
    """Rows of documents: row i holds `documents[starts[i] : starts[i + 1]]`."""

    documents: np.ndarray
    """int64 [num_documents], indices into the lengths, row by row."""
    starts: np.ndarray
    """int64 [num_rows + 1]."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    @property
    def max_documents(self) -> int:
        """Most documents in one row."""
        return int(np.diff(self.starts).max(initial=0))

    def row(self, index: int) -> np.ndarray:
        """Returns the documents of one row."""
        return self.documents[self.starts[index] : self.starts[index + 1]]


def one_per_row(count: int) -> Packing:
    """Returns rows of one document each, in order."""
    return Packing(np.arange(count), np.arange(count + 1))


def pack_documents(lengths: np.ndarray, capacity: int) -> Packing:
    """Returns rows of at most `capacity` tokens; `lengths` must not increase.

    The most documents per row is a power of two, the smallest one that costs at most 1 %
    more rows than no limit would. Depends on the lengths alone.

    Raises:
        ValueError: lengths that rise, or do not fit a row.
    """
    steps = np.diff(lengths)
    if len(lengths) and not (lengths[-1] > 0 and lengths[0] <= capacity):
        raise ValueError(
            f"lengths {lengths[0]} to {lengths[-1]} in rows of {capacity}; expected 1 to "
            f"{capacity}"
        )
    if (steps > 0).any():
        raise ValueError("lengths rise; expected falling ones")
    loosest = best_fit(lengths, capacity, capacity)  # a document has a token
    for limit in _limits(len(lengths) / max(1, loosest.num_rows)):
        if limit >= loosest.max_documents:
            break
        packing = best_fit(lengths, capacity, limit)
        if packing.num_rows <= (1 + _WORTH) * loosest.num_rows:
            return packing
    return loosest


def _limits(mean: float) -> Iterator[int]:
    """Yields the powers of two that leave room for the mean, smallest first."""
    limit = _FEWEST
    while True:
        if limit >= mean:
            yield limit
        limit *= 2


def best_fit(lengths: np.ndarray, capacity: int, limit: int) -> Packing:
    """Returns best fit decreasing with at most `limit` documents per row.

    Each document goes into the fullest row that has room for it, a new one otherwise;
    none is split. Documents too short to fill a row under the limit come last, and the
    others leave their share of every row to them. O(n log capacity).
    """
    short = lengths < capacity / limit
    share = lengths[short].sum() / max(1, lengths.sum())
    reserve = int(capacity * share)
    row_of, counts = array("q"), array("q")
    by_room: dict[int, list[int]] = {}  # rows with this much room, if there are any
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
