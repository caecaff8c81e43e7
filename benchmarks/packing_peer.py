"""Measures PEFT on packed rows; packing_gpu.py runs it in a separate process.

PEFT on Transformers, with Liger's kernels if they are installed. As the padding-free
collators of PyTorch trainers do, all documents of a batch go into one row without padding,
and attention gets the start of each. It is flash-attn if that is installed, else
PyTorch's own copy of the kernel. Where neither runs, the rows stay as they are and
Transformers derives a block mask from the positions.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from packing_gpu import RATE, ROWS, STEPS, WARM_UP, data_set, settings
from peers import update


def carried_flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Returns attention within documents by PyTorch's own flash kernel.

    It has the signature that Transformers requires of an attention function.
    """
    # [T, heads, head_dim]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    starts, longest = cu_seq_lens_q, max_length_q
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scaling
    )[0]
    return out[None], None


def carried_flash_is_right() -> bool:
    """Returns whether `carried_flash` runs here and equals plain attention."""
    torch.manual_seed(0)
    try:
        inputs = [
            torch.randn(1, heads, 96, 128, device="cuda", dtype=torch.bfloat16)
            for heads in (8, 2, 2)
        ]
        for x in inputs:
            x.requires_grad_()
        starts = torch.tensor([0, 40, 96], device="cuda", dtype=torch.int32)
        found = carried_flash(
            None, *inputs, None, scaling=0.1, cu_seq_lens_q=starts, max_length_q=56
        )[0]
        gradients = torch.autograd.grad(found.float().square().sum(), inputs)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        print(f"PyTorch's flash attention: {error}", file=sys.stderr)
        return False
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, part].float() for x in inputs),
            is_causal=True,
            scale=0.1,
            enable_gqa=True,
        )
        for part in (slice(0, 40), slice(40, 96))
    ]
    expected = torch.cat(parts, 2).transpose(1, 2)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    pairs = zip((found, *gradients), (expected, *wanted), strict=True)
    return all(bool((a.float() - b).norm() < 0.02 * b.norm()) for a, b in pairs)


def choose_attention() -> str:
    """Returns the fastest attention within documents that runs here."""
    from transformers import AttentionInterface

    try:
        import flash_attn  # noqa: F401

        return "flash_attention_2"
    except ImportError:
        pass
    if not carried_flash_is_right():
        return "sdpa"
    # Transformers would look for a package if the name had "flash" in it.
    AttentionInterface.register("torch_varlen", carried_flash)
    return "torch_varlen"


def adapted_model() -> tuple[Any, str, str]:
    """Returns Transformers' Llama with PEFT's adapter, its attention, and the versions."""
    import peft
    import transformers

    config, lora, _ = settings()
    attention, liger = choose_attention(), "no liger"
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        liger = "liger"
    except ImportError:
        pass
    torch.manual_seed(0)
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
        adapter = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, adapter)
    versions = f"{liger}, torch {torch.__version__}, peft {peft.__version__}"
    versions += f", transformers {transformers.__version__}"
    return model.train(), attention, versions


def as_transformers_wants(
    batch: dict[str, np.ndarray], device: torch.device, *, flat: bool
) -> dict[str, Any]:
    """Returns the arguments of Transformers' forward pass over packed documents.

    A document begins where positions start again at 0. The model shifts the labels, so the
    first token of a document is never a label. If flat, there is one row without padding,
    and the starts of its documents; otherwise rows stay, and their padding is a document
    without labels.
    """
    real = batch["segment_ids"] > 0
    labels = np.full(real.shape, -100)
    supervised = np.pad(batch["loss_mask"][:, :-1], ((0, 0), (1, 0))) > 0
    labels[supervised] = batch["tokens"][supervised]
    # Padding at the end of a row also counts from 0.
    tail = np.cumsum(~real, axis=1) - 1
    positions = np.where(real, batch["positions"], tail)
    arrays = {"input_ids": batch["tokens"], "position_ids": positions, "labels": labels}
    if not flat:
        return {k: torch.from_numpy(np.int64(x)).to(device) for k, x in arrays.items()}
    arrays = {name: x[real][None].astype(np.int64) for name, x in arrays.items()}
    starts = np.flatnonzero(arrays["position_ids"][0] == 0)
    starts = np.append(starts, real.sum()).astype(np.int32)
    wanted: dict[str, Any] = {
        name: torch.from_numpy(x).to(device) for name, x in arrays.items()
    }
    for side in ("q", "k"):
        wanted[f"cu_seq_lens_{side}"] = torch.from_numpy(starts).to(device)
        wanted[f"max_length_{side}"] = int(np.diff(starts).max())
    return wanted


def main() -> None:
    """Prints the results of PEFT on the same packed rows."""
    model, attention, versions = adapted_model()
    device = next(model.parameters()).device
    data = data_set(settings()[0].vocab_size, packing=True, batch_size=ROWS)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=RATE, weight_decay=0.0, fused=device.type == "cuda"
    )
    steps = range(WARM_UP + STEPS)
    # On the device beforehand, so that the peer never waits for data.
    batches = [
        as_transformers_wants(data.batch(i), device, flat=attention != "sdpa")
        for i in steps
    ]
    tokens = [int((data.batch(i)["segment_ids"] > 0).sum()) for i in steps]
    ends: list[float] = []
    losses: list[float] = []
    pending = None
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        norm = update(loss, weights, optimizer)
        if pending is not None:  # the loss is read one step late, as in jlora
            losses.append(float(pending))
            ends.append(time.perf_counter())
        pending = loss.detach()
    losses.append(float(pending))  # type: ignore[arg-type]
    ends.append(time.perf_counter())
    seconds = ends[-1] - ends[WARM_UP - 1]
    cuda = device.type == "cuda"
    figures = {
        "case": "peer",
        "framework": "peft",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "tokens_per_second": round(sum(tokens[WARM_UP:]) / seconds, 1),
        "step_ms": round(1e3 * seconds / STEPS, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0,
        "loss": [round(losses[0], 3), round(losses[-1], 3)],
        "grad_norm": round(float(norm), 5),
        "attention": attention,
        "versions": versions,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
