"""Workload E on a CPU beside PEFT: steps of both in turn, CPU seconds beside wall seconds.

    python benchmarks/cpu_peer.py --steps 4

Needs torch, transformers and peft. A step's CPU seconds are those of the whole process,
so that other work on the machine disturbs them less than it disturbs wall seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peers
import step_time
import torch

PACKAGES = ("jax", "torch", "transformers", "peft")


def jlora_step(name: str, layers: int) -> Callable[[], float]:
    """Returns a function that makes one step and returns its loss."""
    work = step_time.WORKLOADS[name]
    config = replace(work.config, num_hidden_layers=layers)
    step, state, frozen, _ = step_time.prepare(replace(work, config=config))
    batch = step_time.random_batch(work)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return run


def peft_step(mixed: bool, layers: int) -> Callable[[], float]:
    """Returns a function that makes one step and returns its loss."""
    sizes, *rest = peers.WORKLOADS["E"]
    peers.WORKLOADS["E"] = ({**sizes, "num_hidden_layers": layers}, *rest)
    rows, length = rest[2:4]
    model = peers.peft_model("E", "cpu", liger=False).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    tokens = torch.randint(sizes["vocab_size"], (rows, length))

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=tokens, labels=tokens).loss
        peers.update(loss, trained, optimizer)
        return float(loss.detach())

    return run


def main() -> None:
    """Prints one JSON line per variant: median CPU and wall seconds of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    variants = {
        "jlora float32": jlora_step("E", args.layers),
        "peft float32": peft_step(mixed=False, layers=args.layers),
        "jlora bfloat16": jlora_step("E-bfloat16", args.layers),
        "peft bfloat16 autocast": peft_step(mixed=True, layers=args.layers),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    losses: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(1 + args.steps):
        for name, run in variants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            losses[name].append(run())
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    for name, pairs in times.items():
        found: dict[str, Any] = {
            "workload": "E",
            "what": name,
            "layers": args.layers,
            "cpu_s": round(median(cpu for cpu, _ in pairs[1:]), 2),
            "wall_s": round(median(wall for _, wall in pairs[1:]), 2),
            "loss": [round(losses[name][0], 4), round(losses[name][-1], 4)],
            "versions": {package: version(package) for package in PACKAGES},
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
