import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.data_cases import dataset_of

from jlora.config.run_config import MeshConfig
from jlora.data.batch.batches import Dataset
from jlora.data.tokenize.tokenize_rows import Example
from jlora.parallel.sharding import batch_sharding, make_mesh
from jlora.train.prefetch import Prefetch, place_batch

MESHES = [
    MeshConfig(data=1),
    MeshConfig(data=2),
    MeshConfig(data=2, fsdp=2),
    MeshConfig(data=2, tensor=4),
    MeshConfig(data=2, context=4),
]


def mesh_of(config: MeshConfig = MESHES[0]):
    return make_mesh(config)


@pytest.fixture
def data() -> Dataset:
    rng = np.random.default_rng(0)
    examples = [
        Example(
            Path("a"), i, rng.integers(0, 99, n).astype(np.int32), np.ones(n, np.uint8)
        )
        for i, n in enumerate(rng.integers(2, 30, 40))
    ]
    return dataset_of(examples)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The steps whose batches were made; that of step 2 cannot be."""
    steps: list[int] = []
    make = Dataset.batch

    def batch(self, step, rows=slice(None)):
        if rows != slice(0, 0):
            steps.append(step)
        if step == 2:
            raise OSError("the disk is gone")
        return make(self, step, rows)

    monkeypatch.setattr(Dataset, "batch", batch)
    return steps


@pytest.mark.parametrize("mesh", MESHES)
def test_placed_batch_is_the_batch_on_every_mesh(data, mesh):
    mesh = mesh_of(mesh)
    placed = place_batch(data, 1, mesh)
    assert {x.sharding for x in placed.values()} == {batch_sharding(mesh)}
    np.testing.assert_equal(jax.device_get(placed), data.batch(1))


@pytest.mark.parametrize("start", [0, 3])
def test_batches_come_in_order_from_the_step_to_resume_at(data, start):
    with Prefetch(data, mesh_of(), start=start, stop=start + 4) as batches:
        found = [jax.device_get(batch) for batch in batches]
    np.testing.assert_equal(found, [data.batch(start + i) for i in range(4)])


def test_error_of_the_thread_comes_where_the_batch_would_have_come(data, asked):
    found = []
    with (
        pytest.raises(OSError, match="the disk is gone"),
        Prefetch(data, mesh_of(), start=0, stop=9) as batches,
    ):
        found.extend(batches)
    assert len(found) == 2
    assert not threads()


def test_leaving_early_stops_the_thread(data):
    with Prefetch(data, mesh_of(), start=0, stop=10**9) as batches:
        next(iter(batches))
        assert threads()
    assert not threads()


def test_no_more_than_two_batches_lie_ready(data, asked):
    with Prefetch(data, mesh_of(), start=3, stop=99):
        time.sleep(0.5)
        assert asked == [3, 4, 5]  # two in the queue, one in hand


def test_time_spent_waiting_is_counted(data):
    with Prefetch(data, mesh_of(), start=0, stop=3) as batches:
        ready = iter(batches)
        next(ready)
        time.sleep(0.3)
        before = batches.waited_s
        next(ready)
        assert batches.waited_s - before < 0.1
        assert batches.waited_s > 0
