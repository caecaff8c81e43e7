"""Measures the time of a training step and prints one JSON line for each workload.

The weights and tokens are random, without padding; the optimizer is AdamW with clipping. A
line has the median of the timed steps, the last loss and the gradient norm. Lines are also
appended to `--out`, from which `table.py` makes the table of docs/performance.md.

    python benchmarks/step_time.py A B
    python benchmarks/step_time.py B --data 2

With `--data`, `--fsdp` or `--tensor` there are several devices, and a step has the rows of
the workload for each. Tokens per second and MFU count all of them; memory is that of the
first device, which also draws the weights. `scaling.py` compares meshes.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jlora
from jlora.cli.process_setup import keep_compiled, keep_freed_memory
from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.config.optim_config import OptimConfig
from jlora.config.rope_config import RopeParameters
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.lora.adapter_tree import Params
from jlora.model.llama import Llama
from jlora.ops.quantize import BLOCK, NF4
from jlora.parallel.sharding import MESH_AXES, batch_sharding, make_mesh
from jlora.train.flops import flops_per_token, peak_flops
from jlora.train.memory_estimate import peak_memory_bytes, plan_workload
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.planning import planned_bytes
from jlora.train.step import TrainState, make_train_step
from jlora.train.step_time_model import step_time

STEPS, WARM_UP = 8, 3
RESULTS = Path(__file__).parent / "results" / "step_time.jsonl"


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
LLAMA_3_70B = llama(128256, 8192, 28672, 80, 64, 8, theta=5e5)
TINY = llama(512, 128, 256, 2, 4, 2, theta=1e4)
SMOLLM2 = llama(49152, 576, 1536, 30, 9, 3, theta=1e5, tie_word_embeddings=True)
QV = LoraConfig(r=8)
ALL = LoraConfig(r=16, target_modules="all-linear")
BFLOAT16 = ComputeConfig(dtype="bfloat16", remat="minimal")


@dataclass(frozen=True)
class Workload:
    """A model, an adapter and the size of a step."""

    config: LlamaConfig
    lora: LoraConfig
    rows: int
    """For each device, or for those that share rows."""
    length: int
    """Tokens per row."""
    compute: ComputeConfig = BFLOAT16
    document: int | None = None
    """Tokens of each document in a packed row; None if a row is one document."""

    def rows_on(self, mesh: Mesh) -> int:
        """Returns the rows of a step on these devices."""
        return self.rows * mesh.size // mesh.shape["context"]


A = Workload(LLAMA_2_7B, QV, 4, 2048)
B = Workload(LLAMA_3_8B, ALL, 2, 4096)
E = Workload(SMOLLM2, QV, 4, 256, ComputeConfig(dtype="float32"))
WORKLOADS = {
    "A": A,
    "A-dropout": replace(A, lora=replace(QV, lora_dropout=0.1)),
    "A-dora": replace(A, lora=replace(QV, use_dora=True)),
    "B": B,
    "B-dora": replace(B, lora=replace(ALL, use_dora=True)),
    "B-dropout": replace(B, lora=replace(ALL, lora_dropout=0.1)),
    "B-full": replace(B, compute=replace(BFLOAT16, remat="full")),
    "B-least-memory": replace(B, compute=replace(BFLOAT16, remat="offload")),
    "B-packed": replace(B, document=512),
    "B-8k": replace(B, rows=1, length=8192),
    "B-16k": replace(B, rows=1, length=16384),
    "B-128k": replace(
        B, rows=1, length=131072, compute=replace(BFLOAT16, remat="offload")
    ),
    "B-short": replace(B, length=2048, compute=replace(BFLOAT16, remat="offload")),
    "C": Workload(LLAMA_3_70B, ALL, 1, 4096, replace(BFLOAT16, remat="offload")),
    "E": E,
    "tiny": replace(E, config=TINY, rows=2, length=32),
    "E-bfloat16": replace(E, compute=ComputeConfig(dtype="bfloat16")),
}


def random_base(config: LlamaConfig, dtype: Any, stored: str = "keep") -> Params:
    """Returns random frozen weights, drawn and quantised leaf by leaf on the device."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    number = iter(range(2**31))

    def draw(shape: tuple[int, ...], name: str, module: str) -> dict[str, Any]:
        if len(shape) == 1:
            return {name: jnp.ones(shape, dtype)}
        quantize = stored if stored in QUANTIZERS and module.endswith("_proj") else None
        key = jax.random.key(next(number))
        return _draw(key, shape, name, dtype, quantize)

    def visit(tree: Params, module: str = "") -> Params:
        made: Params = {}
        for name, part in tree.items():
            made |= (
                {name: visit(part, name)}
                if isinstance(part, dict)
                else draw(part.shape, name, module)
            )
        return made

    return visit(shapes)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(
    key: Any, shape: tuple[int, ...], name: str, dtype: Any, quantize: str | None
) -> dict[str, Any]:
    drawn = 0.02 * jax.random.normal(key, shape, dtype)
    return {name: drawn} if quantize is None else QUANTIZERS[quantize](drawn)


def _per_column(kernel: Any, largest: float, dtype: Any) -> dict[str, Any]:
    scale = jnp.abs(kernel).max(axis=0).astype(jnp.float32) / largest
    codes = kernel / scale
    codes = jnp.rint(codes) if dtype == jnp.int8 else codes
    return {"kernel_q": codes.astype(dtype), "kernel_scale": scale}


def _nf4(kernel: Any) -> dict[str, Any]:
    blocks = kernel.astype(jnp.float32).reshape(-1, BLOCK, kernel.shape[1])
    absmax = jnp.abs(blocks).max(axis=1)
    blocks = (blocks / absmax[:, None]).reshape(kernel.shape)
    borders = (NF4[1:] + NF4[:-1]) / 2
    codes: Any = sum((blocks > border).astype(jnp.uint8) for border in borders)
    return {"kernel_q": codes[::2] << 4 | codes[1::2], "kernel_absmax": absmax}


# The quantisation of `jlora.ops.quantize`, which runs on the host, on the device. Codes
# drawn at random would not do: their mean is not 0, which gives a matrix of large norm.
QUANTIZERS = {
    "nf4": _nf4,
    "int8": partial(_per_column, largest=127.0, dtype=jnp.int8),
    "fp8": partial(_per_column, largest=448.0, dtype=jnp.float8_e4m3fn),
}


def random_batch(work: Workload, mesh: Mesh) -> dict[str, Any]:
    """Returns a batch of random tokens on the devices."""
    shape = work.rows_on(mesh), work.length + 1
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, work.config.vocab_size, shape, np.int32)
    return jax.device_put(unpadded_batch(tokens, work.document), batch_sharding(mesh))


def unpadded_batch(tokens: np.ndarray, document: int | None = None) -> dict[str, Any]:
    """Returns the batch that trains on rows of T + 1 tokens, split into documents."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    size = document or length
    index = np.arange(length, dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((rows, length), np.float32),
        "segment_ids": np.tile(1 + index // size, (rows, 1)),
        "positions": np.tile(index % size, (rows, 1)),
    }


def prepare(
    work: Workload, mesh: Mesh
) -> tuple[Any, TrainState, Params, dict[str, Any]]:
    """Returns (jitted step, its state, frozen weights, entries of the result line)."""
    dtype = jnp.dtype(work.compute.dtype)
    start = time.perf_counter()
    base = jax.block_until_ready(
        random_base(work.config, dtype, work.compute.base_dtype)
    )
    weights_s = time.perf_counter() - start
    params = jlora.add_lora(base, work.lora, jax.random.key(1))
    rows = work.rows_on(mesh)
    planned = plan_workload(
        work.config,
        params,
        mesh,
        compute=work.compute,
        rows=rows,
        length=work.length,
        max_segments=work.length // (work.document or work.length),
    )
    plan, expected = planned.compute, step_time(params, planned, mesh)
    model = Llama.with_compute(work.config, plan)
    model = model.clone(lora_dropout=work.lora.lora_dropout)
    settings = OptimConfig()
    optimizer = make_optimizer(settings, make_schedule(settings, 100))
    state, frozen = TrainState.create(params, optimizer, mesh)
    packed = work.document is not None
    step = make_train_step(
        model, optimizer, mesh, state=state, frozen=frozen, packed=packed
    )
    facts = {
        "weights_s": weights_s,
        "remat": plan.remat,
        "attention": plan.attention,
        "kernels": plan.kernels,
        "base_dtype": work.compute.base_dtype,
        "layer_gib": _gib(frozen["layers"]["0"]),
        "predicted_tokens_per_second": round(rows * work.length / expected.total, 1)
        if expected
        else None,
        "exposed_ms": round(1e3 * expected.exposed, 2) if expected else None,
        "planned_gib": round(sum(planned_bytes(params, planned).values()) / 2**30, 2),
        "flops": flops_per_token(params, work.config, work.document or work.length),
    }
    return step, state, frozen, facts


def _gib(tree: Any) -> float:
    return round(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**30, 4)


def collectives(text: str) -> dict[str, Any]:
    """Returns {kind: [how many, GiB of their results, how many in loops]} of a program.

    What is in a loop counts once.
    """
    found: dict[str, list[float]] = {}
    parts = re.findall(r"^(?:ENTRY )?(%\S+) .*?\{\n(.*?)^\}$", text, re.M | re.S)
    looped = set(re.findall(r"(?:body|condition)=(%[\w.\-]+)", text))
    calls = {name: set(re.findall(r"=(%[\w.\-]+)", body)) for name, body in parts}
    while more := {c for name in looped for c in calls.get(name, ())} - looped:
        looped |= more
    pattern = re.compile(rf"= (.+?) ({_KINDS})(-start)?\(")
    for name, body in parts:
        # On a TPU the start of a collective, the products beside it, and its end name it.
        if "async_collective_fusion" in name or "AsyncCollectiveDone" in body:
            continue
        for match in filter(None, map(pattern.search, body.splitlines())):
            # A start has a tuple of operands before the results.
            result = re.sub(r"^\(\(.*?\), ", "", match[1]) if match[3] else match[1]
            entry = found.setdefault(match[2], [0, 0.0, 0])
            entry[0] += 1
            entry[1] = round(entry[1] + _type_bytes(result) / 2**30, 4)
            entry[2] += name in looped
    return found


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def _type_bytes(text: str) -> float:
    """Returns the bytes of the arrays in the text of a type, such as (f32[2,3]{1,0}, s8[])."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits) // 8)
        for bits, sizes in re.findall(r"[a-z]+(\d+)\w*\[([\d,]*)\]", text)
    )


def process_seconds() -> float:
    """Returns the age of this process, on Linux."""
    ticks = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    uptime = Path("/proc/uptime").read_text().split()[0]
    return float(uptime) - int(ticks) / os.sysconf("SC_CLK_TCK")


def measure(
    name: str, work: Workload, mesh: Mesh, *, steps: int = STEPS
) -> dict[str, Any]:
    """Returns the results of one workload."""
    step, state, frozen, facts = prepare(work, mesh)
    batch = random_batch(work, mesh)
    start = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    compile_s = time.perf_counter() - start
    losses, ends, metrics, pending, first_step_s = [], [], {}, None, 0.0
    for _ in range(WARM_UP + steps + 1):
        state, metrics = compiled(state, frozen, batch)
        if pending is None:
            jax.block_until_ready(metrics)
            first_step_s = process_seconds() - facts.pop("weights_s")
        else:  # the loss is read one step late, as in a run
            losses.append(float(pending["loss"]))
            ends.append(time.perf_counter())
        pending = metrics
    median = float(np.median(np.diff(ends)[WARM_UP - 1 :]))
    rate, peak = batch["tokens"].size / median, peak_flops(mesh.size)
    flops = facts.pop("flops")
    device = jax.devices()[0].device_kind
    if mesh.size > 1:
        axes = (f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        device = f"{mesh.size} x {device}, {', '.join(axes)}"
        facts["collectives"] = collectives(compiled.as_text())
    return {
        "workload": name,
        "framework": "jlora",
        "device": device,
        "tokens_per_second": round(rate, 1),
        "step_ms": round(1e3 * median, 2),
        "mfu": round(flops * rate / peak, 4) if peak else None,
        "peak_gib": round(peak_memory_bytes() / 2**30, 2),
        "compile_s": round(compile_s, 1),
        "first_step_without_weights_s": round(first_step_s, 1),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "grad_norm": round(float(metrics["grad_norm"]), 5),
        **facts,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def main() -> None:
    """Measures each workload of the command line in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="append the lines to this file"
    )
    parser.add_argument("--kernels", choices=("auto", "xla", "hopper"), default="auto")
    parser.add_argument("--base-dtype", choices=QUANTIZERS, help="quantise the weights")
    parser.add_argument("--remat", choices=("none", "minimal", "full", "offload"))
    parser.add_argument(
        "--cache", action="store_true", help="keep compiled programs between runs"
    )
    parser.add_argument("--layers", type=int, help="use this many layers")
    for axis in MESH_AXES:
        parser.add_argument(f"--{axis}", type=int, default=1, help="number of devices")
    args = parser.parse_args()
    if len(args.workloads) > 1:  # the peak of memory is counted for a process
        options = [a for a in sys.argv[1:] if a not in args.workloads]
        for name in args.workloads:
            subprocess.run([sys.executable, __file__, *options, name], check=True)
        return
    keep_freed_memory()  # as train.py does
    if args.cache:
        keep_compiled()
    (name,) = args.workloads
    work = WORKLOADS[name]
    compute = replace(
        work.compute,
        kernels=args.kernels,
        base_dtype=args.base_dtype or work.compute.base_dtype,
        remat=args.remat or work.compute.remat,
    )
    layers = args.layers or work.config.num_hidden_layers
    config = replace(work.config, num_hidden_layers=layers)
    mesh = make_mesh(MeshConfig(**{axis: getattr(args, axis) for axis in MESH_AXES}))
    found = measure(name, replace(work, config=config, compute=compute), mesh)
    line = json.dumps(found | ({"layers": layers} if args.layers else {}))
    print(line, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
