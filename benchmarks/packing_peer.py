"""The PyTorch peer of packing_gpu.py, which starts it in a process of its own."""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from packing_gpu import RATE, ROWS, STEPS, WARM_UP, data_set, settings


def adapted_model() -> tuple[Any, str]:
    """Returns Transformers' Llama with PEFT's adapter, and what it runs with."""
    import peft
    import transformers

    config, _, _ = settings()
    try:
        import flash_attn  # noqa: F401

        attention = "flash_attention_2"
    except ImportError:  # a block mask made from the positions
        attention = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                max_position_embeddings=8192,
                use_cache=False,
            ),
            attn_implementation=attention,
        )
    torch.set_default_dtype(torch.float32)
    liger = "no liger"
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
        liger = "liger"
    except ImportError:
        pass
    lora = peft.LoraConfig(
        r=16, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    versions += f", peft {peft.__version__}"
    return peft.get_peft_model(model, lora), f"{attention}, {liger}, {versions}"


def as_transformers_wants(
    batch: dict[str, np.ndarray], *, flat: bool
) -> list[np.ndarray]:
    """Returns (ids, positions, labels) as Transformers wants packed documents.

    Documents show by positions that begin again. Labels are shifted inside, so that a
    document's first token is never one. Flash attention takes one row without padding;
    otherwise rows stay, and their padding is a document with nothing to learn.
    """
    real = batch["segment_ids"] > 0
    labels = np.full(real.shape, -100)
    learnt = np.pad(batch["loss_mask"][:, :-1], ((0, 0), (1, 0))) > 0
    labels[learnt] = batch["tokens"][learnt]
    # Padding counts on from 0 as well, at the end of a row.
    tail = np.cumsum(~real, axis=1) - 1
    positions = np.where(real, batch["positions"], tail)
    arrays = [x.astype(np.int64) for x in (batch["tokens"], positions, labels)]
    return [x[real][None] for x in arrays] if flat else arrays


def main() -> None:
    """Prints the figures of the PyTorch peer, on the same packed rows."""
    model, how = adapted_model()
    device = next(model.parameters()).device
    config, _, _ = settings()
    data = data_set(config.vocab_size, packing=True, batch_size=ROWS)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=device.type == "cuda")
    ends, tokens, losses = [], [], []
    for step in range(WARM_UP + STEPS):
        ids, positions, labels = (
            torch.from_numpy(x).to(device)
            for x in as_transformers_wants(data.batch(step), flat="flash" in how)
        )
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens.append(int((data.batch(step)["segment_ids"] > 0).sum()))
        ends.append(time.perf_counter())
    seconds = ends[-1] - ends[WARM_UP - 1]
    cuda = device.type == "cuda"
    figures = {
        "case": "peer",
        "framework": how,
        "tokens_per_second": round(sum(tokens[WARM_UP:]) / seconds, 1),
        "step_ms": round(1e3 * seconds / STEPS, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0,
        "loss": [round(losses[0], 3), round(losses[-1], 3)],
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
