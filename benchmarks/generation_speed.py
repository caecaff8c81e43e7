"""Measures how fast a model generates, and prints one JSON line for each number of rows.

The weights are random and made on the device, and so is the prompt. A line has the tokens per
second of all rows together after the first token, the time to the first token (compiled
before), the share of the memory bandwidth that reading the weights takes, if the device's
is known, and the largest memory. On a GPU the first start compiles for about a minute.

    python benchmarks/generation_speed.py 8B
    python benchmarks/generation_speed.py 8B --rows 1 8 --base-dtype nf4
"""

import argparse
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
from step_time import LLAMA_2_7B, LLAMA_3_8B, SMOLLM2, TINY, random_base

from jlora.cli.process_setup import keep_compiled
from jlora.config.sampling_config import SamplingConfig
from jlora.lora.adapter_tree import Params
from jlora.model.decoding import token_rows
from jlora.model.decoding.engine import Row
from jlora.model.decoding.token_rows import Generation, sample_key
from jlora.model.llama import Llama
from jlora.ops.compute_choices import choose_attention, choose_dtype, default_platform
from jlora.train.memory_estimate import peak_memory_bytes

MODELS = {"8B": LLAMA_3_8B, "7B": LLAMA_2_7B, "SmolLM2": SMOLLM2, "tiny": TINY}
# Bytes per second.
BANDWIDTHS = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "A100": 2.0e12}


def measure(
    model: Llama, params: Params, rows: int, prompt: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """Returns the figures of the fastest of several generations, after one to compile."""
    random = np.random.default_rng(0)
    ids = random.integers(0, model.config.vocab_size, (rows, prompt)).tolist()
    given = [Row(row, SamplingConfig(), sample_key(0, i)) for i, row in enumerate(ids)]
    times = []
    for _ in range(repeats + 1):
        began, arrived = time.perf_counter(), []
        for _ in Generation(model, params, given, [tokens] * rows):
            arrived.append(time.perf_counter())
        times.append((arrived[-1] - arrived[0], arrived[0] - began))
    compiling = sum(times[0]) - sum(times[1])
    later, first = min(times[1:])
    return {
        "rows": rows,
        "tokens_per_second": round(rows * (tokens - 1) / later, 1),
        "first_token_s": round(first, 4),
        "compile_s": round(compiling, 1),
        "step_s": later / (tokens - 1),
    }


def main() -> None:
    """Measures what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base-dtype", default="keep")
    parser.add_argument("--steps-at-once", type=int, help="steps in one call")
    args = parser.parse_args()
    keep_compiled()
    if args.steps_at_once:
        token_rows.STEPS_AT_ONCE[default_platform()] = args.steps_at_once
    config, platform = MODELS[args.model], default_platform()
    dtype = choose_dtype("auto", platform)
    attention = choose_attention(
        "auto", platform=platform, dtype=dtype, head_dim=config.head_dim
    )
    model = Llama(config, dtype, attention)
    params = jax.block_until_ready(random_base(config, dtype, args.base_dtype))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_word_embeddings:  # of which a step reads a row
        weights -= params["embed_tokens"]["embedding"].nbytes
    device = jax.devices()[0]
    known = [rate for name, rate in BANDWIDTHS.items() if name in device.device_kind]
    for rows in args.rows:
        found = measure(model, params, rows, args.prompt, args.tokens, args.repeats)
        step = found.pop("step_s")
        line = {
            "model": args.model,
            "device": device.device_kind,
            "dtype": jnp.dtype(dtype).name,
            "base_dtype": args.base_dtype,
            **found,
            "gigabytes_per_second": round(weights / step / 1e9, 1),
            "share_of_bandwidth": round(weights / step / known[0], 3)
            if known
            else None,
            "peak_gib": round(peak_memory_bytes() / 2**30, 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
