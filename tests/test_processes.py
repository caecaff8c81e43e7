"""Two processes of one device each train as one process does: same batches, same steps."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import json, sys
sys.path[:0] = ["tests", "."]
import jax
port, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import numpy as np
from data_cases import dataset_of
from jlora.data import Prefetch
from jlora.model import Llama
from jlora.optimizer import make_optimizer, make_schedule
from jlora.settings import MeshConfig
from jlora.sharding import make_mesh
from jlora.training import TrainState, make_train_step
from test_packed_training import documents
from training_cases import ADAM, adapted_params, llama_config

config = llama_config(num_hidden_layers=1)
mesh = make_mesh(MeshConfig(data=count))
optimizer = make_optimizer(ADAM, make_schedule(ADAM, 2))
state, frozen = TrainState.create(adapted_params(config), optimizer, mesh)
step = make_train_step(Llama(config), optimizer, mesh, state=state, frozen=frozen)
found = {"made": [], "loss": []}
with Prefetch(dataset_of(documents(60)), mesh, start=0, stop=2) as batches:
    for batch in batches:
        found["made"].append(len(batch["tokens"].addressable_shards[0].data))
        state, metrics = step(state, frozen, batch)
        found["loss"].append(float(metrics["loss"]))
        found["tokens"] = int(metrics["tokens"])
found["adapter"] = [
    float(np.abs(np.asarray(x.addressable_data(0))).sum())
    for x in jax.tree.leaves(state.trainable)
]
print(json.dumps(found), flush=True)
"""


def train(count: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    one_device = "--xla_force_host_platform_device_count=1"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, port, str(count), str(index)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in outputs]


@pytest.mark.slow
def test_two_processes_train_as_one_does():
    [alone] = train(1)
    first, second = train(2)
    assert first["made"] == second["made"] == [2, 2]  # of the four rows of a batch
    assert alone["made"] == [4, 4]
    assert first["loss"] == second["loss"]
    assert first["tokens"] == alone["tokens"]
    # Float32 sums in another order.
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert first["adapter"] == pytest.approx(alone["adapter"], rel=1e-5)
