"""Merged exports and adapters, read by vLLM's own code, which needs no GPU for that.

    python tests/parity/vllm_reader.py

Compares the settings, and the cos and sin, that vLLM makes of an exported config.json with
jlora's, for every form of rope; and what its LoRA reader makes of the golden adapters with
what they are. Exits with status 1 where anything differs that `convert` does not tell, or
where it tells or refuses what vLLM reads alike. Needs jlora, torch, a transformers that
vLLM allows, and `pip install --no-deps vllm` with the packages that its import misses.
"""

import contextlib
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers.adapters import ALL, GOLDEN, golden
from helpers.tiny import CONFIG, tensors, write_hf
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora import lora_model
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.models.llama import LlamaForCausalLM

import convert
import jlora
from convert import to_hf, to_peft
from jlora.config.llama_config import LlamaConfig
from jlora.errors import JloraError
from jlora.formats.hf.export_config import reader_notes
from jlora.formats.peft.adapter_writer import save_adapter
from jlora.formats.peft.plain_lora import plain_lora
from jlora.formats.tensor_names import module_name
from jlora.loading import open_adapter
from jlora.model.rotary import rope_angles

lora_model.PIN_MEMORY = False  # for which there must be a GPU
ROPES = json.loads((GOLDEN.parent / "rope/cases.json").read_text())["cases"]
# Of the largest number in a table: a few roundings of float32.
LIMIT = 2e-6
PLAIN = CONFIG | {
    "head_dim": 16,
    "rope_theta": 5e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    **{f"rope {name}": {"rope_scaling": rope} for name, rope in ROPES.items()},
    "rope yarn, shorter than the model": {
        "rope_scaling": ROPES["yarn"] | {"factor": 1.4}
    },
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    },
}
LINEARS = {
    name for names in LlamaForCausalLM.packed_modules_mapping.values() for name in names
} | {"o_proj", "down_proj"}


def export(folder: Path, changes: dict[str, Any]) -> tuple[LlamaConfig, Path]:
    """Returns the source's settings, and the merged folder of it and an adapter."""
    config = PLAIN | changes
    base = str(write_hf(folder / "base", config, tensors(config)))
    model, params = convert.load(base)
    lora = jlora.LoraConfig(r=2)
    params = jlora.add_lora(params, lora, jax.random.key(0))
    save_adapter(params, lora, folder / "adapter", base)
    out, adapter = str(folder / "merged"), str(folder / "adapter")
    to_hf.main(to_hf.Arguments(out=out, model=base, adapter=adapter, verify=False))
    return model.config, folder / "merged"


def read_config(folder: Path, longest: int | None = None) -> tuple[ModelConfig, Any]:
    """Returns vLLM's settings and rotary embedding for texts of at most `longest`.

    The second call is the one that its `LlamaAttention` makes.
    """
    model = ModelConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=longest,
    )
    hf = model.hf_config
    config = VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        rotary_embedding._ROPE_DICT.clear()  # its keys lack max_model_len
        rope = rotary_embedding.get_rope(
            hf.head_dim,
            max_position=hf.max_position_embeddings,
            rope_parameters=hf.rope_parameters,
        )
    return model, rope


def table(config: LlamaConfig, rows: int, length: int) -> np.ndarray:
    """Returns jlora's [rows, H], cos before sin, of a call of some length."""
    angles = rope_angles(config, jnp.arange(rows)[None], length, "cpu")
    return np.concatenate([np.asarray(x)[0, :, 0] for x in angles], axis=-1)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest number of `b`."""
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def compare(config: LlamaConfig, folder: Path) -> tuple[float, int, int]:
    """Returns how far the tables are apart, vLLM's positions and the longest text."""
    model, rope = read_config(folder)
    assert LlamaConfig.from_hf(model.hf_config.to_dict()) == config
    if config.rope_parameters.rope_type != "longrope":
        theirs = rope.cos_sin_cache.numpy()
        rows = len(theirs)
        far = difference(theirs, table(config, rows, rows))
        return far, rows, model.max_model_len
    # One of two tables for all texts, by the longest that it is told to accept.
    short = config.rope_parameters.original_max_position_embeddings
    longest = config.max_position_embeddings
    assert model.max_model_len == short
    assert not rope.use_long_rope
    model, rope = read_config(folder, longest)
    assert rope.use_long_rope
    theirs = rope.long_short_cos_sin_cache.numpy()
    parts = (
        difference(theirs[:short], table(config, short, short)),
        difference(theirs[short:], table(config, longest, longest)),
    )
    return max(parts), len(theirs) - short, model.max_model_len


def check_configs() -> list[str]:
    """Prints a line for each configuration; returns what is not as the notes say."""
    wrong = []
    for name, changes in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(None):
                config, merged = export(Path(folder), changes)
            far, positions, longest = compare(config, merged)
        line = f"{name}: {far:.1e} apart, {positions} positions, texts of {longest}"
        print(line)
        notes = " ".join(reader_notes(config))
        if (far > LIMIT) != ("vLLM derives" in notes) or (positions < longest) != (
            f"vLLM has {positions} positions " in notes
        ):
            wrong.append(f"{line}, but the notes say: {notes}")
    return wrong


def read_lora(folder: Path, vocab_size: int) -> lora_model.LoRAModel:
    """Returns what vLLM's worker makes of a folder, with its checks."""
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=512))
    return lora_model.LoRAModel.from_local_checkpoint(
        str(folder),
        LINEARS | LlamaForCausalLM.embedding_modules.keys(),
        helper,
        device="cpu",
        dtype=torch.float32,
        model_vocab_size=vocab_size,
        weights_mapper=LlamaForCausalLM.hf_to_vllm_mapper.get_rename_mapper(),
    )


def deltas(lora: lora_model.LoRAModel) -> dict[str, np.ndarray]:
    """Returns what vLLM adds to every module, s B A as [in, out]."""
    found = {}
    for name, layer in lora.loras.items():
        layer.optimize()  # s moves into B
        found[name] = (layer.lora_b.double() @ layer.lora_a.double()).numpy().T
    return found


def source_deltas(folder: str) -> dict[str, np.ndarray]:
    """Returns what the adapter adds to every module, [in, out]."""
    adapter = plain_lora(open_adapter(folder))
    found = {}
    for path, pair in adapter.pairs.items():
        a = pair["lora_A"].astype(np.float64)
        b = pair["lora_B"] * np.float32(adapter.scalings[path])
        found[module_name(path)] = a @ b.astype(np.float64)
    return found


def check_adapters() -> list[str]:
    """Prints a line for each golden adapter; returns what vLLM reads otherwise."""
    wrong, refused = [], 0
    for name in ALL:
        base = json.loads((golden(name).base / "config.json").read_text())
        size = base["vocab_size"]
        # Their bases are named relative to their folder.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(GOLDEN):
            out = Path(folder) / "out"
            try:
                with contextlib.redirect_stdout(None):
                    to_peft.main(to_peft.Arguments(name, str(out), for_="vllm"))
            except JloraError as error:
                refused += 1
                print(f"{name}: refused: {error}")
                try:
                    read_lora(Path(name), size)
                except (ValueError, RuntimeError) as theirs:
                    print(f"    vLLM: {theirs}")
                else:
                    wrong.append(f"{name}: refused, but vLLM reads it")
                continue
            ours, theirs = source_deltas(name), deltas(read_lora(out, size))
        if ours.keys() != theirs.keys():
            wrong.append(f"{name}: other modules: {ours.keys() ^ theirs.keys()}")
            continue
        far = max(difference(theirs[module], ours[module]) for module in ours)
        print(f"{name}: {far:.1e} apart in {len(ours)} modules")
        if far > 0:
            wrong.append(f"{name}: {far:.1e} apart")
    print(f"{len(ALL) - refused} of {len(ALL)} adapters written, {refused} refused")
    return wrong


def main() -> int:
    """Prints what was compared, and returns the exit status."""
    print(*(f"{name} {version(name)}" for name in ("vllm", "transformers", "torch")))
    wrong = check_configs() + check_adapters()
    for line in wrong:
        print(f"WRONG: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
