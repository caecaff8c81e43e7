"""Fixed-shape batches: a pure function of the data, the seed and the step."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from jlora.data.batch.packing import Packing, one_per_row, pack_documents
from jlora.data.cache.row_counts import Account
from jlora.data.cache.token_store import Store
from jlora.data.tokenize.tokenized_rows import Example

# Rows are rounded up to this many tokens, so that similar files share a compiled step.
_ROW_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenised records, laid out in rows of `row_length` tokens."""

    store: Store
    """Token ids and masks, on disk; a record's first token is never to be learnt."""
    starts: np.ndarray
    """int64 [num_records], where each record starts in the store."""
    lengths: np.ndarray
    """int64 [num_records], what is used of each."""
    num_supervised: int
    """Tokens per epoch that the loss counts."""
    rows: Packing
    """The records of each row, as ranks in the order of an epoch (see `_plan`)."""
    row_length: int
    batch_size: int
    pad_id: int
    seed: int
    shuffle: bool
    packing: bool
    summary: list[str] = field(default_factory=list)
    """Lines for the log."""
    accounts: list[Account] = field(default_factory=list)
    """What became of the rows of each source."""
    samples: list[Example] = field(default_factory=list)
    """A few examples to show."""
    # The plan of the epoch asked for last: a memo, no state.
    _plans: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        """Records that are trained on."""
        return len(self.starts)

    @property
    def num_rows(self) -> int:
        """Rows per epoch."""
        return self.rows.num_rows

    @property
    def max_segments(self) -> int:
        """Most records in one row."""
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
    def fingerprint(self) -> str:
        """A sha256 over tokens, masks and borders."""
        digest = hashlib.sha256(self.store.digest.encode())
        for array in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, "<i8").tobytes())
        return digest.hexdigest()

    def record(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens (int32) of a record and which of them are learnt (uint8)."""
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
        records, order = self._plan(epoch)
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
            column = 0
            ranks = self.rows.row(of_batch[row]) if row < len(of_batch) else []
            for segment, rank in enumerate(ranks, 1):
                column = self._put(batch, at, column, segment, int(records[rank]))
        return batch

    def _put(
        self,
        batch: dict[str, np.ndarray],
        row: int,
        column: int,
        segment: int,
        record: int,
    ) -> int:
        """Writes one record into a row; returns the column after it."""
        tokens, loss_mask = self.record(record)
        stop = column + len(tokens)
        batch["tokens"][row, column:stop] = tokens
        # The record's last position predicts nothing: its target would be the first
        # token of the next one.
        batch["targets"][row, column : stop - 1] = tokens[1:]
        batch["loss_mask"][row, column : stop - 1] = loss_mask[1:]
        batch["segment_ids"][row, column:stop] = segment
        batch["positions"][row, column:stop] = np.arange(stop - column)
        return stop

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rank -> record and the order of the rows in this epoch."""
        if epoch in self._plans:
            return self._plans[epoch]
        records = np.arange(self.num_records)
        order = np.arange(self.num_rows)
        if self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            records = rng.permutation(self.num_records)
            order = rng.permutation(self.num_rows)
        if self.packing:
            # Which rank shares a row with which depends on the sorted lengths
            # alone; which record has which rank among equals differs by epoch.
            lengths = self.lengths[records]
            records = records[np.argsort(-lengths, kind="stable")]
        self._plans.clear()
        self._plans[epoch] = records, order
        return records, order


def make_dataset(
    store: Store,
    starts: np.ndarray,
    lengths: np.ndarray,
    *,
    num_supervised: int,
    seq_len: int,
    packing: bool,
    batch_size: int,
    pad_id: int,
    seed: int,
    shuffle: bool,
) -> Dataset:
    """Returns the rows of records that are at most `seq_len` tokens long."""
    lengths = lengths.astype(np.int64)
    row_length = seq_len
    rows = one_per_row(len(lengths))
    if packing:
        rows = pack_documents(-np.sort(-lengths), seq_len)
    else:
        longest = int(lengths.max())
        row_length = min(seq_len, -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    return Dataset(
        store=store,
        starts=starts.astype(np.int64),
        lengths=lengths,
        num_supervised=num_supervised,
        rows=rows,
        row_length=row_length,
        batch_size=batch_size,
        pad_id=pad_id,
        seed=seed,
        shuffle=shuffle,
        packing=packing,
    )
