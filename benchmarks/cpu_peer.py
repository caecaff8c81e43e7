"""Compares training steps of jlora and PEFT on a CPU, taking turns (workload E).

    python benchmarks/cpu_peer.py --steps 4

Needs torch, transformers and peft. Each variant has its own process, so that none changes
how another manages memory, and only one of them runs at a time. Both the CPU and the wall
seconds of a step are reported: other work on the machine disturbs CPU seconds less.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

PACKAGES = ("jax", "torch", "transformers", "peft")


def jlora_step(name: str, sizes: dict[str, int]) -> Callable[[], float]:
    """Returns a function that runs one step and returns its loss."""
    import jax
    import step_time

    from jlora.cli.process_setup import keep_freed_memory
    from jlora.config.run_config import MeshConfig
    from jlora.parallel.sharding import make_mesh

    keep_freed_memory()  # as train.py does
    work = step_time.WORKLOADS[name]
    work = replace(work, config=replace(work.config, **sizes))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step, state, frozen, _ = step_time.prepare(work, mesh)
    batch = step_time.random_batch(work, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return run


def peft_step(mixed: bool, sizes: dict[str, int]) -> Callable[[], float]:
    """Returns a function that runs one step and returns its loss."""
    import peers
    import torch

    model_sizes, *rest = peers.WORKLOADS["E"]
    peers.WORKLOADS["E"] = (model_sizes | sizes, *rest)
    rows, length = rest[2:4]
    model = peers.peft_model("E", "cpu", liger=False).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    tokens = torch.randint((model_sizes | sizes)["vocab_size"], (rows, length))

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=tokens, labels=tokens).loss
        peers.update(loss, trained, optimizer)
        return float(loss.detach())

    return run


VARIANTS: dict[str, Callable[[dict[str, int]], Callable[[], float]]] = {
    "jlora float32": partial(jlora_step, "E"),
    "peft float32": partial(peft_step, False),
    "jlora bfloat16": partial(jlora_step, "E-bfloat16"),
    "peft bfloat16 autocast": partial(peft_step, True),
}


def serve(run: Callable[[], float]) -> None:
    """Runs a step for each line of the input and prints [CPU s, wall s, loss]."""
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = run()
        times = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps([*times, loss]), flush=True)


def start(name: str) -> Any:
    """Starts the process of this variant, with the flags of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def ask(process: Any) -> tuple[float, float, float]:
    """Runs one step in the process and returns (CPU s, wall s, loss)."""
    print(file=process.stdin, flush=True)
    return tuple(json.loads(process.stdout.readline()))


def main() -> None:
    """Prints the median CPU and wall seconds of a step, one JSON line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab_size", type=int, default=49152)
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        sizes = {"num_hidden_layers": args.layers, "vocab_size": args.vocab_size}
        serve(VARIANTS[args.serve](sizes))
        return
    processes, found = {}, {}
    for name in VARIANTS:
        processes[name] = start(name)
        found[name] = [ask(processes[name])]  # compiles, while the others wait
    for _ in range(1 + args.steps):
        for name, process in processes.items():
            found[name].append(ask(process))
    for name, process in processes.items():
        process.stdin.close()
        process.wait()
        cpu, wall, losses = zip(*found[name], strict=True)
        line = {
            "workload": "E",
            "what": name,
            "layers": args.layers,
            "cpu_s": round(median(cpu[2:]), 2),
            "wall_s": round(median(wall[2:]), 2),
            "loss": [round(losses[0], 4), round(losses[-1], 4)],
            "versions": {package: version(package) for package in PACKAGES},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
