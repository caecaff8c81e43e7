"""Makes tests/golden/adapters: toy bases, adapters saved by PEFT, and what PEFT computes.

Needs torch, transformers and peft; made with torch 2.14.1 (2.13.0 gives the same
bytes), transformers 5.23.0, peft 0.21.2, numpy 2.4.6, safetensors 0.8.0 on a CPU:

    python tests/golden/make_adapters_golden.py

Weights come from NumPy's frozen RandomState. A and B are multiples of 2^-7 and 2^-8
below 0.4, so every sum in B A is exact in float32 and the merged bits do not depend on
the order of summation. On another CPU the last bits of logits and gradients may move.

expected.npz of a case, in PEFT's layout:
    input_ids               [2, 16] int32
    logits, loss            base and adapter in float32; the loss is of the next tokens
    grad/<adapter key>      gradient of loss, first adapted module, embedding and head
    targeted, r, scaling    sorted adapted modules with rank and scaling of each
    trainable_params, all_params
    changed                 HF keys that differ between the base and the merged model
    merged/<HF key>         first and last changed, embedding, head (bfloat16 as bits)
    logits_merged           merged in the base's dtype, run in float32
    logits_merged_peft_wrong  what merge_and_unload() gives where it is wrong
    safe_merge/<HF key>     `bf16` only: the two roundings that must not be matched

PEFT merges adapters on a tied table wrongly; there the base is untied before it merges.
_layers/dropout.npz holds one layer with a known dropout mask, for LoRA and DoRA.
"""

import json
import os
import shutil
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules in set order
    os.execve(
        sys.executable,
        [sys.executable, *sys.argv],
        {**os.environ, "PYTHONHASHSEED": "0"},
    )

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "adapters"
VOCAB, TOKENS = 80, (2, 16)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name: (tied, stored dtype, attention bias, rope_theta)
BASES = {
    "untied_fp32": (False, torch.float32, False, 500000.0),
    "tied_fp32": (True, torch.float32, False, 50000.0),
    "untied_bf16": (False, torch.bfloat16, False, 500000.0),
    "bias_fp32": (False, torch.float32, True, 10000.0),
}
QV, QO = ["q_proj", "v_proj"], ["q_proj", "o_proj"]
TABLES = ["lm_head", "embed_tokens"]
SMALL = {"r": 4, "lora_alpha": 8}
ON_Q = {**SMALL, "target_modules": ["q_proj"]}
ON_TABLE = {**SMALL, "target_modules": ["q_proj", "embed_tokens"]}
ON_HEAD = {**SMALL, "target_modules": ["q_proj", "lm_head"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": (
        "untied_fp32",
        {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": QV},
    ),
    "defaults": ("untied_fp32", {}),
    "no_task_type": (
        "untied_fp32",
        {**SMALL, "task_type": None, "target_modules": ["q_proj"]},
    ),
    "rslora": (
        "untied_fp32",
        {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": QO},
    ),
    "patterns": (
        "untied_fp32",
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": SEVEN,
            "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 2},
            "alpha_pattern": {
                "v_proj": 8,
                r"^model\.layers\.1\.mlp\.gate_proj": 24,
            },
        },
    ),
    "all_linear": ("untied_fp32", {**SMALL, "target_modules": "all-linear"}),
    "regex": (
        "untied_fp32",
        {
            **SMALL,
            "target_modules": r"model\.layers\.1\.(self_attn\.[qk]|mlp\.up)_proj",
        },
    ),
    "exclude": (
        "untied_fp32",
        {
            **SMALL,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"],
        },
    ),
    "exclude_regex": (
        "untied_fp32",
        {
            **SMALL,
            "target_modules": "all-linear",
            "exclude_modules": r".*\.layers\.0\..*|.*\.mlp\.down_proj",
        },
    ),
    "layers": (
        "untied_fp32",
        {**SMALL, "target_modules": QV, "layers_to_transform": [1]},
    ),
    "layers_exact_name": (
        "untied_fp32",
        {
            **SMALL,
            "layers_to_transform": 1,
            "layers_pattern": "layers",
            "target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"],
        },
    ),
    "bf16": ("untied_bf16", {"r": 8, "lora_alpha": 16, "target_modules": SEVEN}),
    "bf16_rslora": (
        "untied_bf16",
        {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": QO},
    ),
    "bf16_stored_adapter": ("untied_bf16", {**SMALL, "target_modules": QV}),
    "tied": ("tied_fp32", {"r": 8, "lora_alpha": 16, "target_modules": QV}),
    "dora": (
        "untied_fp32",
        {**SMALL, "use_dora": True, "target_modules": "all-linear"},
    ),
    "dora_rslora": (
        "untied_fp32",
        {
            "r": 8,
            "lora_alpha": 8,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["v_proj"],
        },
    ),
    "dora_embed": (
        "untied_fp32",
        {**SMALL, "use_dora": True, "target_modules": ["embed_tokens"]},
    ),
    "bf16_dora": (
        "untied_bf16",
        {**SMALL, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "embed": ("untied_fp32", ON_TABLE),
    "lm_head": ("untied_fp32", ON_HEAD),
    "bf16_embed_lm_head": (
        "untied_bf16",
        {**SMALL, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "modules_to_save": ("untied_fp32", {**ON_Q, "modules_to_save": TABLES}),
    "modules_to_save_norm": ("untied_fp32", {**ON_Q, "modules_to_save": ["norm"]}),
    "bf16_modules_to_save": ("untied_bf16", {**ON_Q, "modules_to_save": TABLES}),
    "trainable_tokens": (
        "untied_fp32",
        {**ON_Q, "trainable_token_indices": [1, 5, 9]},
    ),
    "resized_vocab": ("untied_fp32", ON_Q),
    "pissa": (
        "untied_fp32",
        {
            "r": 8,
            "lora_alpha": 16,
            "init_lora_weights": "pissa",
            "target_modules": QV,
        },
    ),
    "olora": (
        "untied_fp32",
        {
            "r": 8,
            "lora_alpha": 16,
            "init_lora_weights": "olora",
            "target_modules": QV,
        },
    ),
    "tied_trainable_tokens": (
        "tied_fp32",
        {**ON_Q, "trainable_token_indices": [1, 5, 9]},
    ),
    "tied_modules_to_save": (
        "tied_fp32",
        {**ON_Q, "modules_to_save": ["embed_tokens"]},
    ),
    "tied_modules_to_save_ensured": (
        "tied_fp32",
        {**ON_Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied_embed": ("tied_fp32", ON_TABLE),
    "tied_lm_head": ("tied_fp32", ON_HEAD),
    "tied_embed_ensured": ("tied_fp32", {**ON_TABLE, "ensure_weight_tying": True}),
    "bias_all": ("bias_fp32", {**ON_Q, "bias": "all"}),
    "bias_lora_only": ("bias_fp32", {**ON_Q, "bias": "lora_only"}),
    "lora_bias": ("bias_fp32", {**ON_Q, "lora_bias": True}),
}
NEW_TOKENS = {"resized_vocab": 4}
PEFT_MERGES_WRONGLY = {"tied_embed", "tied_lm_head", "tied_embed_ensured"}


def normal(*seed_words: str, shape: Any) -> torch.Tensor:
    """Returns standard normal numbers that depend on the words alone."""
    seed = zlib.crc32("/".join(seed_words).encode())
    numbers = np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(numbers.astype(np.float32))


def on_grid(x: torch.Tensor, std: float, step: float) -> torch.Tensor:
    """Returns multiples of `step`, whose products sum exactly in float32."""
    return (x * std / step).round().clamp(-48, 48) * step


def make_base(name: str) -> None:
    tied, dtype, bias, theta = BASES[name]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            x = normal("base", key, shape=p.shape)
            if "norm" in key or key.endswith("bias"):
                p.copy_(("norm" in key) + 0.1 * x)
            else:
                p.copy_(x / p.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(f"_base/{name}")
    Path(f"_base/{name}/generation_config.json").unlink(missing_ok=True)
    if name == "tied_fp32":  # in the spelling of transformers 4, as most models have it
        path = Path(f"_base/{name}/config.json")
        old = json.loads(path.read_text())
        del old["rope_parameters"], old["head_dim"]
        old.update(
            rope_theta=theta,
            rope_scaling=None,
            torch_dtype=old.pop("dtype"),
            transformers_version="4.45.0",
        )
        path.write_text(json.dumps(old, indent=2, sort_keys=True) + "\n")


def load(name: str, dtype: torch.dtype = torch.float32, new_tokens: int = 0) -> Any:
    model: Any = LlamaForCausalLM.from_pretrained(
        f"_base/{name}", dtype=dtype, attn_implementation="eager"
    ).eval()
    if new_tokens:
        model.resize_token_embeddings(VOCAB + new_tokens, mean_resizing=False)
        tables = (
            ("embed_tokens", model.model.embed_tokens),
            ("lm_head", model.lm_head),
        )
        for key, table in tables:
            rows = normal("new", key, shape=(new_tokens, table.weight.shape[1]))
            table.weight.data[VOCAB:] = rows / table.weight.shape[1] ** 0.5
    return model


def merge_correctly(case: str, base: str) -> Any:
    """Returns what merge_and_unload would have to give on a tied base: untie first."""
    model = load(base)
    model.config.tie_word_embeddings = False
    table = model.model.embed_tokens.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(table)
    config: Any = LoraConfig.from_pretrained(case)
    if config.ensure_weight_tying:
        config.ensure_weight_tying = False
        config.target_modules = {*config.target_modules, "lm_head"}
    merged: Any = PeftModel.from_pretrained(model, case, config=config)
    return merged.merge_and_unload()


def input_ids() -> torch.Tensor:
    ids = np.random.RandomState(7).randint(0, VOCAB, TOKENS)
    ids[:, 3:9:2] = [1, 5, 9]
    return torch.from_numpy(ids)


def logits(model: Any, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits.float().numpy()


def randomise(case: str, model: Any) -> None:
    """Gives every trainable tensor values that matter; PEFT's own start has B = 0."""
    from_base = model.peft_config["default"].init_lora_weights in ("pissa", "olora")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if not p.requires_grad:
                continue
            x = normal(case, key, shape=p.shape)
            if "magnitude" in key:
                p.copy_(p * (1 + 0.2 * x).clamp(0.5, 1.5))
            elif "lora_" not in key:  # modules_to_save, trainable tokens, biases
                p.copy_(p.float() + 0.1 * x)
            elif from_base:
                p.copy_(p + 0.05 * x)
            else:
                std, step = (0.125, 2**-7) if "_A" in key else (0.0625, 2**-8)
                p.copy_(on_grid(x, std, step))


def bits(t: torch.Tensor) -> np.ndarray:
    return t.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


def make_case(case: str) -> None:
    name, fields = CASES[case]
    stored, new_tokens, ids = BASES[name][1], NEW_TOKENS.get(case, 0), input_ids()
    if new_tokens:
        ids[:, 10] = VOCAB + 1
    model = get_peft_model(
        load(name, stored, new_tokens),
        LoraConfig(**{"task_type": "CAUSAL_LM", **fields}),
        autocast_adapter_dtype=case != "bf16_stored_adapter",
    )
    randomise(case, model)
    trainable, total = model.get_nb_trainable_parameters()
    model.save_pretrained(case)
    (Path(case) / "README.md").unlink()

    base = load(name, new_tokens=new_tokens)
    model = PeftModel.from_pretrained(base, case, is_trainable=True).eval()
    layers: dict[str, Any] = {
        n: m
        for n, m in model.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    predicted, targets = model(ids).logits[:, :-1], ids[:, 1:]
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten())
    loss.backward()
    out: dict[str, Any] = {
        "input_ids": ids.numpy().astype(np.int32),
        "logits": logits(model, ids),
        "loss": np.float32(loss.item()),
        "trainable_params": np.int64(trainable),
        "all_params": np.int64(total),
        "targeted": np.array(sorted(layers)),
        "r": np.array([layers[n].r["default"] for n in sorted(layers)], np.int32),
        "scaling": np.array([layers[n].scaling["default"] for n in sorted(layers)]),
    }
    watched = {min(layers), *(n for n in layers if n.endswith(tuple(TABLES)))}
    for key, p in model.named_parameters():
        if p.grad is not None and any(f".{n}.lora_" in key for n in watched):
            key = key.replace("vector.default.weight", "vector").replace(".default", "")
            out[f"grad/{key}"] = p.grad.numpy()

    old = load(name, stored).state_dict()
    base = load(name, stored, new_tokens)
    merged: Any = PeftModel.from_pretrained(base, case).merge_and_unload()
    if case in PEFT_MERGES_WRONGLY:
        out["logits_merged_peft_wrong"] = logits(merged, ids)
        merged = merge_correctly(case, name)
    new = {k: v.clone() for k, v in merged.state_dict().items()}
    out["changed"] = np.array(sorted(k for k in new if not torch.equal(new[k], old[k])))
    tables = {k for k in out["changed"] if "embed_tokens" in k or "lm_head" in k}
    narrow = stored == torch.bfloat16
    for key in sorted({*out["changed"][[0, -1]], *tables}):
        out[f"merged/{key}"] = bits(new[key]) if narrow else new[key].numpy()
    out["logits_merged"] = logits(merged.float(), ids)
    if case == "bf16":
        safe: Any = PeftModel.from_pretrained(load(name, stored), case)
        key = out["changed"][-1]
        weights = safe.merge_and_unload(safe_merge=True).state_dict()
        out[f"safe_merge/{key}"] = bits(weights[key])
    np.savez_compressed(f"{case}/expected.npz", **out)


def make_layers() -> None:
    """Makes one linear layer with a known dropout mask, comparable without a seed."""
    mask = (normal("layers", "mask", shape=(2, 5, 64)) > -0.6745).float() / 0.75

    class Mask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * mask

    out: dict[str, Any] = {}
    for prefix in ("lora", "dora"):
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            lora_dropout=0.25,
            use_dora=prefix == "dora",
            target_modules=["k_proj"],
            layers_to_transform=[0],
        )
        model: Any = get_peft_model(load("untied_fp32"), config)
        randomise("layers", model)
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        x = normal("layers", "x", shape=(2, 5, 64)).requires_grad_()
        upstream = normal("layers", "upstream", shape=(2, 5, 32))
        layer.eval()
        out[f"{prefix}/y_eval"] = layer(x).detach().numpy()
        layer.lora_dropout["default"] = Mask()
        layer.train()
        y = layer(x)
        (y * upstream).sum().backward()
        params = {n: getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B")}
        if prefix == "dora":
            params["magnitude"] = layer.lora_magnitude_vector["default"].weight
        out[f"{prefix}/y_train"] = y.detach().numpy()
        out[f"{prefix}/grad/x"] = x.grad.numpy()
        out |= {f"{prefix}/{k}": p.detach().numpy() for k, p in params.items()}
        out |= {f"{prefix}/grad/{k}": p.grad.numpy() for k, p in params.items()}
        out |= {"x": x.detach().numpy(), "upstream": upstream.numpy()}
        out |= {"mask": mask.numpy(), "scaling": np.float64(layer.scaling["default"])}
        out["weight"] = layer.base_layer.weight.detach().numpy()
    np.savez_compressed("_layers/dropout.npz", **out)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(HERE)  # so that adapter_config.json names its base by a relative path
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    Path("_layers").mkdir()
    for name in BASES:
        make_base(name)
    make_layers()
    for case in CASES:
        make_case(case)


if __name__ == "__main__":
    main()
