"""Cuts records to data.seq_len and drops those in which nothing is left to train on."""

from collections import Counter

import numpy as np

from jlora.data.cache.row_counts import RowCounts


def truncate_records(
    counts: RowCounts, records: np.ndarray, loss_mask: np.ndarray, first_file: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each record: whether it is kept, its length, and its supervised tokens.

    Args:
        counts: of the records' source; counts what is cut and dropped.
        records: RECORD [n], of this source only.
        loss_mask: of all records.
        first_file: the number of the source's first file in the records.
    """
    limit = counts.seq_len
    length, first = records["length"], records["first_supervised"]
    unsupervised = records["supervised"] == 0
    cut = ~unsupervised & (length > limit)
    cut_away = cut & (first >= limit)
    kept = ~(unsupervised | cut_away)
    new_length = np.minimum(length, limit)
    supervised = records["supervised"].copy()
    for index in np.flatnonzero(cut).tolist():
        start = records["start"][index]
        supervised[index] = loss_mask[start : start + limit].sum()
    for rows, which in (
        (counts.unsupervised, unsupervised),
        (counts.cut, cut),
        (counts.cut_away, cut_away),
    ):
        rows.count = int(which.sum())
        for record in records[np.flatnonzero(which)[: rows.MOST]]:
            rows.first.append([int(record["file"]) - first_file, int(record["number"])])
    bits, numbers = np.unique(np.frexp(length)[1], return_counts=True)
    counts.lengths = Counter(dict(zip(bits.tolist(), numbers.tolist(), strict=True)))
    counts.tokens_lost = int((length - limit)[cut].sum())
    counts.kept = int(kept.sum())
    counts.tokens = int(new_length[kept].sum())
    counts.supervised = int(supervised[kept].sum())
    return kept, new_length, supervised
