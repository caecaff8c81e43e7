"""Writes tests/golden/hf: tiny Llamas of Transformers, and what they compute with PEFT.

Run once, with torch, transformers and peft installed:
    python tests/golden/make_hf_golden.py

Each case is a folder with config.json and model.safetensors as `save_pretrained` writes
them, and expected.npz. Weights come from NumPy's frozen legacy generator, rounded to
bfloat16 so that the files are small; everything is computed in float32.
"""

from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "hf"
PLAIN = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Name -> (what differs from PLAIN, tokens per row). The llama3 rows are three times as
# long as its original context.
CASES = {
    "mha": ({}, 24),
    "gqa": ({"num_key_value_heads": 2}, 24),
    "llama3": ({"num_key_value_heads": 2, "rope_parameters": LLAMA3}, 96),
    "tied": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, 24),
}
IGNORED = -100


def main() -> None:
    """Writes every case."""
    for seed, (name, (changes, length)) in enumerate(CASES.items()):
        write_case(HERE / name, LlamaConfig(**(PLAIN | changes)), length, seed)


def write_case(folder: Path, config: LlamaConfig, length: int, seed: int) -> None:
    """Writes one model and its logits, losses and adapter gradients."""
    random = np.random.RandomState(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            values = random.standard_normal(parameter.shape) * 0.15
            values += 1.0 if key.endswith("norm.weight") else 0.0
            parameter.copy_(torch.tensor(values).to(torch.bfloat16))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Read back, because a cast to bfloat16 also rounds the rotary frequencies.
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )

    tokens = random.randint(0, config.vocab_size, (2, length))
    # HF shifts the labels itself: position t of the mask is about predicting token t.
    mask = random.randint(0, 2, tokens.shape)
    mask[:, 0] = 0
    labels = torch.tensor(np.where(mask, tokens, IGNORED))
    inputs = torch.tensor(tokens)
    with torch.no_grad():
        base = model(inputs, labels=labels)

    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    arrays = {}
    parameters = {
        key.removeprefix("base_model.model.").replace(".default", ""): parameter
        for key, parameter in sorted(adapted.named_parameters())
        if "lora_" in key
    }
    with torch.no_grad():
        for key, parameter in parameters.items():
            values = np.float32(random.standard_normal(parameter.shape) * 0.1)
            parameter.copy_(torch.tensor(values))
            arrays[key] = values
    output = adapted(inputs, labels=labels)
    output.loss.backward()
    for key, parameter in parameters.items():
        arrays[f"gradient of {key}"] = parameter.grad.numpy()
    np.savez_compressed(
        folder / "expected.npz",
        tokens=np.int32(tokens),
        mask=np.int32(mask),
        scaling=np.float32(6 / 4),
        base_logits=base.logits.numpy(),
        base_loss=base.loss.numpy(),
        logits=output.logits.detach().numpy(),
        loss=output.loss.detach().numpy(),
        versions=np.array(
            [f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, np)]
        ),
        **arrays,
    )


if __name__ == "__main__":
    main()
