"""Measures the workloads of step_time.py with the PyTorch libraries that are installed.

The work and the way of measuring are the same: random weights and tokens without padding,
bfloat16 with float32 adapters, AdamW with clipping, one JSON line each. Libraries that are
not installed are named and skipped.

    python benchmarks/peers.py A B --frameworks peft peft-liger unsloth
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPS, WARM_UP = 8, 3
NEEDS = {
    "peft": ("torch", "transformers", "peft"),
    "peft-liger": ("torch", "transformers", "peft", "liger_kernel"),
    "unsloth": ("torch", "transformers", "peft", "unsloth"),
}
# name: model, rank, modules, rows, tokens per row, recompute everything
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 1e4,
}
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 5e5,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
WORKLOADS: dict[str, tuple[dict[str, Any], int, list[str], int, int, bool]] = {
    "A": (LLAMA_2_7B, 8, ["q_proj", "v_proj"], 4, 2048, False),
    "B": (LLAMA_3_8B, 16, ALL, 2, 4096, False),
    "B-least-memory": (LLAMA_3_8B, 16, ALL, 2, 4096, True),
    "E": (SMOLLM2, 8, ["q_proj", "v_proj"], 4, 256, False),
    "E-bfloat16": (SMOLLM2, 8, ["q_proj", "v_proj"], 4, 256, False),
}


def base_model(name: str, device: str) -> Any:
    """Returns a Transformers model with random weights; float32 for workload E."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = WORKLOADS[name][0]
    config = LlamaConfig(**sizes, max_position_embeddings=8192, rms_norm_eps=1e-5)
    dtype = torch.float32 if name.startswith("E") else torch.bfloat16
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)


def peft_model(name: str, device: str, *, liger: bool) -> Any:
    """Returns PEFT's model, with Liger's kernels if wanted."""
    import torch
    from peft import LoraConfig, get_peft_model

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    _, rank, modules, _, _, recompute = WORKLOADS[name]
    model = base_model(name, device)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
    with torch.device(device):
        return get_peft_model(model, settings)


def unsloth_model(name: str, device: str) -> Any:
    """Returns Unsloth's model, which it loads from a folder in memory."""
    import tempfile

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    _, rank, modules, _, length, recompute = WORKLOADS[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        base_model(name, device).save_pretrained(folder)
        vocabulary = {f"{i}": i for i in range(1000)}  # Unsloth needs a tokenizer
        words = Tokenizer(WordLevel(vocabulary, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words,
            unk_token="0",
            bos_token="1",
            eos_token="2",
            pad_token="3",
        )
        tokenizer.save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, load_in_4bit=False
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=modules,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if recompute else False,
    )


def update(loss: Any, trained: list[Any], optimizer: Any) -> Any:
    """Runs a clipped optimizer step; returns the gradient norm before clipping."""
    import torch

    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def measure(framework: str, name: str) -> dict[str, Any]:
    """Returns the results of one workload, with the keys of step_time.py."""
    import torch

    rows, length = WORKLOADS[name][3:5]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    if framework == "unsloth":
        model = unsloth_model(name, device)
    else:
        model = peft_model(name, device, liger=framework == "peft-liger")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=device == "cuda")
    generator = torch.Generator().manual_seed(0)
    vocabulary = WORKLOADS[name][0]["vocab_size"]
    tokens = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    mixed = name != "E"

    def step() -> tuple[Any, Any]:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = model(input_ids=tokens, labels=tokens).loss
        return loss.detach(), update(loss, trained, optimizer)

    losses, ends, norm, pending, first_step_s = [], [], None, None, 0.0
    for i in range(WARM_UP + STEPS + 1):
        loss, norm = step()
        if pending is not None:  # the loss is read one step late, as in step_time.py
            losses.append(float(pending))
            ends.append(time.perf_counter())
        pending = loss
        if i == 0:
            float(loss)
            first_step_s = time.perf_counter() - start
    times = sorted(b - a for a, b in itertools.pairwise(ends))
    median = times[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    packages = ("torch", *NEEDS[framework][1:])
    return {
        "workload": name,
        "framework": framework,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "tokens_per_second": round(rows * length / median, 1),
        "step_ms": round(1e3 * median, 2),
        "mfu": None,
        "peak_gib": None if peak is None else round(peak, 2),
        "compile_s": round(first_step_s, 1),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "grad_norm": round(float(norm), 5),  # type: ignore[arg-type]
        "versions": {name: version(name) for name in packages},
    }


def main() -> None:
    """Measures each framework on each workload in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--frameworks", nargs="+", choices=NEEDS, default=list(NEEDS))
    default = Path(__file__).parent / "results" / "step_time.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if len(args.workloads) * len(args.frameworks) > 1:
        for framework in args.frameworks:
            missing = [n for n in NEEDS[framework] if not importlib.util.find_spec(n)]
            if missing:
                print(f"{framework}: not measured, {missing[0]} is not installed")
                continue
            for name in args.workloads:
                options = ["--frameworks", framework, "--out", str(args.out)]
                subprocess.run([sys.executable, __file__, name, *options], check=False)
        return
    line = json.dumps(measure(args.frameworks[0], args.workloads[0]))
    print(line, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
