"""Batches of fixed shape, each a pure function of the data, the seed and the step."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jlora.data.batch.packing import Packing, one_per_row, pack_documents
from jlora.data.cache.row_counts import RowCounts
from jlora.data.cache.token_store import TokenStore
from jlora.data.tokenize.tokenize_rows import Example
from jlora.errors import counted

# Row lengths are rounded up to a multiple, so that similar data shares a compiled step.
_ROW_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenised records, arranged in rows, packed or one per row."""

    store: TokenStore
    """Token ids and masks, on disk; the loss never counts a record's first token."""
    starts: np.ndarray
    """int64 [num_records], where each record starts in the store."""
    lengths: np.ndarray
    """int64 [num_records], how many tokens of each are used; at most `seq_len`."""
    num_supervised: int
    """Tokens per epoch that the loss counts."""
    seq_len: int
    packing: bool
    batch_size: int
    pad_id: int
    seed: int
    shuffle: bool
    name: str = ""
    """Of the data, for the log."""
    source_lines: list[str] = field(default_factory=list)
    """Lines of the log about the sources."""
    row_counts: list[RowCounts] = field(default_factory=list)
    """What happened to the rows of each source."""
    samples: list[Example] = field(default_factory=list)
    """A few examples to show."""
    # Caches the order of the epoch that was asked for last.
    _orders: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Packing:
        """The records of each row, as positions in the order of an epoch (`_order`)."""
        if self.packing:
            return pack_documents(-np.sort(-self.lengths), self.seq_len)
        return one_per_row(len(self.lengths))

    @cached_property
    def row_length(self) -> int:
        """Tokens per row."""
        if self.packing:
            return self.seq_len
        rounded = -(-int(self.lengths.max()) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return min(self.seq_len, rounded)

    @property
    def summary(self) -> list[str]:
        """Lines for the log."""
        supervised = self.num_supervised / self.num_tokens
        packed = ", packed" if self.packing else ""
        fill = self.num_tokens / (self.num_rows * self.row_length)
        return [
            *self.source_lines,
            f"{self.name}: {counted(self.num_records, 'record')}, "
            f"{self.num_tokens:,} tokens, {self.num_supervised:,} of them supervised "
            f"({supervised:.1%})",
            f"{self.name}: {counted(self.num_rows, 'row')} of {self.row_length:,} "
            f"tokens{packed}, {fill:.1%} full",
        ]

    @property
    def num_records(self) -> int:
        """The number of records."""
        return len(self.starts)

    @property
    def num_rows(self) -> int:
        """Rows per epoch."""
        return self.rows.num_rows

    @property
    def max_segments(self) -> int:
        """The most records in any row."""
        return self.rows.max_documents

    @property
    def num_tokens(self) -> int:
        """Tokens per epoch, without padding."""
        return int(self.lengths.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every record once."""
        return -(-self.num_rows // self.batch_size)

    @property
    def revisions(self) -> list[str]:
        """The data sets of the hub that it is from, as owner/name@commit."""
        return sorted({counts.source.hub for counts in self.row_counts} - {""})

    @property
    def fingerprint(self) -> str:
        """A sha256 of the tokens, masks and lengths of all records, and of `revisions`."""
        digest = hashlib.sha256(self.store.digest.encode())
        digest.update("".join(self.revisions).encode())
        for array in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, "<i8").tobytes())
        return digest.hexdigest()

    def record(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens (int32) of a record and its loss mask (uint8)."""
        start = self.starts[index]
        end = start + self.lengths[index]
        return self.store.tokens[start:end], self.store.loss_mask[start:end]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns rows of batch `step` (0, 1, ...), each array [rows, row_length].

        tokens and targets int32, loss_mask float32 (1 where the target counts),
        segment_ids int32 (0 for padding, documents 1, 2, ...), positions int32 (from 0
        in every document). The last batch of an epoch ends in rows of padding.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        records, order = self._order(epoch)
        wanted = range(self.batch_size)[rows]
        shape = (len(wanted), self.row_length)
        batch = {
            "tokens": np.full(shape, self.pad_id, np.int32),
            "targets": np.full(shape, self.pad_id, np.int32),
            "loss_mask": np.zeros(shape, np.float32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        of_batch = order[index * self.batch_size :][: self.batch_size].tolist()
        for at, row in enumerate(wanted):
            start = 0
            documents = self.rows.row(of_batch[row]) if row < len(of_batch) else []
            for segment, document in enumerate(documents, 1):
                tokens, loss_mask = self.record(int(records[document]))
                stop = start + len(tokens)
                batch["tokens"][at, start:stop] = tokens
                # A record's last position predicts nothing: its target would be the
                # first token of the next record.
                batch["targets"][at, start : stop - 1] = tokens[1:]
                batch["loss_mask"][at, start : stop - 1] = loss_mask[1:]
                batch["segment_ids"][at, start:stop] = segment
                batch["positions"][at, start:stop] = np.arange(len(tokens))
                start = stop
        return batch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the records in the order of this epoch, and the order of its rows."""
        if epoch in self._orders:
            return self._orders[epoch]
        records = np.arange(self.num_records)
        order = np.arange(self.num_rows)
        if self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            records = rng.permutation(self.num_records)
            order = rng.permutation(self.num_rows)
        if self.packing:
            # The packing depends on the sorted lengths alone. Which of the records of
            # equal length shares a row with which differs by epoch.
            lengths = self.lengths[records]
            records = records[np.argsort(-lengths, kind="stable")]
        self._orders.clear()
        self._orders[epoch] = records, order
        return records, order
