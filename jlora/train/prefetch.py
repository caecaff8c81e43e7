"""Batches placed on the devices by a thread, while earlier steps still compute."""

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jlora.data.batch.batches import Dataset
from jlora.parallel.sharding import batch_sharding

_DEPTH = 2


def place_batch(dataset: Dataset, step: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns batch `step` as global arrays; this process makes the rows it holds.

    Which rows these are, the mesh says, so any number of processes has the same batch.
    """
    sharding = batch_sharding(mesh)
    shape = (dataset.batch_size, dataset.row_length)
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def rows(index: Any) -> dict[str, np.ndarray]:
        start, stop, _ = index[0].indices(dataset.batch_size)
        if (start, stop) not in made:
            made[start, stop] = dataset.batch(step, slice(start, stop))
        return made[start, stop]

    names = rows((slice(0, 0),))
    return {
        name: jax.make_array_from_callback(
            shape, sharding, lambda index, name=name: rows(index)[name]
        )
        for name in names
    }


class Prefetch:
    """Batches start, start + 1, ... before `stop`, two of them made ahead.

    A context manager and an iterator. An error in the thread is raised where the batch
    would have come.

    Attributes:
        waited_s: seconds that the caller has waited for batches. The devices may still be
            busy with earlier steps then, so that they idled for at most this long.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh, *, start: int, stop: int) -> None:
        """Begins at once."""
        self.waited_s = 0.0
        self._ready: queue.Queue[dict[str, jax.Array] | Exception] = queue.Queue(_DEPTH)
        self._closed = threading.Event()
        self._left = stop - start
        self._thread = threading.Thread(
            target=self._run,
            args=(dataset, mesh, range(start, stop)),
            name="prefetch",
            daemon=True,
        )
        self._thread.start()

    def _run(self, dataset: Dataset, mesh: Mesh, steps: range) -> None:
        for step in steps:
            try:
                item: dict[str, jax.Array] | Exception = place_batch(
                    dataset, step, mesh
                )
            except Exception as error:
                item = error
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, Exception):
                return

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Yields the batches in order."""
        while self._left > 0:
            begin = time.perf_counter()
            item = self._ready.get()
            self.waited_s += time.perf_counter() - begin
            if isinstance(item, Exception):
                raise item
            self._left -= 1
            yield item

    def __enter__(self) -> "Prefetch":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the thread, which finishes the batch it is at."""
        self._closed.set()
        self._thread.join()
