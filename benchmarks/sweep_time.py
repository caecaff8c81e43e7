"""Compares the training of several adapters together with training them one by one.

Every adapter has its own small batch. A line has the time of a step for all of them
together (`jlora.train.sweep`, as in `train.py --sweep`) and that of one adapter's step,
both the median after warm-up. The weights and tokens are random.

    for name in 8B-1024 8B-512 8B-256; do python benchmarks/sweep_time.py $name; done
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from step_time import ALL, LLAMA_3_8B, SMOLLM2, TINY, random_base, unpadded_batch

import jlora
from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.model.llama import Llama
from jlora.parallel.sharding import make_mesh
from jlora.train.memory_estimate import peak_memory_bytes, plan_workload
from jlora.train.sweep import make_sweep_trainer
from jlora.train.sweep_file import compute_for_adapters
from jlora.train.trainer import TrainedAdapter, Trainer, make_trainer

STEPS, WARM_UP, TOTAL = 8, 3, 100
BFLOAT16 = ComputeConfig(dtype="bfloat16")
# name: model, compute settings, adapters, rows per adapter, tokens per row
WORKLOADS = {
    "8B-256": (LLAMA_3_8B, BFLOAT16, 4, 1, 256),
    "8B-512": (LLAMA_3_8B, BFLOAT16, 4, 1, 512),
    "8B-1024": (LLAMA_3_8B, BFLOAT16, 4, 1, 1024),
    "8B-1024-minimal": (LLAMA_3_8B, replace(BFLOAT16, remat="minimal"), 4, 1, 1024),
    "8B-512-eight": (LLAMA_3_8B, BFLOAT16, 8, 1, 512),
    "SmolLM2-64": (SMOLLM2, ComputeConfig(dtype="float32"), 4, 1, 64),
    "tiny": (TINY, ComputeConfig(dtype="float32"), 4, 1, 32),
}


def median_ms(trainer: Trainer, batches: list[Any]) -> dict[str, Any]:
    """Returns the median time of a step, the time to compile it and the last losses."""
    state = trainer.state
    ends, losses, pending = [time.perf_counter()], [], None
    for _ in range(1 + WARM_UP + STEPS):
        state, metrics = trainer.step(state, batches)
        if pending is not None:  # the loss is read one step late, as in a run
            losses.append(np.asarray(pending["loss"]).tolist())
            ends.append(time.perf_counter())
        pending = metrics
    times = np.diff(ends)
    median = float(np.median(times[WARM_UP:]))
    return {"ms": 1e3 * median, "compile_s": times[0] - median, "loss": losses[-1]}


def batch_of(vocabulary: int, rows: int, length: int, seed: int) -> dict[str, Any]:
    """Returns a batch of random tokens on the device."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length + 1), np.int32)
    return jax.device_put(unpadded_batch(tokens))


def measure(name: str) -> dict[str, Any]:
    """Returns the results of one workload."""
    config, compute, count, rows, length = WORKLOADS[name]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    base = random_base(config, jnp.dtype(compute.dtype))
    batches = [batch_of(config.vocab_size, rows, length, i) for i in range(count)]
    members = []
    for i in range(count):
        optim = OptimConfig(learning_rate=1e-4 * (i + 1))
        params = jlora.add_lora(base, ALL, jax.random.key(i))
        members.append(
            TrainedAdapter.create(params, optim, mesh, seed=i, lora_dropout=0.0)
        )

    def model_for(adapters: int) -> tuple[Llama, str]:
        work = plan_workload(
            config,
            params,
            mesh,
            compute=compute_for_adapters(compute, adapters, packed=False),
            rows=rows,
            length=length,
            adapters=adapters,
        )
        return Llama.with_compute(config, work.compute), work.compute.remat

    # Before the step of one adapter, which donates that adapter's state.
    model, remat_together = model_for(count)
    sweep = make_sweep_trainer(
        members,
        model,
        mesh,
        total_steps=TOTAL,
        orders=list(range(count)),
        packed=False,
    )
    model, remat_alone = model_for(1)
    one = make_trainer(members[0], model, mesh, total_steps=TOTAL, packed=False)
    alone = median_ms(one, batches)
    peak_alone = peak_memory_bytes()
    together = median_ms(sweep, batches)
    return {
        "workload": name,
        "device": jax.devices()[0].device_kind,
        "adapters": count,
        "tokens_per_adapter": rows * length,
        "alone_ms": round(alone["ms"], 2),
        "together_ms": round(together["ms"], 2),
        "per_adapter_ms": round(together["ms"] / count, 2),
        "ratio": round(together["ms"] / (count * alone["ms"]), 4),
        "loss_alone": round(alone["loss"], 5),
        "loss_together": [round(loss, 5) for loss in together["loss"]],
        "compile_s": [round(x["compile_s"], 1) for x in (alone, together)],
        "peak_gib": [round(x / 2**30, 2) for x in (peak_alone, peak_memory_bytes())],
        "remat": [remat_alone, remat_together],
        "attention": model.attention,
        "kernels_alone": model.kernels,
        "versions": {"jax": jax.__version__},
    }


if __name__ == "__main__":
    for workload in sys.argv[1:] or ["tiny"]:
        print(json.dumps(measure(workload)), flush=True)
