"""Measures what packing gains, and whether the GPU waits for data.

Llama-3-8B with random weights, r=16 on all seven projections, bfloat16, 8192 tokens a step,
with the data set, prefetching thread and train step of the library. One JSON line per case:

- dense: rows of 4096 tokens that are one document, plain causal attention
- packed: short documents in the same rows; attention stays within a document
- padded: the same documents, one per row, in rows as long as the longest of them
- peer: PEFT on Transformers (packing_peer.py), with the same packed rows

The documents are instructions (70 %, median 100 tokens) and chats (30 %, median 350), both
log-normal, at most 2048 tokens long. tokens_per_second does not count padding. The peer runs
first, in its own process; a package that it lacks is reported. The last line is a summary.

    python benchmarks/packing_gpu.py [--tiny] [--cases peer packed]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

SEQ_LEN, ROWS, LONGEST, DOCUMENTS = 4096, 2, 2048, 20_000
STEPS, WARM_UP = 10, 3
SOME = 100  # tokens come from 1/SOME of the vocabulary, so that the loss falls quickly
RATE = 1e-3
PEER_LIMIT_S = 100
CASES = ["peer", "dense", "packed", "padded"]
TINY = "--tiny" in sys.argv
if TINY:  # to test the script on a CPU
    SEQ_LEN, ROWS, LONGEST, DOCUMENTS, STEPS = 256, 2, 128, 300, 3


def lengths() -> np.ndarray:
    """Returns the lengths of the documents, in random order."""
    rng = np.random.default_rng(0)
    median = np.where(rng.random(DOCUMENTS) < 0.7, 100, 350) * LONGEST / 2048
    drawn = np.exp(np.log(median) + 0.8 * rng.standard_normal(DOCUMENTS))
    return np.clip(drawn.astype(int), 8, LONGEST)


def data_set(vocab_size: int, *, packing: bool, batch_size: int) -> Any:
    """Returns documents of random tokens; the last two thirds of each are supervised."""
    from jlora.data.batch.batches import Dataset
    from jlora.data.cache.build_cache import make_block
    from jlora.data.cache.token_store import TokenStore
    from jlora.data.tokenize.tokenize_rows import Example

    rng = np.random.default_rng(1)
    examples = []
    for number, length in enumerate(lengths().tolist()):
        tokens = rng.integers(0, vocab_size // SOME, length, np.int32)
        mask = (np.arange(length) >= max(1, length // 3)).astype(np.uint8)
        examples.append(Example(Path("random"), number, tokens, mask))
    block = make_block(examples)
    return Dataset(
        TokenStore(block.tokens, block.loss_mask, block.records, note={}, digest=""),
        block.records["start"],
        block.records["length"],
        num_supervised=int(block.records["supervised"].sum()),
        seq_len=SEQ_LEN,
        packing=packing,
        batch_size=batch_size,
        pad_id=0,
        seed=0,
        shuffle=True,
    )


class Dense:
    """A data set whose rows are one document each, without padding."""

    batch_size, row_length, max_segments = ROWS, SEQ_LEN, 0

    def __init__(self, vocab_size: int) -> None:
        """Draws two batches."""
        rng = np.random.default_rng(2)
        shape = (2, ROWS, SEQ_LEN + 1)
        self._tokens = rng.integers(0, vocab_size // SOME, shape, np.int32)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns rows of batch `step`."""
        from step_time import unpadded_batch

        return unpadded_batch(self._tokens[step % 2][rows])


def settings() -> tuple[Any, Any, Any]:
    """Returns (model configuration, adapter, dtype)."""
    import jax.numpy as jnp
    from step_time import ALL, LLAMA_3_8B

    if not TINY:
        return LLAMA_3_8B, ALL, jnp.dtype("bfloat16")
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return replace(LLAMA_3_8B, vocab_size=512, **tiny), ALL, jnp.dtype("float32")


class Trainer:
    """The model with an adapter, shared by all cases."""

    def __init__(self) -> None:
        """Draws the weights."""
        import jax
        from step_time import random_base

        import jlora
        from jlora.config.run_config import MeshConfig
        from jlora.parallel.sharding import make_mesh

        self.config, lora, self.dtype = settings()
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        base = random_base(self.config, self.dtype)
        self.params = jlora.add_lora(base, lora, jax.random.key(1))

    def measure(self, name: str, data: Any, *, packed: bool) -> dict[str, Any]:
        """Returns the results of one case."""
        import jax

        from jlora.config.optim_config import OptimConfig
        from jlora.config.run_config import ComputeConfig
        from jlora.model.llama import Llama
        from jlora.train.memory_estimate import peak_memory_bytes, plan_workload
        from jlora.train.optimizer import make_optimizer, make_schedule
        from jlora.train.prefetch import Prefetch
        from jlora.train.step import TrainState, make_train_step

        rows, length = data.batch_size, data.row_length
        compute = ComputeConfig(dtype=self.dtype.name, remat="minimal")
        work = plan_workload(
            self.config,
            self.params,
            self.mesh,
            compute=compute,
            rows=rows,
            length=length,
            max_segments=data.max_segments if packed else 0,
        )
        model = Llama.with_compute(self.config, work.compute)
        optim = OptimConfig(learning_rate=RATE, lr_schedule="constant")
        optimizer = make_optimizer(optim, make_schedule(optim, 100))
        state, frozen = TrainState.create(self.params, optimizer, self.mesh)
        step = make_train_step(
            model, optimizer, self.mesh, state=state, frozen=frozen, packed=packed
        )
        log = Log()
        with Prefetch(data, self.mesh, start=0, stop=WARM_UP + STEPS) as batches:
            for batch in batches:
                if log.compile_s is None:
                    begin = time.perf_counter()
                    step = step.lower(state, frozen, batch).compile()
                    log.compile_s = time.perf_counter() - begin
                state, metrics = step(state, frozen, batch)
                log.add(metrics, batches.waited_s)
            log.flush()
        how = f"{work.compute.attention}, kernels {work.compute.kernels}"
        return log.figures(name, data, how, peak_memory_bytes(), jax)


class Log:
    """Collects the metrics of the steps, reading them one step late as a run does."""

    def __init__(self) -> None:
        """Creates an empty log."""
        self.compile_s: float | None = None
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.supervised: list[int] = []
        self.ends: list[float] = []
        self.waited: list[float] = []
        self.norm = 0.0
        self._pending: tuple[Any, float] | None = None

    def add(self, metrics: Any, waited_s: float) -> None:
        """Adds a step, which may still be running."""
        self.flush()
        self._pending = metrics, waited_s

    def flush(self) -> None:
        """Waits for the last step that was added, and reads its metrics."""
        if self._pending is None:
            return
        (metrics, waited), self._pending = self._pending, None
        self.losses.append(float(metrics["loss"]))
        self.tokens.append(int(metrics["tokens"]))
        self.supervised.append(int(metrics["supervised_tokens"]))
        self.norm = float(metrics["grad_norm"])
        self.ends.append(time.perf_counter())
        self.waited.append(waited)

    def figures(
        self, name: str, data: Any, how: str, peak: int, jax: Any
    ) -> dict[str, Any]:
        """Returns the results of the steps after the warm-up."""
        seconds = self.ends[-1] - self.ends[WARM_UP - 1]
        real = sum(self.tokens[WARM_UP:])
        padded = STEPS * data.batch_size * data.row_length
        wait = self.waited[-1] - self.waited[WARM_UP - 1]
        return {
            "case": name,
            "framework": "jlora",
            "device": jax.devices()[0].device_kind,
            "rows": [data.batch_size, data.row_length],
            "tokens_per_second": round(real / seconds, 1),
            "supervised_per_second": round(sum(self.supervised[WARM_UP:]) / seconds, 1),
            "padded_per_second": round(padded / seconds, 1),
            "fill": round(real / padded, 4),
            "max_segments": data.max_segments,
            "step_ms": round(1e3 * seconds / STEPS, 2),
            "waiting_for_data": round(wait / seconds, 5),
            "compile_s": round(self.compile_s or 0, 1),
            "peak_gib": round(peak / 2**30, 2),
            "loss": [round(self.losses[0], 3), round(self.losses[-1], 3)],
            "grad_norm": round(self.norm, 5),
            "attention": how,
            "jax": jax.__version__,
        }


def run_peer() -> dict[str, Any]:
    """Returns the results of the peer, or the reason why there are none."""
    script = str(Path(__file__).with_name("packing_peer.py"))
    command = [sys.executable, script, *(["--tiny"] if TINY else [])]
    # PyTorch gets the memory of the GPU; jlora only makes the data set.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PEER_LIMIT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"case": "peer", "missing": f"took more than {PEER_LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"case": "peer", "missing": reason[:300]}


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratios between the cases that ran."""
    rate = {name: case.get("tokens_per_second") for name, case in cases.items()}
    packed = cases.get("packed", {})
    ratios = {
        f"packed/{name}": round(rate["packed"] / rate[name], 3)
        for name in ("dense", "padded", "peer")
        if rate.get("packed") and rate.get(name)
    }
    return {
        "tokens_per_second, no padding counted": rate,
        **ratios,
        "packed fill": packed.get("fill"),
        "packed waiting_for_data": packed.get("waiting_for_data"),
    }


def main() -> None:
    """Runs the cases of the command line, the peer first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    wanted = parser.parse_args().cases
    found: dict[str, dict[str, Any]] = {}

    def show(figures: dict[str, Any]) -> None:
        found[figures["case"]] = figures
        print(json.dumps(figures), flush=True)

    if "peer" in wanted:
        show(run_peer())
    if set(wanted) - {"peer"}:
        trainer = Trainer()
        size = trainer.config.vocab_size
        if "dense" in wanted:
            show(trainer.measure("dense", Dense(size), packed=False))
        if "packed" in wanted:
            data = data_set(size, packing=True, batch_size=ROWS)
            show(trainer.measure("packed", data, packed=True))
        if "padded" in wanted:
            rows = ROWS * SEQ_LEN // LONGEST
            data = data_set(size, packing=False, batch_size=rows)
            show(trainer.measure("padded", data, packed=False))
    print(json.dumps({"summary": summary(found)}), flush=True)


if __name__ == "__main__":
    main()
