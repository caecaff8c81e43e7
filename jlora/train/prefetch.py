"""Place batches on the devices in a thread, while they still compute earlier steps."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jlora.data.batch.batches import Dataset
from jlora.parallel.sharding import batch_sharding, check_length

# Batches that are made or being made while one is in use.
_AHEAD = 3


def place_batch(dataset: Dataset, step: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns batch `step` as global arrays; this process makes only the rows it holds.

    The mesh decides which rows these are, so the batch is the same for any number of
    processes.

    Raises:
        UsageError: the mesh does not divide the tokens of a row.
    """
    check_length(mesh, dataset.row_length)
    sharding = batch_sharding(mesh)
    shape = (dataset.batch_size, dataset.row_length)
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def rows(index: Any) -> dict[str, np.ndarray]:
        first, end, _ = index[0].indices(dataset.batch_size)
        if (first, end) not in made:
            made[first, end] = dataset.batch(step, slice(first, end))
        return made[first, end]

    names = rows((slice(0, 0),))

    def part(name: str, index: Any) -> np.ndarray:
        return rows(index)[name][:, index[1]]

    return {
        name: jax.make_array_from_callback(shape, sharding, partial(part, name))
        for name in names
    }


class Prefetch:
    """Iterates over the batches of steps start, ..., stop - 1, and makes some in advance.

    A context manager: leaving it ends the thread. An error in the thread is raised where
    its batch is due.

    Attributes:
        waited_s: seconds spent waiting for batches. The devices may still have been busy
            with earlier steps, so they idled for at most this long.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh, *, start: int, stop: int) -> None:
        """Begins to make batches at once."""
        self.waited_s = 0.0
        self._dataset, self._mesh = dataset, mesh
        self._steps = iter(range(start, stop))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: deque[Future[dict[str, jax.Array]]] = deque()
        for _ in range(_AHEAD):
            self._make_next()

    def _make_next(self) -> None:
        for step in self._steps:
            self._pending.append(
                self._thread.submit(place_batch, self._dataset, step, self._mesh)
            )
            return

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Yields the batches in order."""
        while self._pending:
            pending = self._pending.popleft()
            self._make_next()
            begin = time.perf_counter()
            batch = pending.result()
            self.waited_s += time.perf_counter() - begin
            yield batch

    def __enter__(self) -> "Prefetch":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the thread, which finishes the batch that it is making."""
        self._thread.shutdown(cancel_futures=True)
