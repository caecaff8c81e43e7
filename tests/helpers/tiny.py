"""Tiny random Llamas as Hugging Face folders, for the tests of the converters."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.formats.safetensors_file import Spec, write_safetensors
from jlora.formats.tensor_names import all_names

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name.key: rng.normal(size=name.hf_shape).astype(dtype)
        for name in all_names(LlamaConfig.from_hf(config))
    }


def halves(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    keys = list(arrays)
    middle = len(keys) // 2
    return [
        {key: arrays[key] for key in part} for part in (keys[:middle], keys[middle:])
    ]


def write_file(path: Path, arrays: dict[str, np.ndarray]) -> None:
    specs = {key: Spec(array.shape, array.dtype) for key, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__)


def write_hf(
    folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", arrays)
    return folder


def write_sharded(
    folder: Path,
    config: dict[str, Any],
    shards: list[dict[str, np.ndarray]],
    weight_map: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, 9)]
    for name, arrays in zip(names, shards, strict=False):
        write_file(folder / name, arrays)
    if weight_map is None:
        weight_map = {
            key: name
            for name, shard in zip(names, shards, strict=False)
            for key in shard
        }
    index = {
        "metadata": {"total_size": sum(a.nbytes for s in shards for a in s.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
