"""How fast is a training step? One JSON line per named workload, through the library.

Random weights and tokens, AdamW with clipping, no padding. The median of the timed steps
is reported, after warm-up, with the loss and gradient norm beside it.

    python benchmarks/step_time.py A B
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.config import LlamaConfig, LoraConfig
from jlora.model import Llama
from jlora.optimizer import make_optimizer, make_schedule
from jlora.plan import (
    flops_per_token,
    peak_flops,
    peak_memory_bytes,
    plan_workload,
)
from jlora.rope_config import RopeParameters
from jlora.settings import ComputeConfig, MeshConfig, OptimConfig
from jlora.sharding import make_mesh
from jlora.training import TrainState, make_train_step

STEPS, WARM_UP = 8, 3


def llama(
    vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv: int, **more: Any
) -> LlamaConfig:
    """Returns a configuration of these sizes."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        rope_parameters=RopeParameters(more.pop("theta")),
        max_position_embeddings=131072,
        **more,
    )


LLAMA_2_7B = llama(32000, 4096, 11008, 32, 32, 32, theta=1e4)
LLAMA_3_8B = llama(128256, 4096, 14336, 32, 32, 8, theta=5e5)
SMOLLM2 = llama(49152, 576, 1536, 30, 9, 3, theta=1e5, tie_word_embeddings=True)
QV = LoraConfig(r=8)
ALL = LoraConfig(r=16, target_modules="all-linear")
# A workload whose name ends in -packed has rows of documents of this many tokens.
DOCUMENT = 512
# name: model, adapter, rows, tokens per row, compute settings
WORKLOADS: dict[str, tuple[LlamaConfig, LoraConfig, int, int, ComputeConfig]] = {
    "A": (LLAMA_2_7B, QV, 4, 2048, ComputeConfig(dtype="bfloat16", remat="minimal")),
    "B": (LLAMA_3_8B, ALL, 2, 4096, ComputeConfig(dtype="bfloat16", remat="minimal")),
    "B-least-memory": (
        LLAMA_3_8B,
        ALL,
        2,
        4096,
        ComputeConfig(dtype="bfloat16", remat="full"),
    ),
    "B-packed": (
        LLAMA_3_8B,
        ALL,
        2,
        4096,
        ComputeConfig(dtype="bfloat16", remat="minimal"),
    ),
    "E": (SMOLLM2, QV, 4, 256, ComputeConfig(dtype="float32")),
    "E-bfloat16": (SMOLLM2, QV, 4, 256, ComputeConfig(dtype="bfloat16")),
}


def random_base(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """Returns random frozen weights, made leaf by leaf on the device."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype),
        static_argnums=1,
    )
    leaves, structure = jax.tree.flatten(shapes)
    made = [
        draw(jax.random.key(i), leaf.shape)
        if leaf.ndim > 1
        else jnp.ones(leaf.shape, dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, made)


def measure(name: str) -> dict[str, Any]:
    """Returns the figures of one workload."""
    config, lora, rows, length, compute = WORKLOADS[name]
    dtype = jnp.dtype(compute.dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jlora.add_lora(random_base(config, dtype), lora, jax.random.key(1))
    work = plan_workload(
        config, params, mesh, compute=compute, rows=rows, length=length
    )
    packed = name.endswith("-packed")
    document = DOCUMENT if packed else length
    model = Llama(
        config,
        dtype,
        work.attention,
        work.remat,
        max_segments=length // document,
    )
    settings = OptimConfig()
    optimizer = make_optimizer(settings, make_schedule(settings, 100))
    flops = flops_per_token(params, config, length)
    state, frozen = TrainState.create(params, optimizer, mesh)
    del params
    step = make_train_step(
        model, optimizer, mesh, state=state, frozen=frozen, packed=packed
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, length + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((rows, length), np.float32),
        "segment_ids": np.tile(1 + np.arange(length) // document, (rows, 1)),
        "positions": np.tile(np.arange(length) % document, (rows, 1)),
    }
    batch = {key: x if x.dtype != np.int64 else np.int32(x) for key, x in batch.items()}
    batch = jax.device_put(batch)
    start = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    compile_s = time.perf_counter() - start
    losses, ends, metrics, pending = [], [], {}, None
    for _ in range(WARM_UP + STEPS + 1):
        state, metrics = compiled(state, frozen, batch)
        if pending is not None:  # read one step late, as a run does
            losses.append(float(pending["loss"]))
            ends.append(time.perf_counter())
        pending = metrics
    median = float(np.median(np.diff(ends)[WARM_UP - 1 :]))
    rate, peak = rows * length / median, peak_flops()
    return {
        "workload": name,
        "framework": "jlora",
        "device": jax.devices()[0].device_kind,
        "tokens_per_second": round(rate, 1),
        "step_ms": round(1e3 * median, 2),
        "mfu": round(flops * rate / peak, 4) if peak else None,
        "peak_gib": round(peak_memory_bytes() / 2**30, 2),
        "compile_s": round(compile_s, 1),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "grad_norm": round(float(metrics["grad_norm"]), 5),
        "remat": work.remat,
        "attention": work.attention,
        "versions": {"jax": jax.__version__},
    }


if __name__ == "__main__":
    for workload in sys.argv[1:] or ["E"]:
        print(json.dumps(measure(workload)), flush=True)
